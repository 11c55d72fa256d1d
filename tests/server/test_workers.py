"""Threads of admission: work that has not begun goes with its caller, and work that has begun keeps its caller."""

from __future__ import annotations

import asyncio
import threading

import pytest
from lorarep_server.requests.workers import AdmissionThreads, run_apart

from tests.support.servers import SECONDS


def test_work_that_has_not_begun_goes_with_its_caller_and_work_that_has_keeps_it() -> None:
    may_end, begun = threading.Event(), []

    def work(number: int) -> int:
        begun.append(number)
        may_end.wait(SECONDS)
        return number

    async def calls() -> None:
        threads = AdmissionThreads(2)
        tasks = [asyncio.create_task(threads.run(work, number)) for number in range(10)]
        while len(begun) < 2:  # noqa: ASYNC110 (threads know no event loop)
            await asyncio.sleep(0.01)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks[2:])
        assert begun == [0, 1]
        await asyncio.sleep(0.05)
        assert not any(task.done() for task in tasks[:2])
        may_end.set()
        assert threads.turns == 2
        assert await threads.run(work, 10) == 10  # the thread of one that left
        await asyncio.wait(tasks)
        assert all(task.cancelled() for task in tasks)
        assert threads.turns == 6

    asyncio.run(calls())
    assert begun == [0, 1, 10]


def test_a_second_cancellation_waits_for_nothing() -> None:
    may_end = threading.Event()

    async def call() -> None:
        task = asyncio.create_task(AdmissionThreads(1).run(may_end.wait, SECONDS))
        for _ in range(2):
            await asyncio.sleep(0.05)
            task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        may_end.set()

    asyncio.run(call())


def test_work_apart_needs_no_thread_of_the_event_loop() -> None:
    may_end = threading.Event()

    async def end() -> bool:
        loop = asyncio.get_running_loop()
        hung = [loop.run_in_executor(None, may_end.wait, SECONDS) for _ in range(64)]
        assert await run_apart(lambda: True)
        may_end.set()
        return all(await asyncio.gather(*hung))

    assert asyncio.run(end())
