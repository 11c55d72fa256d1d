"""Progress in the log, where standard error is no terminal."""

from __future__ import annotations

import logging
import threading
import time

log = logging.getLogger(__name__)

PAUSE = 10.0
"""Seconds between two lines of a stage."""


class ProgressLog:
    """Logs a line when a stage begins, and one every some seconds while it goes on. Thread-safe."""

    def __init__(self, pause: float = PAUSE) -> None:
        self._lock = threading.Lock()
        self._pause = pause
        self._stage = ""
        self._next = 0.0

    def __call__(self, stage: str, done: int, total: int) -> None:
        """As `Progress`."""
        with self._lock:
            if stage == self._stage and (time.monotonic() < self._next or not total):
                return
            self._stage, self._next = stage, time.monotonic() + self._pause
        if total:
            log.info("%s: %s", stage, _amounts(done, total) if stage == "download" else f"{done} of {total}")
        else:
            log.info("%s", stage)


def _amounts(done: int, total: int) -> str:
    return f"{done / 1e6:.1f} of {total / 1e6:.1f} MB"
