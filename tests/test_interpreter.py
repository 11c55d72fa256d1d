"""Others give way to the step thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lorarep_runtime import interpreter
from lorarep_runtime.stopwatch import Stopwatch
from tests.decoders import with_decoder
from tests.engines import engine_for, greedy
from tests.models import save_base


@pytest.fixture(autouse=True)
def released() -> Iterator[None]:
    yield
    interpreter.release()


@pytest.fixture
def would_wait(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], bool]:
    """Whether another thread has to wait now, for so many seconds to itself."""
    waits: list[float] = []
    monkeypatch.setattr(interpreter._released, "wait", waits.append)

    def ask(seconds: float = 0) -> bool:
        waits.clear()
        interpreter.give_way(seconds)
        return bool(waits)

    return ask


def test_items_wait_for_the_step_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interpreter, "PATIENCE", 60)
    seen: list[int] = []

    def work() -> None:
        for item in interpreter.giving_way(range(3 * interpreter.ITEMS)):
            if item == interpreter.ITEMS:
                interpreter.claim()
            seen.append(item)

    thread = threading.Thread(target=work)
    thread.start()
    while len(seen) < 2 * interpreter.ITEMS:
        time.sleep(0.01)
    thread.join(0.1)
    assert seen == list(range(2 * interpreter.ITEMS))
    interpreter.release()
    thread.join(10)
    assert seen == list(range(3 * interpreter.ITEMS))


def test_what_would_not_be_done_in_time_waits(would_wait: Callable[[float], bool]) -> None:
    interpreter.release(until=time.perf_counter() + 60)
    assert not would_wait(1)
    assert would_wait(90)
    assert not would_wait(1)
    interpreter.claim()
    assert would_wait(0)
    interpreter.release()
    assert not would_wait(90)


def test_a_step_thread_that_is_long_at_something_is_not_waited_for() -> None:
    interpreter.claim()
    interpreter.give_way()


def test_a_step_is_at_work_when_it_emits_and_not_when_it_waits_for_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, would_wait: Callable[[], bool]
) -> None:
    engine = engine_for(save_base("qwen2", tmp_path / "base"))
    with_decoder(engine)
    monkeypatch.setattr(Stopwatch, "milliseconds", 60e3)
    waiting, emitting = [], []
    monkeypatch.setattr(Stopwatch, "wait", lambda _: waiting.append(would_wait()))
    engine.submit(greedy(new_tokens=4), engine.adapters.lease([]), lambda event: emitting.append(would_wait()))
    while engine.step():
        pass
    assert waiting == [False] * 3
    # The prompt's token, then those of steps, the last one's with the end.
    assert emitting == [False, True, True, True, True]
    assert not would_wait()
