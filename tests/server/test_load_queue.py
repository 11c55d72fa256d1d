"""The load queue without a server: loads, their callers, and reports of progress."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from types import SimpleNamespace

import pytest
from lorarep_server.loading.load_queue import REPORT_SECONDS, LoadQueue, LoadState
from lorarep_server.telemetry.metrics import Metrics
from prometheus_client import CollectorRegistry

from lorarep_runtime.errors import Exhausted
from lorarep_runtime.progress import Progress

STEPS = 200_000


def loads() -> LoadQueue:
    return LoadQueue(Metrics(CollectorRegistry()), threads=1)


def test_a_load_waits_for_no_reader() -> None:
    ended = threading.Event()

    def load(progress: Progress) -> None:
        progress("download", 1, 1)
        ended.set()

    async def run() -> None:
        read = asyncio.Event()

        async def report(state: LoadState) -> object:
            return await read.wait()

        call = asyncio.create_task(loads().run("key", load, report))
        await asyncio.to_thread(ended.wait, 600)
        assert not call.done()
        read.set()
        await call

    asyncio.run(run())
    assert ended.is_set()


def test_a_tokenizer_is_looked_up_once_whatever_the_weights_and_its_names_settle_after_it() -> None:
    may_end, looked_up = threading.Event(), []

    def tokenizer(adapters: Sequence[tuple[str, float]], progress: Progress) -> str:
        looked_up.append(adapters)
        may_end.wait(600)
        return "it"

    async def run() -> None:
        queue, registry = loads(), SimpleNamespace(tokenizer=tokenizer)
        calls = [asyncio.create_task(queue.tokenizer(registry, [("org/x", 1 + i / 100)])) for i in range(100)]
        await asyncio.sleep(0)
        settled = asyncio.create_task(queue.settled("org/x"))
        await asyncio.wait((settled, *calls), timeout=0.05)
        assert not settled.done()
        may_end.set()
        found = await asyncio.gather(*calls)
        assert found == found[:1] * 100
        await settled

    asyncio.run(run())
    assert len(looked_up) == 1


def test_only_the_latest_state_is_told_now_and_then() -> None:
    def load(progress: Progress) -> None:
        for done in range(1, STEPS + 1):
            progress("compile", done, STEPS)

    async def run() -> tuple[list[LoadState], float]:
        told: list[LoadState] = []

        async def report(state: LoadState) -> None:
            told.append(state)

        began = time.monotonic()
        await loads().run("key", load, report)
        return told, time.monotonic() - began

    told, took = asyncio.run(run())
    assert len(told) <= 2 + took / REPORT_SECONDS
    assert [state.done for state in told] == sorted({state.done for state in told})


def test_a_load_that_was_left_while_the_hub_says_nothing_holds_no_other_up() -> None:
    hub_answers, ended = threading.Event(), threading.Event()

    def stalled(progress: Progress) -> None:
        hub_answers.wait(600)
        try:
            progress("download", 1, 1)
        finally:
            ended.set()

    async def run() -> None:
        queue = loads()
        left = asyncio.create_task(queue.run("stalled", stalled, names=("org/x",)))
        waiting = asyncio.create_task(
            queue.run("never begun", lambda progress: pytest.fail("it was left"), names=("y",))
        )
        asked = asyncio.create_task(queue.run("asked", lambda progress: 5))
        await asyncio.sleep(0.05)
        assert not asked.done()
        waiting.cancel()
        left.cancel()
        assert await asked == 5
        await queue.settled("y")
        settled = asyncio.create_task(queue.settled("org/x"))
        await asyncio.sleep(0.05)
        assert not settled.done()
        hub_answers.set()
        await settled

    asyncio.run(run())
    assert ended.is_set()


def test_more_loads_than_may_wait_are_refused() -> None:
    may_end = threading.Event()

    async def run() -> None:
        queue = LoadQueue(Metrics(CollectorRegistry()), threads=1, max_waiting=2)
        left = asyncio.create_task(queue.run("left", lambda progress: may_end.wait(600)))
        await asyncio.sleep(0.05)
        left.cancel()
        await asyncio.wait((left,))
        asked = [asyncio.create_task(queue.run(key, lambda progress: may_end.wait(600))) for key in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(Exhausted):
            await queue.run("one too many", lambda progress: None)
        may_end.set()
        await asyncio.gather(*asked)

    asyncio.run(run())
