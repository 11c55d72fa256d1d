"""The process that compares a base's family with `transformers`, within limits of time and memory."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

from lorarep_runtime.device.process import end_with_parent, limit_memory
from lorarep_runtime.failpoints import failpoint


def compare() -> None:
    """Reads a line that says which base, in which time and memory, and writes one that says why it is refused."""
    folder, whole_seconds, seconds, most_bytes = json.loads(sys.stdin.readline())
    signal.setitimer(signal.ITIMER_REAL, whole_seconds)  # its signal ends the process
    answers, sys.stdout = sys.stdout, sys.stderr  # where a family's code may print
    end_with_parent()
    failpoint("compare")
    # Only now: they take seconds.
    from lorarep_runtime.model.family_comparison import refusal
    from lorarep_runtime.model.model_config import read_model_config
    from lorarep_runtime.model.transformers_attention import register_attention

    register_attention()
    limit_comparison(seconds, most_bytes)
    answers.write(json.dumps(refusal(read_model_config(Path(folder)))) + "\n")
    answers.flush()
    os._exit(0)


def limit_comparison(seconds: float, most_bytes: int) -> None:
    """Limits what this process still does: its processor time, at whose end a signal ends it, and its memory."""
    limit_memory(most_bytes)
    signal.setitimer(signal.ITIMER_PROF, seconds)
