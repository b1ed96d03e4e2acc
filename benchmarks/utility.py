"""What privacy costs in text: BLEU of restaurant descriptions (E2E) by a private model, the same model without privacy, and the base untouched.

    pip install sacrebleu==2.5.1
    python benchmarks/utility.py DATA [--model smollm2-135m-instruct] [--epsilons 3 8] [--train lora all] [--steps 200] [--batch 512] [--prompts 630] [--device cuda]
    python benchmarks/utility.py DATA --small          one adapter at epsilon 8, few steps and prompts: for a CPU

DATA holds `dev.jsonl` (trained on: the large training file is not at hand) and `test.jsonl`, lines of `mr` and `ref`; meaning representations of the two are disjoint. One epsilon
protects one record (a meaning and one description of it); sampling is true Poisson by the plan's own draw, and every private arm runs by the step that training runs by.
The non-private arm takes as many steps of as many records in random order. Answers are greedy; BLEU is sacrebleu's, against all references of a meaning.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import sacrebleu
import torch
from torch import nn

from discreet import model as models
from discreet.config import ModelSection, TrainSection
from discreet.dp import csprng
from discreet.dp.mechanism import Plan, calibrate
from discreet.keys import Key, Stream
from discreet.model import Base, trained_parameters
from discreet.record import Sensitive
from discreet.train import optimizers, parallel
from discreet.train.course import Course
from discreet.train.parallel import ALONE
from discreet.train.step import PrivateCorpus, Rows, public_step, tokenize

ARROW = "\nDescription:"
LONGEST, ANSWER = 128, 64
RATES = {"lora": 2e-3, "lora_B": 1e-2, "all": 2e-4}


def rows_of(path: Path, limit: int) -> list[dict[str, str]]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return rows[:limit] if limit else rows


def private(base: Base, section: ModelSection, texts: list[str], plan: Plan, *, rate: float, budget: int, device: str) -> nn.Module:
    module = models.attach(base, section).to(device)
    documents = tokenize(texts, base, max_tokens=LONGEST)
    corpus = PrivateCorpus(units=Sensitive(tuple((each,) for each in documents)), names=tuple(f"record-{number:06d}" for number in range(len(texts))))
    optimizer = optimizers.make(trained_parameters(module).values(), TrainSection(learning_rate=rate), noise_std=plan.noise_std_of_mean)
    key, course, rows = Key.random(), Course.of(plan), Rows.PACKED if device == "cuda" else Rows.PADDED
    for step in range(1, plan.steps + 1):
        parallel.private_step(module, optimizer, corpus, plan, run_key=key, step=step, token_budget=budget, rows=rows, ranks=ALONE, course=course)
    return module


def without_privacy(
    base: Base, section: ModelSection, texts: list[str], *, steps: int, batch: int, rate: float, budget: int, device: str
) -> nn.Module:
    module = models.attach(base, section).to(device)
    documents = tokenize(texts, base, max_tokens=LONGEST)
    optimizer = optimizers.make(trained_parameters(module).values(), TrainSection(learning_rate=rate), noise_std=0.0)
    for step in range(steps):
        order = csprng.uniform(Stream(bytes(32)).fork(step), len(documents)).argsort()[:batch].tolist()
        public_step(module, optimizer, [documents[place] for place in order], token_budget=budget)
    return module


@torch.no_grad()
def answers(module: nn.Module, base: Base, prompts: list[str], *, device: str, batch: int = 32) -> list[str]:
    """Greedy continuations up to a line's end, prompts padded on the left."""
    module, end, said = module.to(device).eval(), base.tokenizer.eos_token_id, []
    for first in range(0, len(prompts), batch):
        ids = [base.tokenizer(prompt)["input_ids"] for prompt in prompts[first : first + batch]]
        width = max(map(len, ids))
        tokens = torch.tensor([[end] * (width - len(row)) + row for row in ids], device=device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids], device=device)
        state, written, step = None, [], tokens
        for _ in range(ANSWER):
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -step.shape[1] :]
            found = module(input_ids=step, attention_mask=mask, position_ids=positions, past_key_values=state, use_cache=True)
            state, step = found.past_key_values, found.logits[:, -1:].argmax(-1)
            written.append(step)
            mask = torch.cat([mask, torch.ones_like(step)], 1)
        said += [base.tokenizer.decode(row[: row.index(end)] if end in row else row).strip().split("\n")[0] for row in torch.cat(written, 1).tolist()]
    return said


def bleu(module: nn.Module, base: Base, references: dict[str, list[str]], *, device: str) -> float:
    found = answers(module, base, [f"{meaning}{ARROW}" for meaning in references], device=device)
    most = max(map(len, references.values()))
    streams = [[refs[number] if number < len(refs) else None for refs in references.values()] for number in range(most)]
    return round(sacrebleu.corpus_bleu(found, streams).score, 2)


def arms(options: argparse.Namespace) -> list[dict[str, Any]]:
    rows = rows_of(options.data / "dev.jsonl", options.records)
    references: dict[str, list[str]] = defaultdict(list)
    for row in rows_of(options.data / "test.jsonl", 0):
        if row["mr"] in references or len(references) < options.prompts:
            references[row["mr"]].append(row["ref"])
    texts = [f"{row['mr']}{ARROW} {row['ref']}" for row in rows]
    base = models.load_base(options.model, cache=options.cache)
    where = {"budget": options.token_budget, "device": options.device}
    found = [{"train": "-", "epsilon": None, "arm": "zero-shot", "bleu": bleu(base.module, base, references, device=options.device)}]
    for kind in options.train:
        few = kind == "lora_B"  # as the demo trains: of few trained numbers less is noise
        targets = ("q_proj", "v_proj") if few else ("q_proj", "k_proj", "v_proj", "o_proj")
        section = ModelSection(train=(kind,), max_tokens=LONGEST, lora_rank=4 if few else 8, lora_alpha=16.0, lora_targets=targets)
        rate = options.rate or RATES[kind]
        for epsilon in (None, *options.epsilons):
            began = time.monotonic()
            common: dict[str, Any] = {"train": kind, "epsilon": epsilon, "rate": rate}
            if epsilon is None:
                module = without_privacy(base, section, texts, steps=options.steps, batch=options.batch, rate=rate, **where)
                common["arm"] = "non-private"
            else:
                delta = 1 / (2 * len(texts))
                plan = calibrate(
                    epsilon=epsilon, delta=delta, population=len(texts), expected_batch=options.batch, steps=options.steps, clip_norm=options.clip
                )
                module = private(base, section, texts, plan, rate=rate, **where)
                common |= {
                    "arm": "private",
                    "noise_multiplier": round(plan.noise_multiplier, 4),
                    "delta": delta,
                    "epsilon_pld": round(plan.guarantee.epsilon, 4),
                }
            found.append(common | {"bleu": bleu(module, base, references, device=options.device), "seconds": round(time.monotonic() - began)})
            print(json.dumps(found[-1]), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--epsilons", type=float, nargs="+", default=[3.0, 8.0])
    parser.add_argument("--train", nargs="+", default=["lora", "all"], choices=["lora", "lora_B", "all"])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--records", type=int, default=0, help="records trained on; 0: all")
    parser.add_argument("--prompts", type=int, default=630)
    parser.add_argument("--clip", type=float, default=0.5)
    parser.add_argument("--rate", type=float, default=0.0, help="0: 2e-3 for adapters, 1e-2 for their B alone, 2e-4 for all weights")
    parser.add_argument("--token-budget", type=int, default=2048)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "discreet" / "models")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "utility.json")
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    if options.small:
        options.epsilons, options.train, options.steps, options.batch, options.prompts = [8.0], ["lora"], 10, 48, 30
    found = arms(options)
    said = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items() if name not in ("data", "cache", "out")}
    options.out.write_text(json.dumps({"options": said, "arms": found}, indent=1) + "\n")
    for each in found:
        print(f"{each['arm']:<12} {each['train']:<5} epsilon {each['epsilon'] or '-':<4} BLEU {each['bleu']:6.2f}")


if __name__ == "__main__":
    main()
