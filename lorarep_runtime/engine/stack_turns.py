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

    Whoever loads an adapter chooses its stack, and all rows of a step wait for all of its visits. Where not all have
    room, those go first that have had the fewest visits so far (start-time fair queueing, Goyal et al., 1996): a short
    stack has as many more turns than a deep one as it is shorter. The base's own order is in every step. Stacks that
    are over the bound by themselves are each alone with it. Together they have as many visits as one other stack, and
    never two steps in a row while another wants its turn.

    Args:
        layers: of the base.
    """

    def __init__(self, layers: int) -> None:
        self._base: Stack = tuple(range(layers))
        self._most = LONGEST_PLAN * layers
        self._visits: dict[Stack, int] = {}
        """Visits that each stack of the running sequences has had where not all had room; of a new one, `_time`."""
        self._visits_over = 0
        """Those of all stacks together that are over the bound by themselves."""
        self._time = 0
        """Most visits that a stack had had when it was first in a step: who asks for nothing saves no turns up."""
        self._was_over = False
        """Whether the first of the last step was such a stack."""
        self._chosen: set[Stack] = set()

    def begin_step(self, stacks: Iterable[Stack]) -> Collection[Stack]:
        """Chooses among the stacks of running sequences.

        Returns:
            Those that have to wait for a later step.
        """
        # Sequences of one adapter share a tuple, whose hash takes longer than its address.
        asking = set({id(stack): stack for stack in stacks}.values())
        self._visits = {stack: self._visits.get(stack, self._time) for stack in asking}
        if self._has_room_for(asking):
            self._chosen = asking
        else:
            self._chosen = self._first(asking)
            for stack in self._chosen:
                self._visits[stack] += len(stack)
                self._visits_over += len(stack) * self._is_over(stack)
        return asking - self._chosen

    def joins(self, stack: Stack) -> bool:
        """Whether the step has room for one more stack; if so, it is of the step."""
        if stack not in self._chosen:
            if self._chosen and not self._has_room_for({*self._chosen, stack}):
                return False
            self._chosen = {*self._chosen, stack}
        return True

    def _first(self, asking: set[Stack]) -> set[Stack]:
        """The stacks whose turn it is, as many as there is room for."""

        def turn(stack: Stack) -> tuple[bool, int, int, Stack]:
            is_over, own = self._is_over(stack), self._visits[stack]
            return is_over and self._was_over, self._visits_over if is_over else own, own, stack

        first, *others = sorted(asking, key=turn)
        self._was_over = self._is_over(first)
        self._time = max(self._time, self._visits_over if self._was_over else self._visits[first])
        self._visits_over = max(self._visits_over, self._time)
        chosen = [first, *(asking & {self._base} - {first})]
        least = len(chosen)
        for stack in others[:MOST_TRIED]:
            if stack not in chosen and length_up_to((*chosen, stack), self._most) <= self._most:
                chosen.append(stack)
        while len(chosen) > least and not self._has_room_for(set(chosen)):  # in another order plans are a little longer
            chosen.pop()
        return set(chosen)

    def _is_over(self, stack: Stack) -> bool:
        return len(stack) > self._most

    def _has_room_for(self, stacks: set[Stack]) -> bool:
        return sum(map(len, stacks)) <= self._most or length_up_to(tuple(sorted(stacks)), self._most) <= self._most
