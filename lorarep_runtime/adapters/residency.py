"""Where adapters are: in device memory, as a copy in the host's, or on disk alone.

A request computes with what is on the device, and while it does that stays. What nobody uses leaves when there is no
room for what somebody wants: the lowest priority first, then the least recently used. It leaves a copy in host memory,
from which it comes back in the time of a copy and not of a compilation.
"""

from __future__ import annotations

import enum
import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from threadpoolctl import threadpool_limits

from lorarep_runtime.config import AdapterLimits
from lorarep_runtime.errors import EngineFailure, Exhausted, LorarepError
from lorarep_runtime.failpoints import failpoint
from lorarep_runtime.model.compiled_adapter import Adapter, moved
from lorarep_runtime.progress import Progress

log = logging.getLogger(__name__)

COMPILING, COPYING = 8, 2
"""Adapters on their way to the device at the same time: from their files, and from the host's memory."""


class Claim(enum.Enum):
    """What a request finds when it is to start."""

    READY = enum.auto()
    LOADING = enum.auto()
    NO_MEMORY = enum.auto()
    """All the memory is in use, by running requests and by what is on its way for others."""


class Resident(ABC):
    """An adapter's revision, or a mix of several. Its fields are the residency' alone, under their lock."""

    def __init__(self, size: int) -> None:
        self.size = size
        """Bytes it will take on the device."""
        self.adapter: Adapter | None = None
        """On the device."""
        self.copy: Adapter | None = None
        """In the host's memory."""
        self.fetch: Future[None] | None = None
        """Its way to the device."""
        self.has_name = False
        """Whether new requests can find it."""
        self.leases = 0
        """Requests that hold it, running or not."""
        self.users = 0
        """Those that compute with it: it cannot leave."""
        self.pinned = False
        self.priority = 0
        self.used = 0
        """Tick of the last use."""
        self.is_leaving = False
        """On its way from the device."""
        self.is_promised = False
        """To a request whose turn it is."""

    @abstractmethod
    def make(self, progress: Progress | None) -> Adapter:
        """Compiles it anew; raises LorarepError."""

    @property
    def scratch(self) -> int:
        """Device bytes that `make` takes besides."""
        return 0

    @property
    def is_wanted(self) -> bool:
        return self.has_name or self.leases > 0

    def cool(self) -> None:  # noqa: B027 (most have nothing to do)
        """Told when it is neither on the device nor in the host's memory any more."""


@dataclass(eq=False)
class _Room:
    """Device memory for what is on its way."""

    size: int
    taken: int
    """Bytes of it that are kept free; what is leaving still takes the rest."""


def work_alone() -> None:
    """Keeps torch's parallel loops in this thread from then on.

    Every thread that runs one gets an OpenMP team of its own, for as long as it lives; and once there are more threads
    in teams than processors, GNU's OpenMP lets the engine's sleep, too, between any two products of a step.
    """
    torch.get_num_threads()  # or the first loop would set them again
    threadpool_limits(1, user_api="openmp")


class Residency:
    """Thread-safe. `changed` guards everything here and in the pool."""

    def __init__(self, device: torch.device, limits: AdapterLimits) -> None:
        self.changed = threading.Condition(threading.RLock())
        self._listeners: list[Callable[[], None]] = []
        self.evictions = 0
        """How many left the device for others."""
        self.given_back = 0
        """How often a request has ended that computed with an adapter."""
        self.version = 0
        """Another number when there may be more room than before."""
        self._device = device
        self._limits = limits
        self._here: set[Resident] = set()
        self._copies: set[Resident] = set()
        self._rooms: set[_Room] = set()
        """Of what is on its way to the device."""
        self._promised_host_bytes = 0
        """Of what is on its way to the host."""
        self._tick = 0
        # Apart: a file may have to come from a Hub that does not answer.
        self._compiling = ThreadPoolExecutor(COMPILING, "lorarep-adapter", initializer=work_alone)
        self._copying = ThreadPoolExecutor(COPYING, "lorarep-copy", initializer=work_alone)
        # One for all: libraries keep tens of megabytes for each stream that they have worked on.
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def subscribe(self, listener: Callable[[], None]) -> None:
        """Has `listener` called, in any thread, when an adapter came to the device, left it, or could not come."""
        self._listeners.append(listener)

    def _notify(self) -> None:
        for listener in self._listeners:
            listener()

    # What requests do.

    def claim(self, item: Resident) -> Claim:
        """For a request that is to start. If it is here it counts as used, until `leave`. If not it is sent for, and
        others leave for it unless they are in use.

        Raises:
            Exhausted: it can never have room.
        """
        with self.changed:
            if item.adapter is not None and not item.is_leaving:
                item.users += 1
                item.is_promised = False
                self._touch(item)
                return Claim.READY
            if item.fetch is None and not item.is_leaving and not self._send_for(item, for_turn=True):
                return Claim.NO_MEMORY
            item.is_promised = True
            return Claim.LOADING

    def leave(self, item: Resident) -> None:
        """A request that had its turn has ended."""
        with self.changed:
            item.users -= 1
            self.given_back += 1
            self.version += 1

    def prefetch(self, item: Resident, progress: Progress | None = None) -> Future[None] | None:
        """Sends for what will be needed, if there is room beside what other requests hold or wait for.

        Returns:
            Its way to the device; None if it is there, or there is no room for now.

        Raises:
            Exhausted: it can never have room.
        """
        with self.changed:
            if item.adapter is None and not item.is_leaving and item.fetch is None:
                self._send_for(item, for_turn=False, progress=progress)
            return item.fetch

    def hold(self, item: Resident) -> None:
        """A request holds it, running or not."""
        with self.changed:
            item.leases += 1
            self._touch(item)

    def let_go(self, item: Resident) -> None:
        with self.changed:
            item.leases -= 1
            if not item.leases:
                item.is_promised = False
                self._forget_unwanted(item)
            self.version += 1

    def name(self, item: Resident, has_name: bool) -> None:
        """Whether new requests can find it. What has no name goes with the last request that holds it."""
        with self.changed:
            item.has_name = has_name
            self._forget_unwanted(item)

    @property
    def in_use(self) -> bool:
        """Whether requests compute with any."""
        with self.changed:
            return any(item.users for item in self._here)

    def here(self) -> list[Resident]:
        """What is on the device."""
        with self.changed:
            return list(self._here)

    @property
    def host_bytes(self) -> int:
        """Of copies in the host's memory."""
        with self.changed:
            return sum(self._host_size(item.copy) for item in self._copies if item.copy is not None)

    def _host_size(self, adapter: Adapter) -> int:
        """What a copy of it takes. PyTorch pins memory in powers of two (CachingHostAllocator)."""
        size = adapter.storage.nbytes
        return 1 << (size - 1).bit_length() if self._device.type == "cuda" else size

    # Room. All of it under the lock.

    def _touch(self, item: Resident) -> None:
        self._tick += 1
        item.used = self._tick

    def _forget_unwanted(self, item: Resident) -> None:
        if not item.is_wanted and not item.is_leaving:
            item.adapter = item.copy = None
            self._here.discard(item)
            self._copies.discard(item)
            self.version += 1

    def _send_for(self, item: Resident, *, for_turn: bool, progress: Progress | None = None) -> bool:
        """Has it fetched; False if there is no room."""
        size = item.size + (0 if item.copy is not None else item.scratch)
        limit = self._limits.device_bytes
        leaving: list[Resident] = []
        if limit is not None:
            pinned = sum(x.size for x in self._here if x.pinned and x is not item)
            if size > limit - pinned:
                besides = f" beside {pinned} of pinned ones" if pinned else ""
                raise Exhausted(f"adapter memory: {size} bytes wanted, the limit is {limit}{besides}")
            free = limit - sum(room.taken for room in self._rooms) - sum(x.size for x in self._here)
            idle = iter(self._idle(for_turn=for_turn))
            while free < size:
                if (victim := next(idle, None)) is None:
                    return False
                leaving.append(victim)
                free += victim.size
        for victim in leaving:
            victim.is_leaving = True
        room = _Room(size, max(0, size - sum(victim.size for victim in leaving)))
        self._rooms.add(room)
        threads = self._compiling if item.copy is None else self._copying
        item.fetch = threads.submit(self._fetch, item, room, leaving, for_turn, progress)
        item.fetch.add_done_callback(lambda _: self._fetched(item))
        return True

    def _idle(self, *, for_turn: bool) -> list[Resident]:
        """What may leave, in the order in which it does: nothing that waiting requests hold, or, for one whose turn it
        is, that after the rest."""
        idle = [
            x
            for x in self._here
            if not (x.users or x.pinned or x.is_leaving or x.is_promised) and (for_turn or not x.leases)
        ]
        return sorted(idle, key=lambda x: (x.leases > 0, x.priority, x.used))

    def _fetched(self, item: Resident) -> None:
        with self.changed:
            item.fetch = None
            self.version += 1
            self.changed.notify_all()
        self._notify()

    # Ways. In the threads, without the lock but for moments.

    def _fetch(
        self, item: Resident, room: _Room, leaving: list[Resident], for_turn: bool, progress: Progress | None
    ) -> None:
        adapter = None
        try:
            for victim in leaving:
                self._move_out(victim, room)
            adapter = self._made(item, for_turn, progress)
        except LorarepError:
            raise
        except Exception as error:
            log.exception("an adapter could not be brought to the device")
            raise EngineFailure("the adapter could not be loaded") from error
        finally:
            with self.changed:
                self._rooms.remove(room)
                if adapter is not None and item.is_wanted:
                    item.adapter, item.size = adapter, adapter.nbytes
                    self._here.add(item)
                    self._touch(item)

    def _made(self, item: Resident, for_turn: bool, progress: Progress | None) -> Adapter:
        while True:
            try:
                failpoint("adapter")
                with self.beside_steps():
                    copy = item.copy
                    return item.make(progress) if copy is None else moved(copy, self._device)
            except RuntimeError as error:
                # Others than us may hold the device's memory: that it is short shows when it is taken.
                if not _is_out_of_memory(error):
                    raise
                with self.changed:
                    victim = next(iter(self._idle(for_turn=for_turn)), None)
                    if victim is None:
                        raise Exhausted(
                            f"device memory: no room for an adapter of {item.size} bytes", retry_after=1.0
                        ) from error
                    victim.is_leaving = True
                self._move_out(victim)

    def _move_out(self, item: Resident, room: _Room | None = None) -> None:
        """From the device to the host, where it has room there. Its own on the device goes over to somebody's."""
        adapter, copy = item.adapter, item.copy
        assert adapter is not None
        size = self._host_size(adapter)
        if copy is None and self._take_host_room(size):
            try:
                with self.beside_steps():
                    copy = moved(adapter, torch.device("cpu"))
            except RuntimeError:
                log.exception("no copy of an adapter in host memory")
            finally:
                with self.changed:
                    self._promised_host_bytes -= size
                    if copy is not None:
                        item.copy = copy
                        self._copies.add(item)
        with self.changed:
            item.adapter, item.is_leaving = None, False
            self._here.discard(item)
            if room is not None:
                room.taken = min(room.size, room.taken + item.size)
            if item.copy is None:
                item.cool()
            self._forget_unwanted(item)
            self.evictions += 1
            self.version += 1
            self.changed.notify_all()
        self._notify()

    def _take_host_room(self, size: int) -> bool:
        """Room for another copy; others go for it: those of what is on the device, then the least recently used."""
        limit = self._limits.host_bytes
        if size > limit:
            return False
        with self.changed:
            others = [item for item in self._copies if item.fetch is None]
            others.sort(key=lambda x: (x.adapter is None, x.priority, x.used))
            while self.host_bytes + self._promised_host_bytes + size > limit and others:
                self._drop_copy(others.pop(0))
            fits = self.host_bytes + self._promised_host_bytes + size <= limit
            self._promised_host_bytes += size if fits else 0
            return fits

    def _drop_copy(self, item: Resident) -> None:
        item.copy = None
        self._copies.discard(item)
        if item.adapter is None:
            item.cool()

    @contextmanager
    def beside_steps(self) -> Iterator[None]:
        """On a GPU, work within goes on beside the steps under way instead of among them, and is done at the end."""
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            yield
        self._stream.synchronize()


def _is_out_of_memory(error: Exception) -> bool:
    """PyTorch has no class of its own for the CPU's memory."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
