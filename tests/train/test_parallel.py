"""Two processes over gloo against one, on the CPU."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest
import torch

from discreet.train import parallel
from discreet.train.parallel import ALONE, Ranks

_WORKER = """
import os, sys, torch, torch.distributed as dist
from torch import nn
from discreet.dp import adaptive, clipping, noise
from discreet.dp.clipping import ClippedSum, clipped_sum
from discreet.keys import Key
from discreet.train import parallel

key, sigma = Key(bytes(range(32))), float(sys.argv[1])
documents = torch.linspace(-1, 1, 42).view(7, 6).sin()
scale = torch.linspace(-1, 1, 24)


def model():
    made = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.linspace(-0.5, 0.5, p.numel()).view(p.shape))
    return made


def partial(made, chosen):
    total = ClippedSum.zero(made, clip_norm=0.3)
    for i in chosen:
        total = total + clipped_sum(made, lambda m, x: m(x).square().sum(1), documents[i:i + 1], [i], clip_norm=0.3)
    return total


with parallel.joined("cpu") as ranks:
    assert ranks.size == 2
    for count in (7, 1, 0):  # one document leaves a rank without any; none leaves both
        made = model()
        mine = parallel.shares([1] * count, ranks.size)[ranks.rank]
        got = parallel.add_noise(partial(made, mine), noise_multiplier=sigma, key=key.stream("noise", 1), ranks=ranks)
        alone = noise.add(partial(made, range(count)), noise_multiplier=sigma, key=key.stream("noise", 1))
        for name, gradient in alone.gradients.items():
            torch.testing.assert_close(got.gradients[name], gradient, rtol=1e-5, atol=1e-6)
            copies = [torch.empty_like(gradient) for _ in range(2)]
            dist.all_gather(copies, got.gradients[name].contiguous())
            assert torch.equal(*copies), "replicas differ"
        how = {"quantile": 0.5, "rate": 0.2, "votes_multiplier": 1.0, "expected_batch": 7.0, "key": key.stream("noise", 1)}
        moved = parallel.next_clip_norm(partial(made, mine), **how, ranks=ranks)
        assert moved == adaptive.update(partial(made, range(count)), **how), "votes of the other rank are missing"
    ranks.wait()
print("SAME")
"""


def _on_two_ranks(script: str, *arguments: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", script, *arguments], env={**common, "RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    for process in started:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err[-2000:]
        assert "SAME" in out


@pytest.mark.parametrize("noise_multiplier", ["0.0", "1.5"])
def test_two_ranks_release_what_one_rank_releases(noise_multiplier: str) -> None:
    """Without noise the sums agree; with it the noise is drawn once, the very draw of one rank; a rank without documents stays in step (PITFALLS 3, 10)."""
    _on_two_ranks(_WORKER, noise_multiplier)


def test_shares_hold_everything_once_and_are_even() -> None:
    dealt = parallel.shares([9, 1, 4, 4, 6], 2)
    assert sorted(index for of_rank in dealt for index in of_rank) == [0, 1, 2, 3, 4]
    assert [sum([9, 1, 4, 4, 6][index] for index in of_rank) for of_rank in dealt] == [13, 11]
    assert parallel.shares([], 3) == [[], [], []]


def test_without_torchrun_a_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with parallel.joined("cpu") as ranks:
        assert ranks is ALONE
        ranks.wait()
    with pytest.raises(ValueError, match="rank=2 < size=2"):
        Ranks(rank=2, size=2)
    assert torch.distributed.is_initialized() is False
