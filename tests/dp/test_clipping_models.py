"""Per-unit clipping of whole transformers models against its oracle: autograd in float64, one unit at a time, alone in its batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional

from discreet.dp import clipping, rules
from discreet.dp.clipping import clipped_sum

VOCABULARY, IGNORED, PADDING = 61, -100, 1
UNITS = [3, 0, 3, 7, 0]
Batch = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


class Architecture(NamedTuple):
    """A model class, its configuration class and a tiny configuration; `fallback`: trained parameters that have no rule, by the end of their names."""

    model: str
    config: str
    sizes: dict[str, Any]
    fallback: tuple[str, ...] = ()


SMALL = {"vocab_size": VOCABULARY, "pad_token_id": PADDING, "bos_token_id": 0, "eos_token_id": 2}
LLAMA = {
    **SMALL,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
GPT2 = {**SMALL, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 64}
NEOX = {**SMALL, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
T5 = {**SMALL, "d_model": 24, "d_kv": 6, "d_ff": 40, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4, "decoder_start_token_id": PADDING}

ARCHITECTURES: dict[str, Architecture] = {
    "gpt2": Architecture("GPT2LMHeadModel", "GPT2Config", GPT2),
    "gpt2 untied": Architecture("GPT2LMHeadModel", "GPT2Config", {**GPT2, "tie_word_embeddings": False}),
    "gpt-neox": Architecture("GPTNeoXForCausalLM", "GPTNeoXConfig", NEOX),
    "llama": Architecture("LlamaForCausalLM", "LlamaConfig", LLAMA),
    "llama tied": Architecture("LlamaForCausalLM", "LlamaConfig", {**LLAMA, "tie_word_embeddings": True}),
    "qwen2": Architecture("Qwen2ForCausalLM", "Qwen2Config", {**LLAMA, "tie_word_embeddings": True}),
    "qwen3": Architecture("Qwen3ForCausalLM", "Qwen3Config", {**LLAMA, "head_dim": 8, "tie_word_embeddings": True}),
    "gemma": Architecture("GemmaForCausalLM", "GemmaConfig", {**LLAMA, "head_dim": 8}),
    "gemma2": Architecture("Gemma2ForCausalLM", "Gemma2Config", {**LLAMA, "head_dim": 8, "query_pre_attn_scalar": 8}),
    "gemma3": Architecture("Gemma3ForCausalLM", "Gemma3TextConfig", {**LLAMA, "head_dim": 8, "query_pre_attn_scalar": 8}),
    "mistral": Architecture("MistralForCausalLM", "MistralConfig", LLAMA),
    "opt": Architecture("OPTForCausalLM", "OPTConfig", {**SMALL, "hidden_size": 24, "ffn_dim": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
                                                     "max_position_embeddings": 64, "word_embed_proj_dim": 16}),
    "phi": Architecture("PhiForCausalLM", "PhiConfig", {**NEOX, "hidden_size": 32, "partial_rotary_factor": 0.5}),
    "phi3": Architecture("Phi3ForCausalLM", "Phi3Config", LLAMA),
    "t5": Architecture("T5ForConditionalGeneration", "T5Config", T5),
    "t5 gated": Architecture("T5ForConditionalGeneration", "T5Config", {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "bert": Architecture("BertForSequenceClassification", "BertConfig", {**NEOX, "num_labels": 3}),
}  # fmt: skip


def build(name: str, *, attention: str = "sdpa", dropout: float = 0.0) -> Any:
    made = ARCHITECTURES[name]
    config = getattr(transformers, made.config)(**made.sizes)
    config._attn_implementation = "eager" if name == "gemma2" else attention  # gemma2 has no other
    for key in vars(config):
        if "dropout" in key or "pdrop" in key:
            setattr(config, key, dropout)
    model = getattr(transformers, made.model)(config)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, mean=float(parameter.detach().mean()), std=0.2)  # biases and scales at their initial value hide mistakes
    return model.train()


def texts(rows: int, length: int, *, side: str = "right") -> Batch:
    """Token ids with padding on one side, and labels that ignore it and one token more."""
    ids = torch.randint(3, VOCABULARY, (rows, length))
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, length - row :] = 0
    mask = mask if side == "right" else mask.flip(1)
    labels = ids.masked_fill(mask == 0, IGNORED)
    labels[:, 2] = IGNORED
    return {"input_ids": ids.masked_fill(mask == 0, PADDING), "attention_mask": mask, "labels": labels}


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(logits.float() if logits.dtype == torch.bfloat16 else logits, labels, ignore_index=IGNORED, reduction="none")


def causal_loss(model: Any, batch: Batch) -> Tensor:
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    return token_losses(logits[:, :-1].mT, batch["labels"][:, 1:]).sum(1)


def sequence_loss(model: Any, batch: Batch) -> Tensor:
    decoder = batch["labels"][:, :7].clamp(min=PADDING)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], decoder_input_ids=decoder, use_cache=False).logits
    return token_losses(logits[:, :-1].mT, batch["labels"][:, 1:7]).sum(1)


def class_loss(model: Any, batch: Batch) -> Tensor:
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return token_losses(logits, batch["input_ids"][:, 0] % 3)


def loss_of(name: str) -> Callable[[Any, Batch], Tensor]:
    return sequence_loss if name.startswith("t5") else class_loss if name == "bert" else causal_loss


def unit_gradients(model: nn.Module, loss_fn: Callable[[Any, Any], Tensor], batch: Batch, units: Sequence[int]) -> Iterator[dict[str, Tensor]]:
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for unit in sorted(set(units)):
        rows = [row for row, owner in enumerate(units) if owner == unit]
        loss = loss_fn(model, {key: value[rows] for key, value in batch.items()}).sum()
        grads = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
        yield {name: grad.double() for name, grad in zip(trained, grads, strict=True) if grad is not None}


def norm_of(gradients: Any) -> float:
    return math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients.values()))


def error(model: nn.Module, loss_fn: Callable[[Any, Any], Tensor], batch: Batch, units: Sequence[int], clip_norm: float) -> float:
    """Norm of the difference to the oracle relative to the oracle's norm."""
    expected: dict[str, Tensor] = {}
    for gradients in unit_gradients(model, loss_fn, batch, units):
        weight = min(1.0, clip_norm / norm_of(gradients))
        for name, gradient in gradients.items():
            expected[name] = expected.get(name, 0) + weight * gradient
    found = clipped_sum(model, loss_fn, batch, units, clip_norm=clip_norm).gradients
    return norm_of({name: found[name].double() - expected.get(name, 0) for name in found}) / norm_of(expected)


def without_rule(model: nn.Module, loss_fn: Callable[[Any, Any], Tensor], batch: Batch, units: Sequence[int]) -> set[str]:
    """Names of the parameters that fall back to one backward pass a unit."""
    layout = clipping._Layout.of(units, None, torch.device("cpu"))
    with clipping._Recorder(model, clipping._trained(model), layout) as recorder:
        losses = loss_fn(model, batch)
        recorder.stop()
        return set(recorder.without_rule(losses))


@pytest.fixture
def _float64_throughout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma's norms compute in float32 whatever the model's dtype; here they do not."""
    narrow = Tensor.float
    monkeypatch.setattr(Tensor, "float", lambda x, *args, **kwargs: x if x.dtype is torch.float64 else narrow(x, *args, **kwargs))


@pytest.mark.usefixtures("_float64_throughout")
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_oracle_float64(name: str) -> None:
    model, batch = build(name).double(), texts(5, 9)
    assert error(model, loss_of(name), batch, UNITS, 0.5) < 1e-9
    left_over = without_rule(model, loss_of(name), batch, UNITS)
    assert all("relative_attention_bias" in name for name in left_over)  # T5's has no batch dimension: one backward pass a unit


@pytest.mark.slow
@pytest.mark.usefixtures("_float64_throughout")
@pytest.mark.parametrize(
    ("attention", "side"), [("sdpa", "left"), ("eager", "right")]
)  # eager softmax is float32: a float64 row that is all mask is NaN in it
@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in ("bert", "gemma2")])
def test_oracle_attention_padding_and_longer_rows(name: str, attention: str, side: str) -> None:
    model = build(name, attention=attention).double()
    assert error(model, loss_of(name), texts(5, 40, side=side), UNITS, 0.5) < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_oracle_float32(name: str) -> None:
    assert error(build(name), loss_of(name), texts(5, 9), UNITS, 0.5) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_bound_bfloat16(name: str) -> None:
    model = build(name).to(torch.bfloat16)
    found = clipped_sum(model, loss_of(name), {key: value[:2] for key, value in texts(5, 9).items()}, [0, 0], clip_norm=1e-2)
    assert 0.0099 < norm_of(found.gradients) <= 1e-2


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_of_either_kind_changes_nothing(reentrant: bool) -> None:
    model, batch = build("llama tied", dropout=0.2).double(), texts(5, 9)
    torch.manual_seed(3)
    plain = clipped_sum(model, causal_loss, batch, UNITS, clip_norm=0.5).gradients
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    torch.manual_seed(3)
    replayed = clipped_sum(model, causal_loss, batch, UNITS, clip_norm=0.5).gradients
    assert norm_of({name: plain[name] - replayed[name] for name in plain}) < 1e-9 * norm_of(plain)


def test_embedded_inputs_need_no_ids() -> None:
    def loss(model: Any, batch: Batch) -> Tensor:
        logits = model(inputs_embeds=batch["embedded"], attention_mask=batch["attention_mask"], use_cache=False).logits
        return token_losses(logits[:, :-1].mT, batch["labels"][:, 1:]).sum(1)

    model, batch = build("llama").double(), texts(5, 9)
    batch["embedded"] = torch.randn(5, 9, 24, dtype=torch.float64)
    assert error(model, loss, batch, UNITS, 0.5) < 1e-9


def test_bound_under_autocast() -> None:
    def loss(model: Any, batch: Batch) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return causal_loss(model, batch)

    model, batch = build("llama tied"), {key: value[:1] for key, value in texts(5, 30).items()}
    found = clipped_sum(model, loss, batch, [0], clip_norm=1e-2)
    assert 0.0099 < norm_of(found.gradients) <= 1e-2
    assert error(model, loss, batch, [0], 1e-2) < 0.05


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_model_gives_the_same_sum() -> None:
    model, batch = build("llama tied"), texts(5, 9)
    plain = clipped_sum(model, causal_loss, batch, UNITS, clip_norm=0.5).gradients
    compiled: Any = torch.compile(model, backend="eager")
    compiled(input_ids=batch["input_ids"], use_cache=False)
    found = clipped_sum(compiled, causal_loss, batch, UNITS, clip_norm=0.5).gradients
    assert norm_of({name: gradient - found[f"_orig_mod.{name}"] for name, gradient in plain.items()}) < 1e-5 * norm_of(plain)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_adapters_on_tied_layers() -> None:
    config = LoraConfig(r=3, target_modules=["embed_tokens", "lm_head", "q_proj"], lora_dropout=0.0)
    model = get_peft_model(build("llama tied"), config).double()
    for name, parameter in model.named_parameters():
        if "lora" in name:
            nn.init.normal_(parameter, std=0.2)
    assert error(model, causal_loss, texts(5, 9), UNITS, 0.5) < 1e-9


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.usefixtures("_float64_throughout")
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_oracle_of_adapters(name: str) -> None:
    model = get_peft_model(build(name), LoraConfig(r=3, target_modules="all-linear", lora_dropout=0.0)).double()
    for parameter_name, parameter in model.named_parameters():
        if "lora" in parameter_name:
            nn.init.normal_(parameter, std=0.2)
    assert error(model, loss_of(name), texts(5, 9), UNITS, 0.5) < 1e-9
    assert not without_rule(model, loss_of(name), texts(5, 9), UNITS)


@pytest.mark.parametrize("length", [1, 9, 40, 70])
@pytest.mark.parametrize("forms", [True, False])
@pytest.mark.parametrize("name", ["gpt2", "llama tied"])
def test_oracle_whichever_way_norms_are_taken(monkeypatch: pytest.MonkeyPatch, name: str, forms: bool, length: int) -> None:
    """Gram matrices in one strip and in several, of layers with an input of their own and of query, key and value that share one; or kept gradients."""
    monkeypatch.setattr(rules, "_forming_is_cheaper", lambda _: forms)
    model, batch = build(name).double(), texts(3, length + 2)
    assert error(model, causal_loss, batch, [4, 2, 4], 0.5) < 1e-9


def test_layers_that_share_an_input_are_not_mistaken_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted defect: inputs that only look alike are taken for one."""
    monkeypatch.setattr(rules, "_forming_is_cheaper", lambda _: False)
    monkeypatch.setattr(rules, "_identity", lambda x: tuple(x.shape))
    assert error(build("llama tied").double(), causal_loss, texts(3, 12), [0, 1, 2], 0.5) > 1e-6


def test_large_batches_of_adapters_are_packed_or_not_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    model = get_peft_model(build("llama"), LoraConfig(r=3, target_modules="all-linear", lora_dropout=0.0)).double()
    for packed in (0, 1 << 20):
        monkeypatch.setattr(rules, "_PACKED", packed)
        assert error(model, causal_loss, texts(5, 9), UNITS, 0.05) < 1e-9
