"""Costs in Python's instructions: the same on a machine that is busy."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any


def operations(work: Callable[[], object], counts: Callable[[], object] = lambda: True) -> int:
    """Number of instructions that a call takes in this thread, whatever it calls included.

    Args:
        counts: whether an instruction is one to count.
    """
    count = 0

    def trace(frame: FrameType, event: str, _: object) -> Callable[..., Any]:
        nonlocal count
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode" and counts():
            count += 1
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return count
