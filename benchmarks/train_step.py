"""Cost of a whole private optimiser step, and how real text is laid out.

    python benchmarks/train_step.py padding --texts TEXTS.jsonl --fields dialogue,note
    python benchmarks/train_step.py step    --texts ... --fields ... [--batch 256] [--repeat 3]
    python benchmarks/train_step.py lengths --texts ... --fields ... > LENGTHS

`padding` counts padded positions beside each token, at batches of 16 and 256. `step` alternates the whole private step (layout, clipped sum, noise, optimiser, and the
epsilon so far by RDP) with the plain step on the same documents in the same micro-batches; the ratio is of process CPU time. `lengths` prints the tokens of each document, for
`dp_step.py --lengths`, which sets ours against the others on such batches.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from discreet import model as models
from discreet.config import ModelSection
from discreet.dp import noise
from discreet.dp.accounting import RdpFilter, rdp
from discreet.dp.mechanism import event_of
from discreet.keys import Key
from discreet.train.step import Rows, arranged, document_losses, laid_out, summed, tokenize, update, work

CLIP_NORM, NOISE = 0.5, 1.0
Documents = list[Tensor]


def documents_of(arguments: argparse.Namespace, base: models.Base) -> Documents:
    rows = [json.loads(line) for line in Path(arguments.texts).read_text().splitlines()]
    return tokenize(["\n".join(row[field] for field in arguments.fields.split(",")) for row in rows], base, max_tokens=arguments.max_tokens)


def batches_of(documents: Documents, size: int, count: int) -> list[Documents]:
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(0)).tolist()
    return [[documents[i] for i in (order * 9)[start : start + size]] for start in range(0, size * count, size)]


def units(documents: Documents) -> list[tuple[Tensor, ...]]:
    return [(document,) for document in documents]


def cpu_seconds(step: Callable[[], object]) -> float:
    start = time.process_time()
    step()
    return time.process_time() - start


def padding(documents: Documents, arguments: argparse.Namespace) -> dict[str, float]:
    found = {}
    for size in (16, 256):
        chosen = batches_of(documents, size, 8)
        for rows in Rows:
            done = [work(units(batch), arranged(units(batch), arguments.token_budget, rows)) for batch in chosen]
            found[f"{rows} {size}"] = round(sum(w.padding for w in done) / sum(w.tokens for w in done), 4)
        found[f"one rectangle {size}"] = round(sum(len(b) * max(map(len, b)) for b in chosen) / sum(len(d) for b in chosen for d in b) - 1, 3)
    return found


def whole_step(base: models.Base, documents: Documents, arguments: argparse.Namespace) -> dict[str, Any]:
    module = models.attach(base, section(arguments))
    optimizer = torch.optim.Adam(list(models.trained_parameters(module).values()), lr=1e-4)
    [batch] = batches_of(documents, arguments.batch, 1)
    scale, key = RdpFilter.open(epsilon=8.0, delta=1e-5), Key.random()
    one_step = rdp(event_of(sampling_probability=0.01, noise_multiplier=NOISE, steps=1), scale.orders)

    def private(step: int) -> None:
        laid = arranged(units(batch), arguments.token_budget, Rows.PADDED)
        total = summed(module, units(batch), laid, clip_norm=CLIP_NORM, token_budget=arguments.token_budget)
        noised = noise.add(total, noise_multiplier=NOISE, key=key.stream("noise", step))
        update(module, optimizer, noised.gradients, divisor=len(batch))
        scale.epsilon_of(one_step * step)

    def plain() -> None:
        for rows in arranged(units(batch), arguments.token_budget, Rows.PADDED):
            losses = document_losses(module, laid_out([[batch[unit] for unit, _ in row] for row in rows]))
            (losses.sum() / len(batch)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    private(0)  # the probes of the first call
    pairs = [(cpu_seconds(plain), cpu_seconds(lambda n=n: private(n + 1))) for n in range(arguments.repeat)]
    plain_s, private_s = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratios = sorted(private / plain for plain, private in pairs)
    return {
        "documents": len(batch),
        "plain_s": round(plain_s, 2),
        "private_s": round(private_s, 2),
        "ratio": round(statistics.median(ratios), 3),
        "all": [round(r, 3) for r in ratios],
    }


def section(arguments: argparse.Namespace) -> ModelSection:
    return ModelSection(train=(arguments.train,), lora_rank=8, max_tokens=arguments.max_tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["padding", "step", "lengths"])
    parser.add_argument("--texts", required=True)
    parser.add_argument("--fields", required=True)
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "discreet" / "models")
    parser.add_argument("--train", default="lora")
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--token-budget", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--repeat", type=int, default=3)
    arguments = parser.parse_args()
    base = models.load_base(models.SMOLLM2, cache=arguments.cache)
    documents = documents_of(arguments, base)
    if arguments.what == "lengths":
        print("\n".join(str(len(document)) for document in documents))
        return
    found: dict[str, Any] = padding(documents, arguments) if arguments.what == "padding" else whole_step(base, documents, arguments)
    print(json.dumps({"what": arguments.what, "train": arguments.train, "texts": Path(arguments.texts).parent.name, **found}), flush=True)


if __name__ == "__main__":
    main()
