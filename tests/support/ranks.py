"""Ranks that are threads of this process, with the code of those that are processes: to import torch takes seconds."""

from __future__ import annotations

import pickle
import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from lorarep_runtime.device.ranks import Ranks
from lorarep_runtime.engine.follower import Follower
from lorarep_runtime.model.loader import load_model

SECONDS = 60
"""Time after which a rank that waits in a sum fails."""


class ThreadChannel:
    """One end of a `device.ranks.Channel` between threads."""

    def __init__(self, to: queue.Queue[bytes], own: queue.Queue[bytes]) -> None:
        self._to, self._own = to, own

    def send(self, message: object) -> None:
        self.send_packed(pickle.dumps(message))

    def send_packed(self, message: bytes) -> None:
        self._to.put(message)

    def receive(self) -> Any:
        message = self._own.get()
        if not message:
            raise EOFError
        return pickle.loads(message)

    def close(self) -> None:
        self._to.put(b"")


def thread_channels() -> tuple[ThreadChannel, ThreadChannel]:
    there: queue.Queue[bytes] = queue.Queue()
    back: queue.Queue[bytes] = queue.Queue()
    return ThreadChannel(there, back), ThreadChannel(back, there)


class ThreadGroup:
    """A `device.group.Group` of threads, whose sums are in the order of the ranks."""

    def __init__(self, ranks: int) -> None:
        self.barrier = threading.Barrier(ranks)
        self._terms: list[Tensor] = [torch.empty(0)] * ranks

    def of(self, rank: int) -> ThreadGroup.Member:
        return ThreadGroup.Member(self, rank)

    class Member:
        def __init__(self, group: ThreadGroup, rank: int) -> None:
            self.rank = rank
            self._group = group

        def add_up(self, x: Tensor) -> None:
            group = self._group
            group._terms[self.rank] = x.clone()
            group.barrier.wait(SECONDS)
            x.copy_(sum(group._terms[1:], group._terms[0]))
            group.barrier.wait(SECONDS)

        def close(self, *, failed: bool) -> None: ...


class ThreadRanks(Ranks):
    """Ranks whose others are threads."""

    def __init__(self, count: int, module: str, environments: Any) -> None:
        self.threads: list[threading.Thread] = []
        self._all = ThreadGroup(count)
        super().__init__(count, module, environments)

    def _start(self, rank: int, module: str, environment: dict[str, str]) -> None:
        ours, theirs = thread_channels()
        self.steps.append(ours)  # type: ignore[arg-type]
        loads, their_loads = thread_channels()
        self.loads.append(loads)  # type: ignore[arg-type]
        member = ThreadMember(rank, self._all, theirs, their_loads)
        thread = threading.Thread(target=member.run, args=(self,), daemon=True)
        self.threads.append(thread)
        thread.start()

    def join(self, device: torch.device) -> Any:
        return self._all.of(0)

    def close(self) -> None:
        super().close()
        for thread in self.threads:
            thread.join(SECONDS)


class ThreadMember:
    """A `device.ranks.Member` in a thread of rank 0's process."""

    def __init__(self, rank: int, group: ThreadGroup, steps: ThreadChannel, loads: ThreadChannel) -> None:
        self.rank, self.steps, self.loads = rank, steps, loads
        self._group = group
        self.follower: Follower

    def join(self, device: torch.device) -> Any:
        return self._group.of(self.rank)

    def run(self, ranks: Ranks) -> None:
        try:
            self.follower = Follower(self)  # type: ignore[arg-type]
            self.follower.run()
        except Exception as error:
            ranks.fail(error)
            self._group.barrier.abort()  # as gloo notices a process's end


@contextmanager
def ranks_in_threads(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Engines of several ranks that are made within have them in threads."""
    lock = threading.Lock()

    def one_at_a_time(*given: Any) -> Any:
        with lock:  # a process's loader patches its libraries
            return load_model(*given)

    with patch.context() as patched:
        patched.setattr("lorarep_runtime.engine.leader.Ranks", ThreadRanks)
        patched.setattr("lorarep_runtime.model.base.load_model", one_at_a_time)
        yield
