"""Which stacks a step walks, where a plan of all of them would be long: they take turns."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Set

from lorarep_runtime.engine.plans import LONGEST_PLAN, Plans
from lorarep_runtime.model.plan import Plan, merge
from lorarep_runtime.model.stack import Stack

MOST_TRIED = 8
"""Most stacks that are tried for a step in which not all have room: each may have a plan made that no step takes."""


class StackTurns:
    """Chooses the stacks of each step, so that its plan has a bounded number of visits.

    Whoever loads an adapter chooses its stack, and all rows of a step wait for all of its visits. Where not all have
    room, those go first that have had the fewest visits so far (start-time fair queueing, Goyal et al., 1996): a short
    stack has as many more turns than a deep one as it is shorter. The base's own order is in every step. Stacks that
    are over the bound by themselves are each alone with it. Together they have as many visits as one other stack, and
    never two steps in a row while another wants its turn.

    A stack whose plan with the others has not been made waits until it has been: no step merges stacks.

    Args:
        layers: of the base.
    """

    def __init__(self, layers: int, plans: Plans) -> None:
        self._base: Stack = tuple(range(layers))
        self._most = LONGEST_PLAN * layers
        self._plans = plans
        self.plan: Plan = merge((self._base,))
        """Holds all stacks of the step, and maybe those of steps before."""
        self._visits: dict[Stack, int] = {}
        """Visits that each stack of the running sequences has had where not all had room; of a new one, `_time`."""
        self._visits_over = 0
        """Those of all stacks together that are over the bound by themselves."""
        self._time = 0
        """Most visits that a stack had had when it was first in a step: who asks for nothing saves no turns up."""
        self._was_over = False
        """Whether the last step had such a stack."""
        self._chosen: set[Stack] = set()

    def begin_step(self, stacks: Iterable[Stack]) -> Collection[Stack]:
        """Chooses among the stacks of running sequences.

        Returns:
            Those that have to wait for a later step.
        """
        self._was_over = any(map(self._is_over, self._chosen))
        # Sequences of one adapter share a tuple, whose hash takes longer than its address.
        asking = set({id(stack): stack for stack in stacks}.values())
        self._visits = {stack: self._visits.get(stack, self._time) for stack in asking}
        if not asking or self._takes(asking):
            self._chosen = asking
        elif not self._plans.is_too_long(asking) and (ready := self._shorter(asking.intersection(self.plan.stacks))):
            self._chosen = ready  # some have left, or others wait until there is a plan with them
        else:
            self._take_turns(asking)
        return asking - self._chosen

    def joins(self, stack: Stack) -> bool:
        """Whether the step has room for one more stack; if so, it is of the step."""
        return stack in self._chosen or (
            not (self._chosen and self._is_over(stack)) and self._takes({*self._chosen, stack})
        )

    def _shorter(self, stacks: Set[Stack]) -> set[Stack]:
        """Those that are not over the bound by themselves."""
        return {stack for stack in stacks if not self._is_over(stack)}

    def plan_of(self, stacks: Collection[Stack]) -> Plan:
        """The plan of some of the step's stacks, or the step's own where that has not been made."""
        return self._plans.find(stacks) or self.plan

    def _takes(self, stacks: set[Stack]) -> bool:
        """Makes stacks those of the step, if their plan has been made and is short enough."""
        plan = self._plans.find(stacks)
        if plan is None:
            return False
        self._chosen, self.plan = stacks, plan
        return True

    def _take_turns(self, asking: set[Stack]) -> None:
        """Makes those the step's stacks whose turn it is, as many as there is room for."""
        first, others = self._order(asking, self._was_over)
        self._time = max(self._time, self._visits_over if self._is_over(first) else self._visits[first])
        self._visits_over = max(self._visits_over, self._time)
        with_base = {first, *(asking & {self._base})}
        if not self._takes(with_base):
            self._takes(with_base - {first})
        for stack in others:
            if stack not in self._chosen:
                self._takes({*self._chosen, stack})
        for stack in self._chosen:
            self._visits[stack] += len(stack)
            self._visits_over += len(stack) * self._is_over(stack)
        first, others = self._order(asking, any(map(self._is_over, self._chosen)))
        self._plans.prepare({first, *(asking & {self._base})}, others)

    def _order(self, asking: set[Stack], was_over: bool) -> tuple[Stack, list[Stack]]:
        """The stack whose turn it is, and those that are tried beside it, in the order of their turns.

        Args:
            was_over: whether the step before had a stack that is over the bound by itself.
        """

        def turn(stack: Stack) -> tuple[bool, int, int, Stack]:
            is_over, own = self._is_over(stack), self._visits[stack]
            return is_over and was_over, self._visits_over if is_over else own, own, stack

        first, *others = sorted(asking, key=turn)
        return first, [stack for stack in others if not self._is_over(stack)][:MOST_TRIED]

    def _is_over(self, stack: Stack) -> bool:
        return len(stack) > self._most
