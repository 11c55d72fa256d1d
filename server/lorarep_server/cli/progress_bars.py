"""Progress bars of the command line, on standard error."""

from __future__ import annotations

import sys
import threading
from typing import Any

import click
from tqdm import tqdm


class ProgressBars:
    """Shows a bar for each stage that can be counted, if standard error is a terminal. Thread-safe.

    Args:
        lines: whether each stage that has no bar is shown as a line.
    """

    def __init__(self, *, lines: bool = False) -> None:
        self._lock = threading.Lock()
        self._lines = lines
        self._stage = ""
        self._bar: tqdm[Any] | None = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Reports that `done` of `total` units of a stage are done. Without a total there is no bar."""
        with self._lock:
            if stage != self._stage:
                self._end()
                self._stage = stage
                if self._lines and not (total and sys.stderr.isatty()):
                    click.echo(stage, err=True)
            if not total:
                return
            if self._bar is None:
                self._bar = tqdm(desc=stage, total=total, unit_scale=True, disable=None)
            self._bar.total = total
            self._bar.update(done - self._bar.n)
            if done >= total:
                self._end()

    def end(self) -> None:
        """Reports that the last stage is done."""
        with self._lock:
            self._end()

    def _end(self) -> None:
        if self._bar is not None:
            self._bar.update((self._bar.total or 0) - self._bar.n)
            self._bar.close()
            self._bar = None
