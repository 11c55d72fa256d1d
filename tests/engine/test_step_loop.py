"""The step loop alone: no model, no adapters and no thread."""

from __future__ import annotations

import threading
import time

import pytest

from lorarep_runtime.engine.scheduler import Schedule
from lorarep_runtime.errors import Cancelled, EngineFailure, Exhausted, Unavailable
from lorarep_runtime.model.batch import Batch
from lorarep_runtime.request import Finished
from tests.support.loops import DEPTH, Counting, Loop


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


def test_a_loop_that_waits_hears_of_a_request_and_of_a_cancellation_at_once() -> None:
    loop = Loop()
    for say in (loop.submit, lambda: loop.inbox.cancel(0)):
        say()
        began = time.monotonic()
        loop.inbox.wait_for_news(60)
        assert time.monotonic() - began < 30
        loop.loop.step()


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
