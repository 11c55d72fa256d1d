"""Ranks that are threads of this process, with the code of those that are processes: to import torch takes seconds."""

from __future__ import annotations

import pickle
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from lorarep_runtime.device.ranks import Ranks
from lorarep_runtime.engine.follower import Follower
from lorarep_runtime.model.loader import load_model

SECONDS = 20
"""Time after which a rank that waits in a sum fails."""


class Turns:
    """Has one rank compute at a time: others wait where they would wait for that one. Triton's interpreter needs it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._own = threading.local()

    def take(self) -> None:
        self._lock.acquire()
        self._own.is_held = True

    def give(self) -> None:
        self._own.is_held = False
        self._lock.release()

    @contextmanager
    def given(self) -> Iterator[None]:
        """Without this thread's turn, if it has it."""
        was_held = getattr(self._own, "is_held", False)
        if was_held:
            self.give()
        try:
            yield
        finally:
            if was_held:
                self.take()


class ThreadChannel:
    """One end of a `device.ranks.Channel` between threads."""

    def __init__(self, to: queue.Queue[bytes], own: queue.Queue[bytes], turns: Turns) -> None:
        self._to, self._own, self._turns = to, own, turns

    def send(self, message: object) -> None:
        self.send_packed(pickle.dumps(message))

    def send_packed(self, message: bytes) -> None:
        self._to.put(message)

    def receive(self) -> Any:
        with self._turns.given():
            message = self._own.get()
        if not message:
            raise EOFError
        return pickle.loads(message)

    def close(self) -> None:
        self._to.put(b"")


def thread_channels(turns: Turns) -> tuple[ThreadChannel, ThreadChannel]:
    there: queue.Queue[bytes] = queue.Queue()
    back: queue.Queue[bytes] = queue.Queue()
    return ThreadChannel(there, back, turns), ThreadChannel(back, there, turns)


class ThreadGroup:
    """A `device.group.Group` of threads, whose sums are in the order of the ranks."""

    def __init__(self, ranks: int, turns: Turns) -> None:
        self.turns = turns
        self.barrier = threading.Barrier(ranks)
        self._terms: list[Tensor] = [torch.empty(0)] * ranks

    def gathered(self, x: Tensor, rank: int) -> list[Tensor]:
        """The tensors of all ranks, each of which calls this."""
        with self.turns.given():
            self._terms[rank] = x.clone()
            self.barrier.wait(SECONDS)
            terms = list(self._terms)
            self.barrier.wait(SECONDS)
        return terms

    def of(self, rank: int) -> ThreadGroup.Member:
        return ThreadGroup.Member(self, rank)

    class Member:
        def __init__(self, group: ThreadGroup, rank: int) -> None:
            self.rank, self.ranks = rank, len(group._terms)
            self._group = group

        def add_up(self, x: Tensor) -> None:
            first, *others = self._group.gathered(x, self.rank)
            x.copy_(sum(others, first))

        def gather(self, x: Tensor) -> Sequence[Tensor]:
            parts = self._group.gathered(x, self.rank)
            return [] if self.rank else parts

        def share(self, x: Tensor) -> None:
            x.copy_(self._group.gathered(x, self.rank)[0])

        def close(self) -> None: ...


class ThreadRanks(Ranks):
    """Ranks whose others are threads."""

    in_turns = False

    def __init__(self, count: int, module: str, environments: Any) -> None:
        self.in_turns = self.in_turns  # as it is patched now
        self.threads: list[threading.Thread] = []
        self.members: list[ThreadMember] = []
        self._turns = Turns()
        self._all = ThreadGroup(count, self._turns)
        if self.in_turns:
            self._turns.take()
        super().__init__(count, module, environments)

    def _start(self, rank: int, module: str, environment: dict[str, str]) -> None:
        ours, theirs = thread_channels(self._turns)
        self.steps.append(ours)  # type: ignore[arg-type]
        loads, their_loads = thread_channels(self._turns)
        self.loads.append(loads)  # type: ignore[arg-type]
        member = ThreadMember(rank, self._all, theirs, their_loads)
        thread = threading.Thread(target=member.run, args=(self,), daemon=True)
        self.threads.append(thread)
        self.members.append(member)
        thread.start()

    def join(self, device: torch.device) -> Any:
        return self._all.of(0)

    def guarded(self, work: Callable[[], Any]) -> Any:
        return work() if self.in_turns else super().guarded(work)  # turns are threads'

    def answers(self) -> list[Any]:
        with self._turns.given():
            return super().answers()

    def close(self) -> None:
        if self.in_turns and not self._is_closing:
            self._turns.give()
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

    def run(self, ranks: ThreadRanks) -> None:
        if ranks.in_turns:
            self._group.turns.take()
        try:
            self.follower = Follower(self)  # type: ignore[arg-type]
            self.follower.run()
        except Exception as error:
            ranks.fail(error)
            self._group.barrier.abort()  # as gloo notices a process's end
        finally:
            self.steps.close()
            if ranks.in_turns:
                self._group.turns.give()


@contextmanager
def ranks_in_threads(patch: pytest.MonkeyPatch, *, in_turns: bool = False) -> Iterator[None]:
    """Engines of several ranks that are made within have them in threads.

    Args:
        in_turns: whether one of them computes at a time; for engines that are not started.
    """
    lock = threading.Lock()

    def one_at_a_time(*given: Any, **named: Any) -> Any:
        with lock:  # a process's loader patches its libraries
            return load_model(*given, **named)

    with patch.context() as patched:
        patched.setattr(ThreadRanks, "in_turns", in_turns)
        patched.setattr("lorarep_runtime.engine.leader.Ranks", ThreadRanks)
        patched.setattr("lorarep_runtime.model.base.load_model", one_at_a_time)
        yield
