"""Discreet: takes sensitive text to a language model that keeps it to itself, and proves it."""

from __future__ import annotations

__version__ = "0.1.0"
