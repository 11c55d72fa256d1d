"""Others give way to the step thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
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


def passes(seconds: float = 0) -> bool:
    """Whether another thread could work now, for so long."""
    thread = threading.Thread(target=interpreter.give_way, args=(seconds,))
    thread.start()
    thread.join(0.1)
    return not thread.is_alive()


def test_items_wait_for_the_step_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interpreter, "PATIENCE", 60)
    seen: list[int] = []

    def work() -> None:
        for item in interpreter.giving_way(range(3 * interpreter.ITEMS)):
            seen.append(item)
            if item == interpreter.ITEMS:
                interpreter.claim()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(0.2)
    assert seen == list(range(2 * interpreter.ITEMS))
    interpreter.release()
    thread.join()
    assert seen == list(range(3 * interpreter.ITEMS))


def test_what_would_not_be_done_in_time_waits_for_the_next_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interpreter, "PATIENCE", 60)
    interpreter.release(until=time.perf_counter() + 5)
    assert passes(1)
    assert not passes(6)
    assert not passes(1), "that is over"
    interpreter.release(until=time.perf_counter() + 5)
    assert passes(1)


def test_a_step_thread_that_is_long_at_something_is_not_waited_for() -> None:
    interpreter.claim()
    assert passes()


def test_a_step_is_at_work_when_it_emits_and_not_when_it_waits_for_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interpreter, "PATIENCE", 60)
    engine = engine_for(save_base("qwen2", tmp_path / "base"))
    with_decoder(engine)
    monkeypatch.setattr(Stopwatch, "milliseconds", 60e3)
    waits, emits = [], []
    monkeypatch.setattr(Stopwatch, "wait", lambda _: waits.append(passes()))
    engine.submit(greedy(new_tokens=4), engine.adapters.lease([]), lambda event: emits.append(passes()))
    while engine.step():
        pass
    assert waits == [True] * 3
    # The prompt's token, then those of steps, the last one's with the end.
    assert emits == [True, False, False, False, False]
    assert passes()
