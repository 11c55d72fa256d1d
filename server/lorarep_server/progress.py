"""Progress bars of the command line."""

from __future__ import annotations

import threading
from typing import Any

from tqdm import tqdm


class ProgressBars:
    """A bar for each stage that reports. Thread-safe; shows nothing where standard error is no terminal."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._bars: dict[str, tqdm[Any]] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Says that `done` of `total` units of a stage are done."""
        with self._lock:
            bar = self._bars.get(stage)
            if bar is None:
                bar = self._bars[stage] = tqdm(desc=stage, total=total, unit_scale=True, disable=None)
            bar.total = total
            bar.update(done - bar.n)
            if done >= total:
                bar.close()
                del self._bars[stage]
