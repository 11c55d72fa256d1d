"""Shows concurrent streams: redrawn as they grow on a terminal, otherwise a line for each finished stream."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

import click


class Screen:
    """The texts of concurrent streams, a line each, and statistics of their pieces."""

    NAME = 10
    """Characters of the column of names."""

    def __init__(self, names: Sequence[str]) -> None:
        self.texts = dict.fromkeys(names, "")
        """The text of each stream so far, by name."""
        self.pieces = 0
        """Pieces so far."""
        self.changes = 0
        """Pieces that came from another stream than the piece before."""
        self.longest_pause = 0.0
        """Longest time between two pieces of a stream, in seconds."""
        self._times: dict[str, float] = {}
        self._last = ""
        self._redraws = sys.stdout.isatty()
        if self._redraws:
            self._draw()

    @property
    def all_begun(self) -> bool:
        """Whether every stream has some text."""
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
        """Shows a finished stream where lines are not redrawn."""
        if not self._redraws:
            click.echo(self._line(name))

    def _draw(self) -> None:
        for name in self.texts:
            click.echo(f"\x1b[2K{self._line(name)}")

    def _line(self, name: str) -> str:
        return f"  {name:<{self.NAME}} {self.texts[name]}"
