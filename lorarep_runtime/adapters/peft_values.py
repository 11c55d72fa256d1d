"""Values of an adapter's config, checked: each of its type, within its limits, and cheap to use."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lorarep_runtime.errors import InvalidArgument, shown
from lorarep_runtime.model.stack import stack_from_ranges

_PLAIN = re.compile(r"[\w.]*")
_BRACES = re.compile(r"\{[^{}]*\}")
_ANOTHERS = re.compile(r"\{(?!\d*,?\d*\})|\[:\^?\w+:\]")
"""What means something to `regex`, which matches here, and only its own characters to `re`, which PEFT uses: errors
that are allowed, such as "{e<=1}", and POSIX classes. No path of a module has any of these characters."""
MAX_PATTERNS = 8192
"""Most names, patterns or tokens in one field."""
MAX_TOKEN = 1 << 31
"""Largest id of a token."""
MAX_REPEATED = 100_000
"""Most characters that the repeats of one field's patterns add when they are written out. `regex` writes them out to
compile a pattern, so that a few nested repeats could take all memory."""


def ranges(value: Any, max_positions: int) -> tuple[tuple[int, int], ...] | None:
    if not value and not isinstance(value, bool | int):
        return None
    # Checked over a base of any size: ranges that are wrong on every base are refused without one.
    stack_from_ranges(value, 2**31, max_positions=max_positions)
    return tuple((start, end) for start, end in value)


def items(value: Any) -> Sequence[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]


def strings(field: str, value: Any) -> tuple[str, ...]:
    if value is not None and not isinstance(value, list):
        raise InvalidArgument(f"{shown(value)} is not a list of names", field=field)
    items = value or []
    for item in items:
        if not isinstance(item, str) or not item:
            raise InvalidArgument(f"{shown(item)} is not a name", field=field)
    check_count(field, items)
    return tuple(items)


def mapping(field: str, value: Any) -> Mapping[str, Any]:
    if value is not None and not isinstance(value, dict):
        raise InvalidArgument(f"{shown(value)} is not an object", field=field)
    check_count(field, value or {})
    return value or {}


def token_lists(field: str, value: Any, *, are_distinct: bool = True) -> Mapping[str, tuple[int, ...]]:
    """Lists of token ids by names of modules; a list alone has the name ""."""
    lists = mapping(field, {"": value} if isinstance(value, list) else value)
    found: dict[str, tuple[int, ...]] = {}
    for name, tokens in lists.items():
        if not isinstance(tokens, list):
            raise InvalidArgument(f"{shown(tokens)} is not a list of token ids", field=field)
        check_count(field, tokens)
        found[name] = tuple(integer(field, token, 0, MAX_TOKEN) for token in tokens)
        if are_distinct and len(set(tokens)) < len(tokens):
            raise InvalidArgument("has a token twice", field=field)
    return {name: tokens for name, tokens in found.items() if tokens}


def check_count(field: str, items: Sequence[Any] | Mapping[str, Any]) -> None:
    if len(items) > MAX_PATTERNS:
        raise InvalidArgument(f"{len(items)} entries are over the limit of {MAX_PATTERNS}", field=field)


def check_expressions(field: str, patterns: Iterable[str], whole: str) -> None:
    """Refuses patterns that would take all memory to compile, and patterns that PEFT's own `re` does not know.

    Repeats within repeats take memory; recursion and other extensions of `regex` are unknown to `re`.

    Args:
        whole: the expression that PEFT puts a pattern into, in place of its braces.
    """
    added = 0
    for pattern in patterns:
        # Counted as if each repeat were nested in the one before. Braces that are no repeats only lower the limit.
        times = 1
        for brace in _BRACES.findall(pattern):
            count = max(map(int, re.findall(r"[0-9]{1,9}", brace)), default=1)
            times = min(times * max(count, 1), MAX_REPEATED + 1)
        added += len(pattern) * (times - 1)
        if added > MAX_REPEATED:
            raise InvalidArgument(
                f"its repeats written out are over the limit of {MAX_REPEATED} characters", field=field
            )
        if found := _ANOTHERS.search(pattern):
            raise InvalidArgument(f"{shown(pattern)} has {found[0]!r}, which is no part of any path", field=field)
        if not _PLAIN.fullmatch(pattern):
            try:
                re.compile(whole.format(pattern))
            except (re.error, RecursionError, OverflowError, ValueError) as error:
                raise InvalidArgument(f"{shown(pattern)} is not a regular expression: {error}", field=field) from error


def integer(field: str, value: Any, low: int, high: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise InvalidArgument(f"{shown(value)} is not a whole number from {low} to {high}", field=field)
    return value


def number(field: str, value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < 1e30:
        raise InvalidArgument(f"{shown(value)} is not a finite number", field=field)
    return float(value)


def boolean(field: str, value: Any) -> bool:
    if value is not None and not isinstance(value, bool):
        raise InvalidArgument(f"{shown(value)} is not true or false", field=field)
    return bool(value)
