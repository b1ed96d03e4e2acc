"""Cost of exact per-unit clipping: CPU time of `clipped_sum` over CPU time of the plain gradient of the same batch.

    python benchmarks/dp_step.py [--layers 30] [--repeat 7]

The model has the shape of SmolLM2-135M with random weights (speed does not depend on them), so nothing is downloaded. Private and plain steps alternate; the figure
is the ratio of medians of process CPU time, which a busy machine disturbs less than the clock. `probe` is the first call of a model, which checks once that no layer
mixes documents.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from discreet.dp.clipping import clipped_sum

SHAPE = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}


def language_loss(model: nn.Module, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids).logits[:, :-1]
    losses = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return losses.view(len(ids), -1).sum(1)


def adapted(model: nn.Module) -> Any:
    return get_peft_model(model, LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"]))


def cpu_seconds(step: Callable[[], object]) -> float:
    start = time.process_time()
    step()
    return time.process_time() - start


def measure(model: nn.Module, *, rows: int, length: int, documents_per_unit: int, repeat: int) -> dict[str, float]:
    ids = torch.randint(0, SHAPE["vocab_size"], (rows, length))
    units = torch.arange(rows) // documents_per_unit
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def plain() -> None:
        language_loss(model, ids).sum().backward()
        for parameter in trained:
            parameter.grad = None

    def private() -> None:
        clipped_sum(model, language_loss, ids, units, clip_norm=0.5)

    plain()
    probe = cpu_seconds(private)
    private()
    pairs = [(cpu_seconds(plain), cpu_seconds(private)) for _ in range(repeat)]
    plain_seconds, private_seconds = (statistics.median(column) for column in zip(*pairs, strict=True))
    return {
        "plain_s": round(plain_seconds, 3),
        "private_s": round(private_seconds, 3),
        "ratio": round(private_seconds / plain_seconds, 3),
        "probe_s": round(probe, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--repeat", type=int, default=7)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    for name, wrap in (("lora r=4 q,v", adapted), ("full", lambda model: model)):
        for length in (64, 256):
            for documents_per_unit in (1, 2):
                model = wrap(LlamaForCausalLM(LlamaConfig(num_hidden_layers=arguments.layers, **SHAPE))).train()
                found = measure(model, rows=arguments.rows, length=length, documents_per_unit=documents_per_unit, repeat=arguments.repeat)
                print(json.dumps({"train": name, "tokens": length, "documents_per_unit": documents_per_unit, **found}), flush=True)


if __name__ == "__main__":
    main()
