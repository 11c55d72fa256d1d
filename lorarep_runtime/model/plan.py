"""Plans: several stacks merged into one walk over the layers, which reads each layer's weights once for all of them.

A plan is a common supersequence of its stacks. Each place in it is a visit to one layer, for all stacks that have a
position there; the others pass through.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from lorarep_runtime.model.stack import Stack


class Visit(NamedTuple):
    """One place in a plan: a layer, and the stacks that walk it there."""

    layer: int
    positions: tuple[int | None, ...]
    """For each stack of the plan its position at the visit; None where the stack passes through."""


@dataclass(frozen=True)
class Plan:
    """A walk over layers that holds every one of its stacks in order."""

    stacks: tuple[Stack, ...]
    visits: tuple[Visit, ...]

    @property
    def depth(self) -> int:
        """Positions of the deepest stack."""
        return max(len(stack) for stack in self.stacks)

    def of(self, stacks: Collection[Stack]) -> Plan:
        """The part of the plan that some of its stacks walk. It may be longer than their own plan."""
        if len(stacks) == len(self.stacks):
            return self
        kept = [i for i, stack in enumerate(self.stacks) if stack in stacks]
        visits = (Visit(layer, tuple(positions[i] for i in kept)) for layer, positions in self.visits)
        return Plan(
            tuple(self.stacks[i] for i in kept),
            tuple(visit for visit in visits if visit.positions.count(None) < len(kept)),
        )


@lru_cache(maxsize=64)
def merge(stacks: tuple[Stack, ...]) -> Plan:
    """A short plan for stacks; the shortest for up to two.

    The shortest common supersequence of many sequences is NP-hard (Maier, 1978), so stacks are added to the plan one by
    one, each in the shortest way. The same stacks in the same order always give the same plan.
    """
    walk = _supersequence(stacks)
    visits = map(Visit, walk, zip(*(_leftmost(stack, walk) for stack in stacks), strict=True))
    return Plan(stacks, tuple(visit for visit in visits if visit.positions.count(None) < len(stacks)))


@lru_cache(maxsize=4096)
def length_up_to(stacks: tuple[Stack, ...], most: int) -> int:
    """Number of visits of `merge(stacks)` at most; if that is over `most`, of as many of the first as make it so."""
    length = 0
    for count in range(1, len(stacks) + 1):
        length = len(_supersequence(stacks[:count]))
        if length > most:
            break
    return length


@lru_cache(maxsize=4096)
def _supersequence(stacks: tuple[Stack, ...]) -> Stack:
    return _shortest(_supersequence(stacks[:-1]), stacks[-1]) if stacks else ()


def _shortest(a: Stack, b: Stack) -> Stack:
    """The shortest common supersequence of two walks: their longest common subsequence, and the rest around it.

    Merging holds the interpreter, so each row of the table is one integer, by the bit-parallel rule of Hyyrö (2004).
    Bit k of a row is 0 where b[-k-1:] has one layer more in common than b[-k:].
    """
    places: dict[int, int] = {}
    for k, layer in enumerate(reversed(b)):
        places[layer] = places.get(layer, 0) | 1 << k
    every = (1 << len(b)) - 1
    rows = [every]
    for layer in reversed(a):
        found = rows[-1] & places.get(layer, 0)
        rows.append((rows[-1] + found | rows[-1] - found) & every)

    merged: list[int] = []
    i = j = 0
    while i < len(a) and j < len(b):
        if a[i] == b[j]:
            merged.append(a[i])
            i, j = i + 1, j + 1
        elif rows[len(a) - i] >> len(b) - j - 1 & 1:  # a[i:] has as much in common with b[j + 1:] as with b[j:]
            merged.append(b[j])
            j += 1
        else:
            merged.append(a[i])
            i += 1
    return (*merged, *a[i:], *b[j:])


def _leftmost(stack: Stack, walk: Stack) -> list[int | None]:
    """The position of a stack at each place of a walk that holds it; None where the stack passes through."""
    positions: list[int | None] = []
    position = 0
    for layer in walk:
        here = position < len(stack) and stack[position] == layer
        positions.append(position if here else None)
        position += here
    return positions
