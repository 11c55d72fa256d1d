"""The answers of the demo's models: the base repeats a line, and each adapter transforms it in its own way."""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

MODELS = Path(__file__).parent / "models"
"""The folder of the trained base and adapters, which `demo.train` makes; each has a folder of its own."""
BASE = "base"

_NEXT = str.maketrans(string.ascii_lowercase, string.ascii_lowercase[1:] + "a")


@dataclass(frozen=True)
class Voice:
    """An adapter of the demo, and the transformation that it has learned."""

    says: Callable[[str], str]
    """Gives the answer to a line of lower-case letters."""
    layer_replication: list[tuple[int, int]] | None
    """Ranges of layers, as in adapter_config.json; None is the base's own stack."""
    dora: bool
    """Whether the adapter is a DoRA."""


VOICES: Mapping[str, Voice] = {
    "shout": Voice(str.upper, [(0, 3), (1, 4)], dora=False),
    "title": Voice(str.title, [(0, 2), (0, 4)], dora=True),
    "cipher": Voice(lambda line: line.translate(_NEXT), None, dora=False),
    "spell": Voice("-".join, [(0, 4), (2, 4)], dora=True),
}


def answer(voice: str, line: str) -> str:
    """The right answer of the base or an adapter to a line. The prompt is the line and a line feed."""
    return line if voice == BASE else VOICES[voice].says(line)
