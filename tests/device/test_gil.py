"""Others give way to the step thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from lorarep_runtime.device import gil
from lorarep_runtime.device.timer import DeviceTimer
from lorarep_runtime.engine.launched_step import LaunchedStep
from lorarep_runtime.request import Request, Sampling
from tests.support.decoders import with_decoder
from tests.support.engines import engine_for, greedy, sampled
from tests.support.models import save_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base("qwen2", tmp_path_factory.mktemp("gil") / "base")


@pytest.fixture(autouse=True)
def released() -> Iterator[None]:
    yield
    gil.release()


@pytest.fixture
def would_wait(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], bool]:
    """Whether another thread has to wait now, for so many seconds to itself."""
    waits: list[float] = []
    monkeypatch.setattr(gil._released, "wait", waits.append)

    def ask(seconds: float = 0) -> bool:
        waits.clear()
        gil.give_way(seconds)
        return bool(waits)

    return ask


def test_items_wait_for_the_step_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gil, "PATIENCE", 60)
    seen: list[int] = []

    def work() -> None:
        for item in gil.giving_way(range(3 * gil.ITEMS)):
            if item == gil.ITEMS:
                gil.claim()
            seen.append(item)

    thread = threading.Thread(target=work)
    thread.start()
    while len(seen) < 2 * gil.ITEMS:
        time.sleep(0.01)
    thread.join(0.1)
    assert seen == list(range(2 * gil.ITEMS))
    gil.release()
    thread.join(10)
    assert seen == list(range(3 * gil.ITEMS))


def test_what_would_not_be_done_in_time_waits(would_wait: Callable[[float], bool]) -> None:
    gil.release(until=time.perf_counter() + 60)
    assert not would_wait(1)
    assert would_wait(90)
    assert not would_wait(1)
    gil.claim()
    assert would_wait(0)
    gil.release()
    assert not would_wait(90)


def test_a_step_thread_that_is_long_at_something_is_not_waited_for() -> None:
    gil.claim()
    gil.give_way()


KINDS = {
    "greedy": greedy(new_tokens=4),
    "drawn": replace(greedy(new_tokens=4), sampling=Sampling(temperature=1)),
    "with a penalty": sampled(1, new_tokens=4),
    "with log-probabilities": replace(greedy(new_tokens=4), logprobs=1),
}


@pytest.mark.parametrize("request_", KINDS.values(), ids=KINDS)
def test_streams_have_the_gil_except_while_they_wait_for_the_device(
    base: Path, monkeypatch: pytest.MonkeyPatch, would_wait: Callable[[], bool], request_: Request
) -> None:
    engine = engine_for(base)
    with_decoder(engine)
    monkeypatch.setattr(DeviceTimer, "milliseconds", 60e3)
    waiting, emitting = [], []
    read = LaunchedStep.sampled
    monkeypatch.setattr(LaunchedStep, "sampled", lambda step: waiting.append(would_wait()) or read(step))
    engine.submit(request_, engine.adapters.lease([]), lambda event: emitting.append(would_wait()))
    while engine.loop.step():
        pass
    assert waiting == [False] * 3
    # The prompt's token, then those of steps, the last one's with the end.
    assert emitting == [False, True, True, True, True]
    assert not would_wait()


@pytest.mark.parametrize("request_", KINDS.values(), ids=KINDS)
def test_a_stream_that_is_cancelled_leaves_the_gil_to_others(
    base: Path, monkeypatch: pytest.MonkeyPatch, would_wait: Callable[[], bool], request_: Request
) -> None:
    engine = engine_for(base)
    with_decoder(engine)
    monkeypatch.setattr(DeviceTimer, "milliseconds", 60e3)
    number = engine.submit(request_, engine.adapters.lease([]), lambda event: None)
    for _ in range(3):
        engine.loop.step()
    assert would_wait()
    engine.cancel(number)
    while engine.loop.step():
        pass
    assert not would_wait()
