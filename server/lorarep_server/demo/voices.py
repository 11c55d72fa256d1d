"""What the demo's models say: the base repeats a line, and each adapter says it in its own way."""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

MODELS = Path(__file__).parent / "models"
"""The trained base and adapters, a folder each, as `train` makes them."""
BASE = "base"

_NEXT = str.maketrans(string.ascii_lowercase, string.ascii_lowercase[1:] + "a")


@dataclass(frozen=True)
class Voice:
    """An adapter and what it has learned."""

    says: Callable[[str], str]
    """The answer to a line of small letters."""
    layer_replication: list[tuple[int, int]] | None
    """Ranges of layers, as in adapter_config.json."""
    dora: bool


VOICES: Mapping[str, Voice] = {
    "shout": Voice(str.upper, [(0, 3), (1, 4)], dora=False),
    "title": Voice(str.title, [(0, 2), (0, 4)], dora=True),
    "cipher": Voice(lambda line: line.translate(_NEXT), None, dora=False),
    "spell": Voice("-".join, [(0, 4), (2, 4)], dora=True),
}


def answer(voice: str, line: str) -> str:
    """What the base or an adapter has to answer to a line; a prompt is the line and a line feed."""
    return line if voice == BASE else VOICES[voice].says(line)
