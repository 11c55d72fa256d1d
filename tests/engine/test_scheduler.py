"""Who starts when adapters have to wait for memory, and what a look at those who wait costs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest

from lorarep_runtime.adapters.claim import Claim
from lorarep_runtime.config import PAGE_TOKENS
from lorarep_runtime.engine.plans import Plans
from lorarep_runtime.engine.stack_turns import StackTurns
from lorarep_runtime.errors import DataLoss, DeadlineExceeded
from lorarep_runtime.model.batch import Batch
from lorarep_runtime.model.prefix_cache import PrefixCache
from lorarep_runtime.model.stack import Stack
from lorarep_runtime.request import Finished
from tests.support.loops import DEPTH, AtOnce, Counting, FreeLease, Loop
from tests.support.operations import operations

SIZES = {"a": 1, "b": 1, "large": 2}
MEMORY = 2


class Device:
    """Memory for adapters, from which idle ones leave for others."""

    def __init__(self) -> None:
        self.loop = Loop(max_sequences=4)
        self.here: list[str] = []
        self.users: list[str] = []

    def submit(self, name: str, new_tokens: int) -> int:
        return self.loop.submit(name, new_tokens=new_tokens, lease=DeviceLease(self, name))

    def has_room(self, name: str) -> bool:
        if name not in self.here:
            used = [x for x in self.here if x in self.users]
            for kept in (self.here, used):
                if SIZES[name] + sum(SIZES[x] for x in kept) <= MEMORY:
                    self.here = [*kept, name]
                    break
        return name in self.here

    def is_over(self, number: int) -> bool:
        return any(isinstance(event, Finished) for event in self.loop.answers[number])


class DeviceLease(FreeLease):
    def __init__(self, device: Device, name: str) -> None:
        super().__init__(name)
        self.device, self.name, self.has_claim = device, name, False

    def claim(self, *, may_load: bool = True) -> Claim:
        if self.name not in self.device.here and not (may_load and self.device.has_room(self.name)):
            self.has_claim = False
            return Claim.NO_MEMORY
        if not self.has_claim:
            self.device.users.append(self.name)
        self.has_claim = True
        return Claim.READY

    def release(self) -> None:
        super().release()
        if self.has_claim:
            self.device.users.remove(self.name)
        self.device.loop.residency.version += 1


@pytest.fixture
def device() -> Device:
    """One on which b is idle and a is in use for 40 tokens more, while a claim for a large adapter waits."""
    device = Device()
    device.has_room("b")
    device.long = device.submit("a", 41)  # type: ignore[attr-defined]
    device.loop.loop.step()
    device.claim = device.submit("large", 1)  # type: ignore[attr-defined]
    device.loop.loop.step()
    assert sorted(device.here) == ["a", "b"]
    return device


def test_a_claim_without_memory_holds_back_nobody_who_ends_before_there_can_be_memory(device: Any) -> None:
    number = device.submit("b", 5)
    for _ in range(8):
        device.loop.loop.step()
    assert device.is_over(number)
    assert not device.is_over(device.long)
    assert device.loop.tokens(device.claim) == []


def test_a_claim_without_memory_waits_no_longer_for_those_that_pass(device: Any) -> None:
    """However many there are: requests that come without a pause, short ones and long ones."""
    flood = [device.submit("b", tokens) for tokens in (5, 1000)]
    steps = 0
    while not device.is_over(device.claim):
        if device.is_over(flood[0]):
            flood[0] = device.submit("b", 5)
        device.loop.loop.step()
        steps += 1
        assert steps < 50
    assert device.loop.tokens(flood[1]) == []
    for number in flood:
        device.loop.inbox.cancel(number)
    while device.loop.loop.step():
        pass
    device.loop.assert_nothing_held()


def test_nobody_passes_once_what_a_claim_waited_for_has_ended_early(device: Any) -> None:
    passing = device.submit("b", 20)
    device.loop.loop.step()
    device.loop.inbox.cancel(device.long)
    device.loop.loop.step()
    later = device.submit("b", 2)
    while not device.is_over(device.claim):
        assert device.loop.loop.step()
        assert device.loop.tokens(later) == []
    assert device.is_over(passing)


class LoadingLease(FreeLease):
    """A lease of an adapter that is on its way, or whose load has failed."""

    claims = 0
    error: DataLoss | None = None

    def __init__(self) -> None:
        super().__init__("slow")
        self.has_claim = False

    def claim(self, *, may_load: bool = True) -> Claim:
        type(self).claims += 1
        if self.has_claim and self.error is not None:
            raise self.error
        self.has_claim = True
        return Claim.LOADING


def waiting(count: int) -> Loop:
    """A loop with one stream, and requests that have claimed the same adapter, which is being loaded."""
    loop = Loop(max_queued=2000)
    loop.submit(new_tokens=1000)
    for _ in range(count):
        loop.submit(lease=LoadingLease(), deadline=time.monotonic() + 3600)
    loop.loop.step()
    return loop


def test_a_steps_cost_does_not_grow_with_the_requests_that_wait_for_an_adapter() -> None:
    few, many = waiting(3), waiting(1000)
    LoadingLease.claims = 0
    cost = [operations(loop.loop.step) for loop in (few, many)]
    assert cost[1] < 1.2 * cost[0], cost
    assert LoadingLease.claims == 2, "one of those that wait asks for all"


def test_a_step_looks_for_no_whole_prefix_while_there_is_no_room_for_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Loop(pages=32 * DEPTH)
    shared, others = (1,) * 10 * PAGE_TOKENS, (2,) * 20 * PAGE_TOKENS
    loop.submit(prompt=(*shared, 3), new_tokens=1, caches=True)
    loop.loop.step()
    stream = loop.submit(prompt=others, new_tokens=8)
    loop.loop.step()
    number = loop.submit(prompt=shared + others[:-1], new_tokens=1, caches=True)
    loop.loop.step()
    looked: list[int] = []
    find = PrefixCache.find

    def counted(self: PrefixCache, keys: Any) -> Any:
        looked.append(len(keys))
        return find(self, keys)

    monkeypatch.setattr(PrefixCache, "find", counted)
    for _ in range(3):
        loop.loop.step()
    assert looked == [1, 1, 1]
    while loop.loop.step():
        pass
    assert len(loop.tokens(stream)) == 8
    assert isinstance(end := loop.answers[number][-1], Finished)
    assert end.cached_tokens == len(shared)


def counting(visits: list[int]) -> Callable[[Batch], Counting]:
    """A forward pass that notes how many visits its plan has."""

    def forward(batch: Batch) -> Counting:
        visits.append(len(batch.plan.visits))
        return Counting(batch)

    return forward


def test_stacks_that_would_make_a_step_long_take_turns_and_the_bases_own_is_in_every_step() -> None:
    """Nobody chooses whose stacks a step has to walk for his token."""
    visits: list[int] = []
    loop = Loop(256, counting(visits), max_sequences=10)
    other = tuple(range(3, 3 + 3 * DEPTH))  # of the operator, and longer than the base
    deep = [tuple(range(10 * i, 10 * i + 4 * DEPTH)) for i in range(1, 9)]
    loop.submit(new_tokens=12)
    for i, stack in enumerate([other, *deep]):
        loop.submit(f"{i}", lease=FreeLease(f"{i}", stack=stack), new_tokens=4)
    for step in range(1, 13):
        loop.loop.step()
        assert len(loop.tokens(0)) == step
    while loop.loop.is_busy:
        loop.loop.step()
    assert max(visits) <= 8 * DEPTH
    assert len(visits) <= 40  # each token of the nine has a step to itself at the worst, with the base's beside it
    assert [loop.tokens(number) for number in range(1, 10)] == [[3, 4, 5, 6]] * 9
    loop.assert_nothing_held()


def test_a_deep_stack_waits_for_no_visits_of_times_before_it() -> None:
    """Stacks of an earlier time had visits that nobody owes to those of today."""
    layers, most = 2, 16
    turns, deep, short = StackTurns(layers, Plans(layers, AtOnce())), (0, 1) * most, (1, 0)

    def steps_until(stack: Stack, others: Sequence[Stack]) -> int:
        return next(step for step in range(10_000) if stack not in turns.begin_step([stack, *others]))

    for _ in range(2_000):
        turns.begin_step([deep, short])
    assert steps_until((1, 1) * most, [(1, 0, 0)]) <= len(deep)
    for _ in range(2_000):
        turns.begin_step([(1, 0, 0), *((n % 2, *[0] * n) for n in range(5, 15))])
    assert steps_until((0, 0) * most, [(1, 0, 0)]) <= len(deep)


def test_stacks_that_are_too_deep_for_any_step_leave_as_many_visits_to_others() -> None:
    """Each of their steps is followed by one without them, and others are not as slow as they are."""
    visits: list[int] = []
    loop = Loop(4096, counting(visits), max_sequences=10)
    short = tuple(range(3, 3 + 2 * DEPTH))
    for i in range(6):
        deep = tuple((i + j * (i + 1)) % 50 for j in range(20 * DEPTH))
        loop.submit(f"{i}", lease=FreeLease(f"{i}", stack=deep), new_tokens=30)
    innocent = loop.submit("short", lease=FreeLease("short", stack=short), new_tokens=40)
    base = loop.submit(new_tokens=40)
    while len(loop.tokens(innocent)) < 40:
        loop.loop.step()
    over = [count > 8 * DEPTH for count in visits]
    assert not any(one and other for one, other in pairwise(over))
    assert sum(over) <= 6 + 40 * len(short) // (20 * DEPTH)
    assert len(loop.tokens(base)) == 40
    while loop.loop.is_busy:
        loop.loop.step()
    loop.assert_nothing_held()


def test_who_waits_for_a_load_hears_of_its_failure_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = waiting(20)
    monkeypatch.setattr(LoadingLease, "error", DataLoss("a broken file"))
    loop.loop.step()
    assert [type(events[-1]) for number, events in loop.answers.items() if number] == [DataLoss] * 20


def test_deadlines_are_met_in_any_order_and_ended_requests_leave_nothing() -> None:
    loop = Loop(max_sequences=1, max_queued=2000)
    now = time.monotonic()
    for _ in range(500):
        loop.submit(new_tokens=1, deadline=now + 3600)
        loop.loop.step()
    assert len(loop.loop._deadlines._heap) < 100
    late, in_time, early = (loop.submit(deadline=now + seconds) for seconds in (-1, 3600, -2))
    loop.loop.step()
    assert [type(loop.answers[number][-1]) for number in (late, early)] == [DeadlineExceeded] * 2
    while loop.loop.step():
        pass
    assert isinstance(loop.answers[in_time][-1], Finished)
    loop.assert_nothing_held()
