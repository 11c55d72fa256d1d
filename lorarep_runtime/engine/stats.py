"""Numbers of the engine that others read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Stats:
    """A snapshot of what the engine does and has done."""

    running: int
    waiting: int
    running_adapters: tuple[str, ...]
    waiting_adapters: tuple[str, ...]
    pages_used: int
    pages_total: int
    steps: int
    step_rows: Mapping[int, int]
    """How many steps had so many sequences."""
    step_adapters: Mapping[int, int]
    """How many steps had so many distinct adapters."""
    preemptions: int
    tokens_in: int
    """Prompt tokens of finished requests and of those under way."""
    tokens_out: int
