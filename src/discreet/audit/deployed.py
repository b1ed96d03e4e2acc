"""The model as it will be deployed: merged into one set of weights, rounded to what its file holds, and audited again.

A child of a private model costs nothing more (post-processing), so a correct one cannot beat the curve; what is found here is a child of another model, an adapter merged twice, or
one that rounding swallowed: its scores do not go with its parent's any more, and nothing was audited (INCONCLUSIVE). Nor was anything where a leak could not have been seen.

| kind | weights |
|---|---|
| bfloat16 | every weight with 8 bits of significand |
| q8_0, q4_0 | GGUF's blocks of 32 in rows of matrices, by the `gguf` package: what a file of that type gives back; vectors stay as they are |

Arithmetic stays in float32, so that a score differs by the rounding of the weights alone.

A child in a file of its own, whoever made it and of whatever kind, is read by `model.read_child` and tested the same (`discreet child`).

Does not cover: rounded activations; descent. Likeness is necessary, not sufficient: where a text's template moves scores, those of an unrelated model may rise with the parent's too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy import stats
from torch import Tensor, nn

from discreet import model
from discreet.audit.bounds import MAX_EFFECT, Layer, TradeOff, Verdict, curve_test
from discreet.errors import missing_extra

KINDS = ("bfloat16", "q8_0", "q4_0")

_BLOCK = 32
_UNLIKE = 1e-3
"""Probability that scores of an unrelated model rise with the parent's as those of a child do."""


def children(module: nn.Module, kinds: Sequence[str]) -> Iterator[tuple[str, nn.Module]]:
    """Yields each kind with a merged and rounded copy of the module, one at a time.

    Args:
        kinds: of `KINDS`.

    Raises:
        ValueError: when a kind is not known.
        MissingExtra: when `gguf` is not installed.
    """
    unknown = sorted(set(kinds) - set(KINDS))
    if unknown:
        raise ValueError(f"Expected kinds among {', '.join(KINDS)}, got {', '.join(unknown)}.")
    for kind in kinds:
        yield kind, rounded(model.merged(module), kind)


def rounded(module: nn.Module, kind: str) -> nn.Module:
    """Rounds the weights of a module in place and returns it."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(_as_stored(parameter, kind))
    return module


def _as_stored(weight: Tensor, kind: str) -> Tensor:
    if kind == "bfloat16":
        return weight.bfloat16().to(weight.dtype)
    if weight.dim() != 2 or weight.shape[1] % _BLOCK:
        return weight
    try:
        import gguf
    except ImportError as error:
        raise missing_extra("train", "gguf") from error
    stored = gguf.GGMLQuantizationType[kind.upper()]
    values = gguf.quants.dequantize(gguf.quants.quantize(weight.detach().float().cpu().numpy(), stored), stored)
    return torch.from_numpy(values).to(weight)


def layer(kind: str, scores: ArrayLike, parent: ArrayLike, included: ArrayLike, *, trade_off: TradeOff, fpr: float, level: float) -> Layer:
    """Tests a child's canaries against the curve: FAIL when it is beaten, INCONCLUSIVE when its scores do not rise with its parent's or twice the claim could not be seen, else PASS.

    Args:
        scores, included, trade_off, fpr, level: as `bounds.curve_test`.
        parent: [m] float, scores of the model that it is said to be made of.
    """
    found = curve_test(scores, included, trade_off=trade_off, fpr=fpr, level=level)
    child_M, parent_M = np.asarray(scores, dtype=np.float64), np.asarray(parent, dtype=np.float64)
    spread = np.ptp(child_M) > 0 and np.ptp(parent_M) > 0
    likeness, unlike_p = stats.spearmanr(child_M, parent_M, alternative="greater") if spread else (0.0, 1.0)
    alike = bool(unlike_p < _UNLIKE)
    shown = alike and found.detectable <= MAX_EFFECT * found.claimed
    verdict = Verdict.FAIL if found.rejected else Verdict.PASS if shown else Verdict.INCONCLUSIVE
    return Layer(name=f"deployed: {kind}", verdict=verdict, figures={**found.figures(), "likeness": float(likeness), "alike": alike})
