"""Discreet: takes sensitive text to a language model that keeps it to itself, and proves it. Names load when they are first used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from discreet.deid import policy

    detect = policy.find
    redact = policy.redact

__version__ = "0.1.0"

_HOMES = {
    "detect": "discreet.deid.policy:find",
    "redact": "discreet.deid.policy:redact",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'discreet' has no attribute {name!r}")
    from importlib import import_module

    home, _, called = _HOMES[name].partition(":")
    return getattr(import_module(home), called)
