"""Cost of exact per-unit clipping: CPU time and memory of the clipped sum beside the plain gradient of the same batch, and beside other libraries.

    python benchmarks/dp_step.py CASE... [--alternations 30] [--fastdp FOLDER]
    python benchmarks/dp_step.py CASE --memory | CASE --lengths FILE | --list

All contenders (`peers.py`) take turns in one process on the same model, weights and batch; a figure is the median of the ratios of neighbours, with its 95 % interval, of
process CPU time, which a busy machine disturbs less than the clock. Weights are random (speed does not depend on them), so nothing is downloaded. `agreement` is each
contender's distance to our sum: all do the same work. Memory is the most a fresh process holds in three steps above what it held before the model was made.

Full models are a few blocks of the real width with a vocabulary cut in the same proportion, so that blocks and head keep their shares of the work.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import peers
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

CLIP_NORM = 0.5
ALL = ("plain", "ours", "opacus hooks", "opacus ghost", "fastdp")
SMOLLM2 = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}
PYTHIA = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8}  # LayerNorm and biases, untied: what every contender knows


class Case(NamedTuple):
    """A model, how it is trained, and a batch.

    Attributes:
        layers: blocks; the vocabulary of a cut model is `vocabulary`.
        lengths: tokens of each row; the batch is padded to the longest.
        names: who takes part.
    """

    family: str
    layers: int
    vocabulary: int
    rank: int | None
    lengths: tuple[int, ...]
    names: tuple[str, ...]


RAGGED = (16, 24, 40, 48, 64, 96, 128, 128)
PAIR = ("plain", "ours")
CASES = {
    "full-128": Case("pythia", 1, 2048, None, (128,) * 4, ALL),
    "full-512": Case("pythia", 1, 2048, None, (512,), ALL),
    "full-ragged": Case("pythia", 1, 2048, None, RAGGED, ALL),
    "smollm2-full-64": Case("smollm2", 2, 3277, None, (64,) * 8, PAIR),
    "smollm2-full-128": Case("smollm2", 2, 3277, None, (128,) * 4, PAIR),
    "smollm2-full-512": Case("smollm2", 2, 3277, None, (512,), PAIR),
    "lora-128": Case("smollm2", 4, 6554, 8, (128,) * 4, PAIR),
    "lora-whole-128": Case("smollm2", 30, 49152, 8, (128,) * 4, PAIR),
    "lora-128-peers": Case("smollm2", 2, 3277, 8, (128,) * 4, ALL),
}


def model_of(case: Case) -> nn.Module:
    torch.manual_seed(0)
    model: Any
    if case.family == "pythia":
        model = GPTNeoXForCausalLM(GPTNeoXConfig(num_hidden_layers=case.layers, vocab_size=case.vocabulary, max_position_embeddings=512, **PYTHIA))
    else:
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=case.layers, vocab_size=case.vocabulary, **SMOLLM2))
    if case.rank is None:
        return model.train()
    adapted = get_peft_model(model, LoraConfig(r=case.rank, lora_alpha=2 * case.rank, target_modules=["q_proj", "v_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)  # a matrix that is still zero would spare its neighbour a gradient
    return adapted.train()


def batch_of(case: Case) -> dict[str, Tensor]:
    length_B = torch.tensor(case.lengths)
    mask_BT = (torch.arange(int(length_B.max())) < length_B[:, None]).long()
    return {"input_ids": torch.randint(1, case.vocabulary, mask_BT.shape) * mask_BT, "attention_mask": mask_BT}


def language_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    ids, is_target = batch["input_ids"], batch["attention_mask"][:, 1:]
    mask = None if bool(is_target.all()) else batch["attention_mask"]
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    losses = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return (losses.view_as(is_target) * is_target).sum(1) / is_target.sum(1)


def measure(case: Case, arguments: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(1)
    batch = batch_of(case)
    runs = peers.contenders(model_of(case), language_loss, clip_norm=CLIP_NORM, names=case.names, fastdp_source=arguments.fastdp)
    agreement = peers.agreement(runs, batch)
    runs = {name: run for name, run in runs.items() if not isinstance(agreement.get(name), str)}
    peers.in_turn({name: lambda run=run: run(batch) for name, run in runs.items()}, 2)  # first calls check and warm up
    seconds = peers.in_turn({name: lambda run=run: run(batch) for name, run in runs.items()}, arguments.alternations)
    return {
        "rows": len(case.lengths),
        "tokens": sum(case.lengths),
        "agreement": agreement,
        "plain_s": round(sorted(seconds["plain"])[len(seconds["plain"]) // 2], 4),
        "over_plain": {name: peers.ratio(seconds[name], seconds["plain"]) for name in runs if name != "plain"},
        "over_ours": {name: peers.ratio(seconds[name], seconds["ours"]) for name in runs if name not in ("plain", "ours")},
    }


def ragged(case: Case, arguments: argparse.Namespace) -> dict[str, Any]:
    """Batches of 16 documents with the lengths of real text: ours in micro-batches by length, the others on padded rows; CPU time a batch over ours."""
    from discreet.train.step import Rows, arranged, laid_out

    torch.manual_seed(1)
    names = tuple(name for name in ALL if name != "plain")
    runs = peers.contenders(model_of(case), language_loss, clip_norm=CLIP_NORM, names=names, fastdp_source=arguments.fastdp)
    ours_on = runs.pop("ours")

    def ours(units: list[tuple[Tensor, ...]]) -> dict[str, Tensor]:
        total: dict[str, Tensor] = {}
        for rows in arranged(units, 2048, Rows.PADDED):
            for name, part in ours_on(laid_out([[units[unit][0] for unit, _ in row] for row in rows])).items():
                total[name] = total[name].add_(part) if name in total else part
        return total

    lengths = [min(512, max(2, int(line))) for line in arguments.lengths.read_text().split()]
    order = torch.randperm(len(lengths)).tolist()
    found: dict[str, list[float]] = {name: [] for name in (*runs, "ours")}
    tokens = padded_tokens = 0
    for start in range(0, 16 * arguments.alternations, 16):
        of_batch = [lengths[i] for i in order[start : start + 16]]
        batch = batch_of(case._replace(lengths=tuple(of_batch)))
        units = [(batch["input_ids"][row, :length],) for row, length in enumerate(of_batch)]
        steps: dict[str, Callable[[], object]] = {name: functools.partial(run, batch) for name, run in runs.items()}
        steps["ours"] = functools.partial(ours, units)
        if start == 0:
            peers.in_turn(steps, 1)
        for name, seconds in peers.in_turn(steps, 1).items():
            found[name] += seconds
        tokens, padded_tokens = tokens + sum(of_batch), padded_tokens + 16 * max(of_batch)
    return {
        "batches": arguments.alternations,
        "padded_over_real": round(padded_tokens / tokens, 2),
        "over_ours": {name: peers.ratio(found[name], found["ours"]) for name in runs},
        "ours_tokens_per_cpu_s": round(tokens / sum(found["ours"])),
    }


def memory(name: str, case: Case, arguments: argparse.Namespace) -> dict[str, float]:
    """Peak bytes of each contender, in a process of its own, over those of the plain gradient."""
    peak = {}
    for contender in case.names:
        command = [sys.executable, __file__, name, "--peak-of", contender, *(["--fastdp", str(arguments.fastdp)] if arguments.fastdp else [])]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            peak[contender] = int(done.stdout)
    return {contender: round(bytes_ / peak["plain"], 3) for contender, bytes_ in peak.items()} | {"plain_mb": peak["plain"] // 2**20}


def peak_of(contender: str, case: Case, arguments: argparse.Namespace) -> int:
    batch, before = batch_of(case), _resident()
    [run] = peers.contenders(model_of(case), language_loss, clip_norm=CLIP_NORM, names=[contender], fastdp_source=arguments.fastdp).values()
    held = None
    for _ in range(3):
        held = run(batch)
    del held
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", choices=[*CASES, []])
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--alternations", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--fastdp", type=Path, help="folder that holds fastDP/, the source of awslabs/fast-differential-privacy")
    parser.add_argument("--lengths", type=Path, help="file of document lengths in tokens: batches of 16 of them instead of the case's own")
    parser.add_argument("--memory", action="store_true", help="peak memory instead of time")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args(given)
    torch.set_num_threads(arguments.threads)
    for name in CASES if arguments.list else arguments.cases:
        if arguments.list:
            print(name, CASES[name]._asdict())
        elif arguments.peak_of:
            print(peak_of(arguments.peak_of, CASES[name], arguments))
        else:
            found = memory(name, CASES[name], arguments) if arguments.memory else (ragged if arguments.lengths else measure)(CASES[name], arguments)
            print(json.dumps({"case": name, **found}), flush=True)


if __name__ == "__main__":
    main()
