"""Several streams side by side: redrawn as they grow on a terminal, else a line for each at its end."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

import click


class Screen:
    """A line for each stream."""

    NAME = 10
    """Width of names."""

    def __init__(self, names: Sequence[str]) -> None:
        self.texts = dict.fromkeys(names, "")
        self.pieces = 0
        self.changes = 0
        """Pieces that came from another stream than the one before."""
        self.longest_pause = 0.0
        """Seconds between two pieces of a stream."""
        self._times: dict[str, float] = {}
        self._last = ""
        self._redraws = sys.stdout.isatty()
        if self._redraws:
            self._draw()

    @property
    def all_begun(self) -> bool:
        """Whether every stream has said something."""
        return all(self.texts.values())

    def add(self, name: str, piece: str) -> None:
        """Adds a piece to a stream's text."""
        self.texts[name] += piece
        self.pieces += 1
        self.changes += self._last not in ("", name)
        self._last = name
        now = time.monotonic()
        self.longest_pause = max(self.longest_pause, now - self._times.get(name, now))
        self._times[name] = now
        if self._redraws:
            click.echo(f"\x1b[{len(self.texts)}F", nl=False)
            self._draw()

    def end(self, name: str) -> None:
        """Says that a stream's text is whole."""
        if not self._redraws:
            click.echo(self._line(name))

    def _draw(self) -> None:
        for name in self.texts:
            click.echo(f"\x1b[2K{self._line(name)}")

    def _line(self, name: str) -> str:
        return f"  {name:<{self.NAME}} {self.texts[name]}"
