"""Processes that answer questions about what callers and adapters bring, and that end when one takes too much."""

from __future__ import annotations

import atexit
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import Empty, LifoQueue
from typing import Any

from lorarep_runtime.device.process import Process, end_process, start_process

Ask = Callable[[object], dict[str, Any] | None]
"""Gives a process's answer to a question, both as JSON has them; None where it has ended instead."""


class ProcessPool:
    """Up to `count` processes that call a module's function, each started with its first question.

    The function answers each line of standard input by one of standard output, and limits its own time and memory. A
    process that ends instead is replaced with the next question.
    """

    def __init__(self, module: str, function: str, count: int) -> None:
        self._module, self._function = module, function
        self._idle: LifoQueue[Process | None] = LifoQueue()
        for _ in range(count):
            self._idle.put(None)
        atexit.register(self._end_idle)

    @contextmanager
    def taken(self) -> Iterator[Ask]:
        """A context in which a process is this caller's. Waits until one is free."""
        process = self._idle.get()
        try:
            if process is None or process.poll() is not None:
                process = start_process(self._module, self._function)
            its_own = process
            yield lambda question: ask(its_own, question)
        finally:
            self._idle.put(process)

    def _end_idle(self) -> None:
        while True:
            try:
                process = self._idle.get_nowait()
            except Empty:
                return
            if process is not None:
                end_process(process)


def ask(process: Process, question: object) -> dict[str, Any] | None:
    """The answer of a process; None where it has ended instead."""
    assert process.stdin is not None
    assert process.stdout is not None
    line = b""
    try:
        process.stdin.write(json.dumps(question).encode() + b"\n")
        process.stdin.flush()
        line = process.stdout.readline()
    except OSError:
        pass  # it has ended before it has read all
    finally:
        if not line.endswith(b"\n"):
            end_process(process)
    return dict(json.loads(line)) if line.endswith(b"\n") else None
