"""Adapters that several ranks hold parts of: rank 0 has all of them make their parts, and all do or none does.

The ranks make one adapter at a time, together, beside their steps. Rank 0 names it and makes its own part meanwhile.

    rank 0                                   another rank
    (what, number, …)                  ──►   makes its part
                                       ◄──   (PART, fp32 term)        for each sum
    the sum; None: rank 0 gave up      ──►
                                       ◄──   (END, None or its error)
    whether all have made their parts  ──►   keeps it under its number, or drops it
"""

from __future__ import annotations

import itertools
import logging
import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor

from lorarep_runtime.adapters.compile import Sharing
from lorarep_runtime.adapters.maker import AdapterMaker, Source
from lorarep_runtime.adapters.transfers import free_frames, is_out_of_memory, run_loops_serially
from lorarep_runtime.device.ranks import Channel, Ranks
from lorarep_runtime.errors import Cancelled, EngineFailure, LorarepError, first_line
from lorarep_runtime.failpoints import failpoint
from lorarep_runtime.model.base import Base
from lorarep_runtime.model.compiled_adapter import Adapter
from lorarep_runtime.progress import Progress

log = logging.getLogger(__name__)

PART, END = "part", "end"
FREE = "free"


class LeadingMaker(AdapterMaker):
    """Rank 0's maker. Each method raises what went wrong on any rank, and then no rank has kept anything."""

    def __init__(self, base: Base, ranks: Ranks) -> None:
        super().__init__(base)
        self._ranks = ranks
        self._lock = threading.Lock()
        """Whose holder talks to the others."""
        self._numbers = itertools.count(1)
        self._freed: SimpleQueue[int] = SimpleQueue()
        """Numbers of adapters that rank 0 has freed. The last reference may go in any thread, under any lock."""
        self._ended: dict[Channel, Exception | None] = {}
        """How the others have ended that have ended their part of what is being made."""

    def compile(self, source: Source, progress: Progress | None, sharing: Sharing | None = None) -> Adapter:
        shard = self.base.shard
        assert shard is not None
        sharing = Sharing(shard.cut, self._add_up)
        return self._together(lambda: AdapterMaker.compile(self, source, progress, sharing), "compile", source)

    def mix(self, parts: Sequence[tuple[Adapter, float]]) -> Adapter:
        numbered = [(part.number, weight) for part, weight in parts]
        return self._together(lambda: AdapterMaker.mix(self, parts), "mix", numbered)

    def copy(self, adapter: Adapter, device: torch.device) -> Adapter:
        return self._together(lambda: AdapterMaker.copy(self, adapter, device), "copy", adapter.number, device.type)

    def _together(self, make: Callable[[], Adapter], what: str, *arguments: object) -> Adapter:
        with self._lock:
            self._ranks.check()
            number = next(self._numbers)
            self._tell_freed()
            self._tell(what, number, *arguments)
            self._ended = {}
            adapter, error = None, None
            try:
                adapter = make()
            except BaseException as own:
                error = own
            for channel in self._ranks.loads:
                while channel not in self._ended:  # its sums get no answer where this rank has given up
                    if self._take(channel) is not None:
                        self._send(channel, None)
            failed = error or next((e for e in self._ended.values() if e is not None), None)
            for channel in self._ranks.loads:
                self._send(channel, failed is None)
            self._ended = {}
        self._free()
        if failed is not None:
            raise failed
        assert adapter is not None
        adapter = replace(adapter, number=number)
        weakref.finalize(adapter, self._add_freed, number).atexit = False
        return adapter

    def _add_up(self, term: Tensor) -> Tensor:
        waiting: list[Channel] = []
        try:
            total = term.cpu()
            for channel in self._ranks.loads:  # in the order of the ranks
                part = self._take(channel)
                if part is None:
                    raise self._ended[channel] or EngineFailure("the ranks do not make the same")
                waiting.append(channel)
                total = total + torch.from_numpy(part)
        except BaseException:
            for channel in waiting:  # they have sent their terms, and send nothing more before they have an answer
                self._send(channel, None)
            raise
        for channel in self._ranks.loads:
            self._send(channel, total.numpy())
        return total.to(term.device)

    def _take(self, channel: Channel) -> Any:
        """Another rank's next term; None where it has ended its part, as `_ended` says then."""
        try:
            kind, value = channel.receive()
        except (OSError, EOFError) as error:
            raise self._lost(error) from error
        if kind == PART:
            return value
        self._ended[channel] = value
        return None

    def _send(self, channel: Channel, message: object) -> None:
        try:
            channel.send(message)
        except OSError as error:
            raise self._lost(error) from error

    def _tell(self, *message: object) -> None:
        for channel in self._ranks.loads:
            self._send(channel, message)

    def _lost(self, cause: Exception) -> EngineFailure:
        failure = EngineFailure("a rank has ended")
        failure.__cause__ = cause
        self._ranks.fail(failure)
        return failure

    def _add_freed(self, number: int) -> None:
        self._freed.put(number)
        self._free()

    def _free(self) -> None:
        """Has the others free what rank 0 has freed, unless a thread talks to them, which does so at its end."""
        while not self._freed.empty() and self._lock.acquire(blocking=False):
            try:
                self._tell_freed()
            except EngineFailure:
                return
            finally:
                self._lock.release()

    def _tell_freed(self) -> None:
        freed = []
        while not self._freed.empty():
            freed.append(self._freed.get())
        if freed:
            self._tell(FREE, freed)


class FollowingMaker:
    """Another rank's loads: it makes its parts of the adapters that rank 0 names, in a thread of its own."""

    def __init__(self, maker: AdapterMaker, channel: Channel, rank: int) -> None:
        self.adapters: dict[int, Adapter] = {}
        """This rank's parts by their number. The thread of the steps reads it."""
        self._maker = maker
        self._channel = channel
        self._rank = rank
        device = maker.base.device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def run(self) -> None:
        """Makes what it is told until rank 0 has ended."""
        run_loops_serially()
        try:
            while True:
                what, *arguments = self._channel.receive()
                if what == FREE:
                    for number in arguments[0]:
                        self.adapters.pop(number, None)
                else:
                    self._make(what, *arguments)
        except (OSError, EOFError):
            return

    def _make(self, what: str, number: int, *arguments: Any) -> None:
        adapter, error = None, None
        try:
            failpoint(f"adapter-{self._rank}")
            with torch.cuda.stream(self._stream) if self._stream is not None else nullcontext():
                adapter = getattr(self, f"_{what}")(*arguments)
            if self._stream is not None:
                self._stream.synchronize()
        except Exception as raised:
            free_frames(raised)
            error = _portable(raised, self._rank)
        if adapter is not None:
            self.adapters[number] = adapter  # a step may come with it as soon as all ranks have theirs
        self._channel.send((END, error))
        if not self._channel.receive():
            self.adapters.pop(number, None)

    def _compile(self, source: Source) -> Adapter:
        shard = self._maker.base.shard
        assert shard is not None
        return self._maker.compile(source, None, Sharing(shard.cut, self._add_up))

    def _mix(self, parts: Sequence[tuple[int, float]]) -> Adapter:
        return self._maker.mix([(self.adapters[number], weight) for number, weight in parts])

    def _copy(self, number: int, device: str) -> Adapter:
        return self._maker.copy(self.adapters[number], torch.device(device))

    def _add_up(self, term: Tensor) -> Tensor:
        self._channel.send((PART, term.cpu().numpy()))
        total = self._channel.receive()
        if total is None:
            raise Cancelled("rank 0 has given up")
        return torch.from_numpy(total).to(term.device)


def _portable(error: Exception, rank: int) -> Exception:
    """An error that another process can raise. What it says is for the log, except for a LorarepError."""
    if isinstance(error, LorarepError):
        error.__cause__ = error.__context__ = None
        return error
    log.error("rank %d could not make its part of an adapter", rank, exc_info=error)
    said = f"rank {rank}: {first_line(error)}"
    return torch.OutOfMemoryError(said) if is_out_of_memory(error) else RuntimeError(said)
