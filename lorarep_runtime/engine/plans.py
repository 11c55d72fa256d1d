"""Plans of the stacks that requests walk together, made before a step needs them and in no thread of steps."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Collection, Set
from concurrent.futures import Executor, ThreadPoolExecutor

from lorarep_runtime.model.plan import Plan, length_up_to, merge
from lorarep_runtime.model.stack import Stack

LONGEST_PLAN = 8
"""Most visits of a step's plan, as a multiple of the base's layers."""
MOST_PLANS = 512
"""Most plans that are kept, and of which it is known that they would be too long."""
MOST_WANTED = 32
"""Most plans that steps have asked for and that have not been made."""


class Plans:
    """The plans of sets of stacks, as far as they have been made. Thread-safe.

    A request that enters has the plan made of its stack, the base's own order and all stacks of requests under way, in
    its own thread. A step asks for what is there. It goes without what is not, which is made in the plans' own thread.

    Args:
        layers: of the base.
        thread: runs what makes plans that steps have asked for; None is a thread of its own.
    """

    def __init__(self, layers: int, thread: Executor | None = None) -> None:
        self._base: Stack = tuple(range(layers))
        self._most = LONGEST_PLAN * layers
        self._thread = thread or ThreadPoolExecutor(1, "lorarep-plan")
        self._lock = threading.Lock()
        self._made: OrderedDict[Set[Stack], Plan | None] = OrderedDict()
        """None where the plan would be too long."""
        self._wanted: set[Set[Stack]] = set()
        self._is_preparing = False
        self._under_way: Counter[Stack] = Counter()
        """Number of requests that have entered and not left, by stack."""

    def enter(self, stack: Stack) -> None:
        """Makes the plans that a new request is likely to need. Not for the step loop's thread."""
        with self._lock:
            self._under_way[stack] += 1
            together = frozenset(self._under_way)
        for stacks in (frozenset({self._base, stack}), together):
            self._make(stacks)

    def leave(self, stack: Stack) -> None:
        """Forgets a request that has entered."""
        with self._lock:
            self._under_way[stack] -= 1
            if self._under_way[stack] <= 0:
                del self._under_way[stack]

    def find(self, stacks: Collection[Stack]) -> Plan | None:
        """The plan of stacks; None if it has not been made, then it will be, or if it is too long for a step.

        The plan of one stack is always there. That stack's with the base's own order is never too long.
        """
        wanted = frozenset(stacks)
        if len(wanted) == 1:
            return merge(tuple(wanted))
        with self._lock:
            if wanted in self._made:
                self._made.move_to_end(wanted)
                return self._made[wanted]
            if wanted in self._wanted or len(self._wanted) >= MOST_WANTED:
                return None
            self._wanted.add(wanted)
        self._thread.submit(self._make, wanted)
        return None

    def prepare(self, stacks: Collection[Stack], others: Collection[Stack]) -> None:
        """Has plans made of stacks with as many of others, in their order, as a step has room for.

        Nothing is done while plans are being made that were asked for so before.
        """
        if not self._is_preparing:
            self._is_preparing = True
            self._thread.submit(self._prepare, frozenset(stacks), tuple(others))

    def _prepare(self, stacks: Set[Stack], others: Collection[Stack]) -> None:
        for stack in others:
            if self._make(stacks | {stack}) is not None:
                stacks |= {stack}
        self._is_preparing = False

    def is_too_long(self, stacks: Collection[Stack]) -> bool:
        """Whether a plan is known to be too long for a step."""
        with self._lock:
            return self._made.get(frozenset(stacks), self) is None

    def _make(self, stacks: Set[Stack]) -> Plan | None:
        """The plan of stacks, kept from now on; None if it is too long."""
        with self._lock:
            plan = self._made.get(stacks)
            is_made = stacks in self._made
        if not is_made:
            ordered = tuple(sorted(stacks))
            is_pair = len(stacks) <= 2 and self._base in stacks
            plan = merge(ordered) if is_pair or length_up_to(ordered, self._most) <= self._most else None
        with self._lock:
            self._wanted.discard(stacks)
            self._made[stacks] = plan
            self._made.move_to_end(stacks)
            while len(self._made) > MOST_PLANS:
                self._made.popitem(last=False)
        return plan
