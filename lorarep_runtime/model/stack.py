"""Stacks: the sequences of base layers that models walk, and the notations that people write them in.

The indices of a stack are positions: one layer may stand at several of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from lorarep_runtime.errors import FailedPrecondition, InvalidArgument, shown

Stack = tuple[int, ...]

_SHORT_RANGE = re.compile(r"\s*(\d{1,9})\s*-\s*(\d{1,9})\s*")


def stack_from_ranges(
    ranges: Sequence[Sequence[int]], layers: int, *, max_positions: int, field: str = "layer_replication"
) -> Stack:
    """The stack of PEFT's `layer_replication`: half-open ranges of layers, one after the other.

    Args:
        ranges: pairs (start, end), 0 ≤ start < end ≤ layers. They may overlap, repeat and go back.
        layers: of the base.
        max_positions: most positions of the stack.
        field: name of the ranges in an error.

    Raises:
        InvalidArgument: before the stack is built.
    """
    if not isinstance(ranges, Sequence) or isinstance(ranges, str) or not ranges:
        raise InvalidArgument(f"{shown(ranges)} is not a list of ranges [start, end]", field=field)
    positions = 0
    for i, pair in enumerate(ranges):
        if (
            not isinstance(pair, Sequence)
            or len(pair) != 2
            or not all(isinstance(end, int) and not isinstance(end, bool) for end in pair)
        ):
            raise InvalidArgument(f"{shown(pair)} is not a range [start, end] of layers", field=f"{field}[{i}]")
        start, end = pair
        if not 0 <= start < end <= layers:
            raise InvalidArgument(
                f"[{start}, {end}] is empty or leaves the base's {layers} layers", field=f"{field}[{i}]"
            )
        positions += end - start
        if positions > max_positions:
            raise InvalidArgument(f"over the limit of {max_positions} positions", field=field)
    return tuple(layer for start, end in ranges for layer in range(start, end))


def parse_ranges(text: str) -> list[tuple[int, int]]:
    """Ranges as people type them: "[[0,24],[8,32]]" as in an adapter's config, or "0-24,8-32". Ends are exclusive.

    Raises:
        InvalidArgument: the text is neither.
    """
    if text.lstrip().startswith("["):
        try:
            return [(start, end) for start, end in json.loads(text)]
        except (ValueError, TypeError, RecursionError):
            pass
    elif all(matches := [_SHORT_RANGE.fullmatch(part) for part in text.split(",")]):
        return [(int(match[1]), int(match[2])) for match in matches if match]
    raise InvalidArgument(f"{shown(text)} is not ranges of layers such as 0-24,8-32 or [[0,24],[8,32]]")


def stack_from_mergekit(
    recipe: Mapping[str, Any], layers: int, *, max_positions: int, base: str | None = None
) -> Stack:
    """The stack of a mergekit `passthrough` recipe whose slices are all of one model.

    https://github.com/arcee-ai/mergekit: `merge_method: passthrough` and `slices`, each with one source, which has a
    `model` and a `layer_range`.

    Args:
        recipe: the YAML file's content.
        layers, max_positions: as for `stack_from_ranges`.
        base: repository that every `model` has to be; None where the base is a folder, then they only have to agree.

    Raises:
        InvalidArgument: a range is malformed, or over a limit.
        FailedPrecondition: the recipe holds anything else, which is named.
    """
    _only(recipe, "", {"merge_method", "slices"})
    if recipe.get("merge_method") != "passthrough":
        raise FailedPrecondition(f"{shown(recipe.get('merge_method'))} is not 'passthrough'", field="merge_method")
    slices = recipe.get("slices")
    if not isinstance(slices, list) or not slices:
        raise InvalidArgument(f"{shown(slices)} is not a list of slices", field="slices")
    ranges: list[Any] = []
    model = base
    for i, part in enumerate(slices):
        at = f"slices[{i}]"
        _only(part, f"{at}.", {"sources"})
        sources = part.get("sources")
        if not isinstance(sources, list) or len(sources) != 1:
            raise FailedPrecondition("passthrough over one base takes one source", field=f"{at}.sources")
        at += ".sources[0]"
        _only(sources[0], f"{at}.", {"model", "layer_range"})
        model = model or sources[0].get("model")
        if not model or sources[0].get("model") != model:
            raise FailedPrecondition(
                f"{shown(sources[0].get('model'))} is not the one base {model!r}", field=f"{at}.model"
            )
        ranges.append(sources[0].get("layer_range"))
    return stack_from_ranges(ranges, layers, max_positions=max_positions, field="layer_range")


def _only(mapping: object, at: str, known: set[str]) -> None:
    if not isinstance(mapping, Mapping):
        raise InvalidArgument(f"{shown(mapping)} is not a mapping", field=at.rstrip(".") or "recipe")
    if unknown := sorted(str(key) for key in mapping if key not in known):
        raise FailedPrecondition(f"is not part of a stack; {sorted(known)} are", field=f"{at}{unknown[0]}")


def ranges_of(stack: Sequence[int]) -> list[tuple[int, int]]:
    """The fewest ranges that a stack is made of, ends exclusive; for people to read."""
    starts = [0, *(i + 1 for i, (a, b) in enumerate(pairwise(stack)) if b != a + 1), len(stack)]
    return [(stack[start], stack[end - 1] + 1) for start, end in pairwise(starts)] if stack else []
