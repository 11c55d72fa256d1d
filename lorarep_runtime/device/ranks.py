"""The processes of the ranks that share a model, one for each device, and the messages that this one sends to them.

This process is rank 0 and the only one that decides anything. The others do what they are told, and end with it: their
standard input ends then, however this process ends.
"""

from __future__ import annotations

import logging
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lorarep_runtime.device.group import Group
from lorarep_runtime.errors import EngineFailure

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

T = TypeVar("T")

GRACE = 5.0
"""Seconds that the others have to end, once they are told."""


class Channel:
    """Messages of two processes of this server, in their order. One thread at each end at a time."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def send(self, message: object) -> None:
        """Sends anything that pickle knows. Raises OSError where the other process has ended."""
        self.send_packed(packed(message))

    def send_packed(self, message: bytes) -> None:
        """As `send`, of what `packed` made."""
        self._connection.send_bytes(message)

    def receive(self) -> Any:
        """Waits for the next message. Raises EOFError or OSError where the other process has ended."""
        return pickle.loads(self._connection.recv_bytes())

    def close(self) -> None:
        """The other process gets all that was sent, and then EOFError."""
        self._connection.close()


def packed(message: object) -> bytes:
    """A message as `Channel.send_packed` sends it."""
    return pickle.dumps(message, pickle.HIGHEST_PROTOCOL)


class Ranks:
    """The other ranks, as rank 0 sees them. Any thread may use it, but each channel only one at a time."""

    def __init__(self, count: int, module: str, environments: Sequence[dict[str, str]]) -> None:
        """Starts the processes, which takes them seconds. They call `main` of a module.

        Args:
            count: of all ranks, this one included.
            module: its `main` reads `Member`.
            environments: further variables of each other rank.
        """
        self.count = count
        self._store = Path(tempfile.mkdtemp(prefix="lorarep-ranks-")) / "store"
        self._group: Group | None = None
        self.failure: BaseException | None = None
        """The first error of another rank that has ended the work of all."""
        self._listeners: list[Callable[[BaseException], None]] = []
        self._changed = threading.Condition()
        self._is_closing = False
        self.steps: list[Channel] = []
        """One to each other rank, for what has to be in the steps' order."""
        self.loads: list[Channel] = []
        """One to each other rank, for loads of adapters beside the steps."""
        self._processes: list[subprocess.Popen[bytes]] = []
        self._answers: Sequence[deque[Any]] = [deque() for _ in environments]
        """Of each other rank, those that nobody has taken."""
        self._readers: list[threading.Thread] = []
        for rank, environment in enumerate(environments, 1):
            self._start(rank, module, environment)
            given = self.steps[-1], self._answers[rank - 1]
            reader = threading.Thread(target=self._read, args=given, name=f"lorarep-answers-{rank}", daemon=True)
            self._readers.append(reader)
            reader.start()

    def _start(self, rank: int, module: str, environment: dict[str, str]) -> None:
        steps, loads = socket.socketpair(), socket.socketpair()
        theirs = [pair[1].fileno() for pair in (steps, loads)]
        arguments = [rank, self.count, *theirs, self._store]
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", f"from {module} import main; main()", *map(str, arguments)],
            stdin=subprocess.PIPE,
            pass_fds=theirs,
            env={**os.environ, **environment, "PYTHONPATH": os.pathsep.join(sys.path)},
            start_new_session=True,  # Ctrl-C is the server's
        )
        for channels, (ours, other) in ((self.steps, steps), (self.loads, loads)):
            other.close()
            channels.append(Channel(Connection(ours.detach())))
        self._processes.append(process)
        threading.Thread(target=self._watch, args=(rank, process), name=f"lorarep-rank-{rank}", daemon=True).start()

    def _watch(self, rank: int, process: subprocess.Popen[bytes]) -> None:
        status = process.wait()
        if not self._is_closing:
            how = f"by {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
            self.fail(EngineFailure(f"rank {rank} has ended {how}"))

    def _read(self, channel: Channel, answers: deque[Any]) -> None:
        """Takes in a rank's answers. One that refuses has failed, whatever this process waits for."""
        try:
            while True:
                refusal, answer = channel.receive()
                if refusal is not None:
                    self.fail(refusal)
                with self._changed:
                    answers.append(answer)
                    self._changed.notify_all()
        except (EOFError, OSError):
            return  # `_watch` says how the process ended

    def join(self, device: torch.device) -> Group:
        """Rank 0's place among the ranks, which all join at the same time.

        Args:
            device: where its tensors are.
        """
        self._group = Group(0, self.count, self._store, device)
        return self._group

    @property
    def processes(self) -> Sequence[int]:
        """Process ids of the other ranks."""
        return [process.pid for process in self._processes]

    def subscribe(self, listener: Callable[[BaseException], None]) -> None:
        """Has `listener` called, in any thread, with the error that ends the work of all ranks."""
        with self._changed:
            self._listeners.append(listener)
            failure = self.failure
        if failure is not None:
            listener(failure)

    def fail(self, error: BaseException) -> None:
        """Ends the work of all ranks: they no longer agree on what they compute."""
        with self._changed:
            if self.failure is not None or self._is_closing:
                return
            self.failure = error
            listeners = list(self._listeners)
            self._changed.notify_all()
        log.error("the ranks have failed: %s", error)
        for listener in listeners:
            listener(error)

    def guarded(self, work: Callable[[], T]) -> T:
        """What `work` returns, done in a thread of its own. Where a rank fails, its error is raised at once.

        What libraries make the thread wait for then may not come for minutes: the thread is left to itself.
        """
        ended: Future[T] = Future()

        def run() -> None:
            try:
                ended.set_result(work())
            except BaseException as error:
                ended.set_exception(error)
            with self._changed:
                self._changed.notify_all()

        threading.Thread(target=run, name="lorarep-start-ranks", daemon=True).start()
        with self._changed:
            self._changed.wait_for(lambda: self.failure is not None or ended.done())
            if self.failure is not None and not ended.done():
                raise self.failure
        return ended.result()

    @contextmanager
    def together(self) -> Iterator[None]:
        """Work that the others do as well: an error within ends the work of all, who wait for this rank."""
        try:
            yield
        except Exception as error:
            self.fail(error)
            raise

    def check(self) -> None:
        """Raises EngineFailure where the ranks have failed."""
        if self.failure is not None:
            raise EngineFailure("the ranks have failed") from self.failure

    def tell(self, *message: object) -> None:
        """Sends a message to all others, in the order of steps; raises EngineFailure where one has ended."""
        self.check()
        try:
            data = packed(message)
            for channel in self.steps:
                channel.send_packed(data)
        except OSError as error:
            raise self._ended(error) from error

    def answers(self) -> list[Any]:
        """Waits for an answer of each other rank to what it was told; raises the error of the first that fails."""
        with self._changed:
            self._changed.wait_for(lambda: self.failure is not None or all(self._answers))
            if self.failure is not None:
                raise self.failure
            return [of_rank.popleft() for of_rank in self._answers]

    def ask(self, *message: object) -> list[Any]:
        """The others' answers to a message. Raises as `tell` and `answers`."""
        self.tell(*message)
        return self.answers()

    def _ended(self, cause: BaseException) -> EngineFailure:
        failure = EngineFailure("a rank has ended")
        failure.__cause__ = cause
        self.fail(failure)
        return failure

    def close(self) -> None:
        """Ends the other processes, and waits for them; again does nothing."""
        with self._changed:
            if self._is_closing:
                return
            self._is_closing = True
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()
        for process in self._processes:
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for reader in self._readers:
            reader.join(GRACE)
        for channel in (*self.steps, *self.loads):
            channel.close()
        if self._group is not None:
            self._group.close()
        shutil.rmtree(self._store.parent, ignore_errors=True)


class Member:
    """Another rank's own process, as it was started by `Ranks`. Ends the process when rank 0 has ended."""

    def __init__(self) -> None:
        rank, ranks, steps, loads, store = sys.argv[1:]
        self.rank, self.ranks = int(rank), int(ranks)
        self.steps, self.loads = Channel(Connection(int(steps))), Channel(Connection(int(loads)))
        self._store = Path(store)
        # Whoever ends the whole server, ends rank 0: it lets streams finish first.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        threading.Thread(target=self._end_with_rank_0, daemon=True).start()

    def join(self, device: torch.device) -> Group:
        """This rank's place among the ranks, as `Ranks.join`."""
        return Group(self.rank, self.ranks, self._store, device)

    def _end_with_rank_0(self) -> None:
        while os.read(0, 1):
            pass
        os._exit(0)
