"""The step loop alone: no model, no adapters and no thread."""

from __future__ import annotations

import itertools
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lorarep_runtime.adapters.residency import Claim
from lorarep_runtime.config import SchedulerConfig
from lorarep_runtime.engine.inbox import Inbox
from lorarep_runtime.engine.outputs import Outputs
from lorarep_runtime.engine.overlap import StepOverlap
from lorarep_runtime.engine.prefill_pass import SlicedPrefill
from lorarep_runtime.engine.sampler import SamplerState
from lorarep_runtime.engine.scheduler import Schedule, Scheduler
from lorarep_runtime.engine.sequence import Sequence
from lorarep_runtime.engine.stats import Stats, StatsRecorder
from lorarep_runtime.engine.step_loop import StepLoop
from lorarep_runtime.errors import Cancelled, EngineFailure, Exhausted, Unavailable
from lorarep_runtime.model.batch import Batch
from lorarep_runtime.model.kv_cache import KVShape, PagePool, PageTable
from lorarep_runtime.request import Event, Finished, Output, Request, Stopping

VOCAB = 32
DEPTH = 2


class Counting:
    """A forward pass whose likeliest next token is the last one plus 1."""

    left = 0

    def __init__(self, batch: Batch) -> None:
        self._batch = batch

    def advance(self, visits: int, /) -> None: ...

    def logits(self, rows: Tensor, /) -> Tensor:
        return torch.nn.functional.one_hot((self._batch.token_ids[rows] + 1) % VOCAB, VOCAB).float()


class FreeLease:
    """A lease of an adapter that is on the device, and that no kernel reads."""

    def __init__(self, *names: str) -> None:
        self.names = names
        self.stack = tuple(range(DEPTH))
        self.adapter = None
        self.has_claim = True
        self.is_released = False

    def claim(self) -> Claim:
        return Claim.READY

    def release(self) -> None:
        self.is_released = True


class Digits:
    """The text of an answer: its tokens as numbers."""

    def feed(self, token: int, *, may_stop: bool) -> tuple[str, str]:
        return f"{token} ", ""

    def finish(self) -> str:
        return ""


class Loop:
    """A step loop over fakes, and requests for it."""

    def __init__(self, pages: int = 64, forward: Any = Counting, **limits: Any) -> None:
        config = SchedulerConfig(**limits)
        self.pool = PagePool(pages, KVShape(1, 1, 1), dtype=torch.float32, device=torch.device("cpu"))
        self.inbox, self._recorder = Inbox(config), StatsRecorder(pages)
        scheduler = Scheduler(config, self.pool, SimpleNamespace(version=0))  # type: ignore[arg-type]
        self.loop = StepLoop(
            self.inbox,
            scheduler,
            StepOverlap(None, scheduler),
            SlicedPrefill(forward, scheduler),
            Outputs(self._recorder),
            self._recorder,
        )
        self.leases: list[FreeLease] = []
        self.answers: dict[int, list[Event]] = {}
        self._ids = itertools.count()

    def submit(self, *names: str, prompt: tuple[int, ...] = (1, 2), new_tokens: int = 3) -> int:
        lease, number = FreeLease(*names), next(self._ids)
        events: list[Event] = []
        request = Request(prompt, stopping=Stopping(max_new_tokens=new_tokens))
        self.inbox.submit(
            Sequence(
                id=number,
                request=request,
                lease=lease,  # type: ignore[arg-type]
                sampler=SamplerState(request, frozenset()),
                text=Digits(),  # type: ignore[arg-type]
                on_event=events.append,
                table=PageTable(self.pool, DEPTH),
                tokens=list(prompt),
            )
        )
        self.leases.append(lease)
        self.answers[number] = events
        return number

    @property
    def stats(self) -> Stats:
        return self._recorder.snapshot(self.inbox.waiting_by_adapter())

    def tokens(self, number: int) -> list[int]:
        return [token for event in self.answers[number] if isinstance(event, Output) for token in event.tokens]

    def assert_nothing_held(self) -> None:
        assert (self.stats.running, self.stats.waiting, self.stats.pages_used) == (0, 0, self.pool.used) == (0, 0, 0)
        assert all(lease.is_released for lease in self.leases)


def test_a_step_adds_a_token_to_each_answer_until_it_ends() -> None:
    loop = Loop()
    short, long = loop.submit(new_tokens=1), loop.submit(prompt=(7,), new_tokens=3)
    assert loop.loop.step()
    assert isinstance(loop.answers[short][-1], Finished)
    assert loop.stats.running == 1
    while loop.loop.step():
        pass
    assert (loop.tokens(short), loop.tokens(long)) == ([3], [8, 9, 10])
    assert (loop.stats.tokens_in, loop.stats.tokens_out, loop.stats.steps) == (3, 4, 3)
    assert not loop.loop.is_busy
    loop.assert_nothing_held()


def test_a_request_waits_from_its_submission_until_it_is_admitted() -> None:
    loop = Loop(max_sequences=1)
    for name in ("a", "b"):
        loop.submit(name)
    seen = [loop.stats]
    loop.loop.step()
    seen.append(loop.stats)
    assert [(s.running, s.waiting) for s in seen] == [(0, 2), (1, 1)]
    assert [(s.running_adapters, s.waiting_adapters) for s in seen] == [((), ("a", "b")), (("a",), ("b",))]


def test_a_request_that_was_preempted_waits_again() -> None:
    loop = Loop(pages=2 * DEPTH)
    numbers = [loop.submit(prompt=tuple(range(15)), new_tokens=4) for _ in range(2)]
    seen: list[tuple[int, int]] = []
    while loop.loop.step():
        seen.append((loop.stats.running, loop.stats.waiting))
    assert (1, 1) in seen
    assert loop.stats.preemptions == 1
    assert [loop.tokens(number) for number in numbers] == [[15, 16, 17, 18]] * 2
    loop.assert_nothing_held()


def test_the_youngest_gives_its_pages_back(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Loop(pages=3 * DEPTH)
    preempted: list[int] = []
    schedule = loop.loop.scheduler.schedule

    def recorded() -> Schedule:
        made = schedule()
        preempted.extend(sequence.id for sequence in made.preempted)
        return made

    monkeypatch.setattr(loop.loop.scheduler, "schedule", recorded)
    numbers = [loop.submit(prompt=(1,) * 12, new_tokens=20) for _ in range(2)]
    while loop.loop.step():
        pass
    assert preempted == [numbers[1]]
    assert [len(loop.tokens(number)) for number in numbers] == [20, 20]
    loop.assert_nothing_held()


def test_a_claim_has_its_turn_before_older_requests() -> None:
    """Its adapter was brought for it, and is kept from others meanwhile."""
    loop = Loop(max_sequences=1)
    older, claims = loop.submit("a"), loop.submit("b")
    loop.leases[0].has_claim = False
    loop.loop.step()
    assert [len(loop.tokens(number)) for number in (older, claims)] == [0, 1]


@pytest.mark.parametrize("limits", [dict(max_queued=2), dict(max_queued_per_adapter=2)], ids=str)
def test_limits_count_the_requests_that_wait_and_no_others(limits: dict[str, int]) -> None:
    loop = Loop(max_sequences=1, **limits)
    loop.submit("a")
    loop.loop.step()  # it runs, and waits no longer
    numbers = [loop.submit("a") for _ in range(2)]
    with pytest.raises(Exhausted, match=next(iter(limits))):
        loop.submit("a")
    loop.inbox.cancel(numbers[0])
    loop.loop.step()
    assert isinstance(loop.answers[numbers[0]][-1], Cancelled)
    loop.submit("a")


def test_a_failed_pass_ends_its_sequences_and_the_loop_goes_on() -> None:
    def forward(batch: Batch) -> Counting:
        if broken:
            raise RuntimeError("a kernel failed")
        return Counting(batch)

    loop, broken = Loop(forward=forward), True
    bad = loop.submit()
    loop.loop.step()
    assert isinstance(loop.answers[bad][-1], EngineFailure)
    loop.assert_nothing_held()
    broken = False
    good = loop.submit()
    while loop.loop.step():
        pass
    assert loop.tokens(good) == [3, 4, 5]


def test_a_loop_that_is_stopped_ends_all_requests_and_refuses_others() -> None:
    loop = Loop(max_sequences=1)
    numbers = [loop.submit(new_tokens=1000) for _ in range(2)]
    loop.loop.step()
    loop.inbox.stop()
    loop.loop.run()
    assert [type(loop.answers[number][-1]) for number in numbers] == [Unavailable] * 2
    with pytest.raises(Unavailable):
        loop.submit()
    loop.assert_nothing_held()


def test_limits_hold_while_many_threads_submit_and_the_loop_admits() -> None:
    loop, each, most = Loop(max_queued=10), 50, 10
    refused: list[Exhausted] = []

    def submit() -> None:
        for _ in range(each):
            try:
                loop.submit("a")
            except Exhausted as error:
                refused.append(error)

    threads = [threading.Thread(target=submit) for _ in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads) or loop.loop.is_busy:
        loop.loop.step()
        assert loop.stats.waiting <= most
    assert [type(events[-1]) for events in loop.answers.values()] == [Finished] * (4 * each - len(refused))
    loop.assert_nothing_held()
