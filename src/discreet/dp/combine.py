"""How the documents of one privacy unit become one gradient: a name that plans, prices and clipping share, apart from them because prices need no torch.

Either choice has the same sensitivity, because clipping comes after it. The sum lets people with much text say more until the clip bounds them; the mean gives everybody
the same length before it. Source: user-level clipping in Charles et al. 2024, arXiv 2407.07737. Does not cover: weights of documents.
"""

from __future__ import annotations

from enum import StrEnum
from typing import final


@final
class Combine(StrEnum):
    """What the gradient of a unit with several documents is, before it is clipped."""

    SUM = "sum"
    """The sum over its documents."""

    MEAN = "mean"
    """The mean over its documents."""
