"""Discreet: takes sensitive text to a language model that keeps it to itself, and proves it. Names load when they are first used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from discreet.deid.detect import detect as detect
    from discreet.deid.policy import redact as redact

__version__ = "0.1.0"

_HOMES = {
    "detect": "discreet.deid.detect",
    "redact": "discreet.deid.policy",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'discreet' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
