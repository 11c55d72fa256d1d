"""Which stacks a step walks, where a plan of all of them would be long: they take turns."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from lorarep_runtime.model.plan import length_up_to
from lorarep_runtime.model.stack import Stack

LONGEST_PLAN = 8
"""Most visits of a step's plan, as a multiple of the base's layers."""
MOST_TRIED = 8
"""Most stacks that are tried for a step in which not all have room: each may take a millisecond."""


class StackTurns:
    """Chooses the stacks of each step, so that its plan has a bounded number of visits.

    Whoever loads an adapter chooses its stack, and all rows of a step wait for all of its visits. The base's own order
    is in every step, and of the others those first that were walked the longest time ago. The first of them may be
    longer than the bound by itself: then it is alone with the base's.

    Args:
        layers: of the base.
    """

    def __init__(self, layers: int) -> None:
        self._base: Stack = tuple(range(layers))
        self._most = LONGEST_PLAN * layers
        self._step = 0
        self._walked: dict[Stack, int] = {}
        """For each stack of the running sequences the last step that walked it."""
        self._chosen: set[Stack] = set()

    def begin_step(self, stacks: Iterable[Stack]) -> Collection[Stack]:
        """Chooses among the stacks of running sequences.

        Returns:
            Those that have to wait for a later step.
        """
        # Sequences of one adapter share a tuple, whose hash takes longer than its address.
        asking = set({id(stack): stack for stack in stacks}.values())
        self._step += 1
        self._walked = {stack: self._walked.get(stack, 0) for stack in asking}
        self._chosen = asking if self._has_room_for(asking) else self._first(asking)
        self._walked.update(dict.fromkeys(self._chosen, self._step))
        return asking - self._chosen

    def joins(self, stack: Stack) -> bool:
        """Whether the step has room for one more stack; if so, it is of the step."""
        if stack not in self._chosen:
            if self._chosen and not self._has_room_for({*self._chosen, stack}):
                return False
            self._chosen = {*self._chosen, stack}
            self._walked[stack] = self._step
        return True

    def _first(self, asking: set[Stack]) -> set[Stack]:
        """The stacks whose turn it is, as many as there is room for."""
        others = sorted(asking - {self._base}, key=lambda stack: (self._walked[stack], stack))
        chosen = [others[0], *(asking & {self._base})]
        least = len(chosen)
        for stack in others[1 : 1 + MOST_TRIED]:
            if length_up_to((*chosen, stack), self._most) <= self._most:
                chosen.append(stack)
        while len(chosen) > least and not self._has_room_for(set(chosen)):  # in another order plans are a little longer
            chosen.pop()
        return set(chosen)

    def _has_room_for(self, stacks: set[Stack]) -> bool:
        return sum(map(len, stacks)) <= self._most or length_up_to(tuple(sorted(stacks)), self._most) <= self._most
