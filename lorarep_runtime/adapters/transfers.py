"""How adapters get into device and host memory: the threads, the stream and the copies."""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from threadpoolctl import threadpool_limits

from lorarep_runtime.adapters.resident import Resident, Tier
from lorarep_runtime.errors import EngineFailure
from lorarep_runtime.integers import next_power_of_two
from lorarep_runtime.model.compiled_adapter import Adapter, copied_to
from lorarep_runtime.progress import Progress

log = logging.getLogger(__name__)

COMPILE_THREADS, COPY_THREADS = 8, 2
"""Most adapters that are loaded concurrently from their files, and from host memory."""


Copy = Callable[[Adapter, torch.device], Adapter]
"""`copied_to`, or the same on several devices."""


class Transfers:
    """The threads that load adapters, and the work that they do concurrently with the engine's steps."""

    def __init__(self, device: torch.device, copy: Copy = copied_to) -> None:
        self._device = device
        self._copy = copy
        # Separate threads: a compilation may wait for files from a Hub that does not answer, and a copy must not.
        self._compiling = ThreadPoolExecutor(COMPILE_THREADS, "lorarep-adapter", initializer=run_loops_serially)
        self._copying = ThreadPoolExecutor(COPY_THREADS, "lorarep-copy", initializer=run_loops_serially)
        # One stream for all threads: libraries keep tens of megabytes for each stream that they have worked on.
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._listeners: list[Callable[[Tier, float], None]] = []

    def subscribe(self, listener: Callable[[Tier, float], None]) -> None:
        """Has `listener` called, in any thread, for each adapter that has come to the device.

        It gets the tier that the adapter came from and the seconds that this took. Mixes do not count.
        """
        self._listeners.append(listener)

    def submit(self, item: Resident, work: Callable[[], None]) -> None:
        """Has a thread do the work of loading an item. Those with a host copy wait for no compilation."""
        threads = self._compiling if item.copy is None else self._copying
        threads.submit(work)

    def to_device(self, item: Resident, progress: Progress | None) -> Adapter:
        """An item's adapter on the device: copied from host memory where that has it, else made anew.

        Raises:
            LorarepError: it cannot be made.
            RuntimeError: memory is short (see `is_out_of_memory`), or the device fails.
        """
        started, copy = time.monotonic(), item.copy
        with self._own_stream():
            adapter = item.make(progress) if copy is None else self._copy(copy, self._device)
        if not item.sources:
            for listener in self._listeners:
                listener("disk" if copy is None else "host", time.monotonic() - started)
        return adapter

    def to_host(self, adapter: Adapter) -> Adapter | None:
        """A copy in host memory; None, and a line in the log, where the host has no memory for it."""
        try:
            with self._own_stream():
                return self._copy(adapter, torch.device("cpu"))
        except (RuntimeError, MemoryError):
            log.exception("no copy of an adapter in host memory")
            return None

    def host_size(self, adapter: Adapter) -> int:
        """Host memory of an adapter's copy. PyTorch pins memory in powers of two (CachingHostAllocator)."""
        size = adapter.storage.nbytes
        return next_power_of_two(size) if self._device.type == "cuda" else size

    @contextmanager
    def _own_stream(self) -> Iterator[None]:
        """On a GPU, the work within runs concurrently with the engine's steps, and is done at the end."""
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            yield
        self._stream.synchronize()


def run_loops_serially() -> None:
    """Keeps torch's parallel loops in the calling thread from then on.

    Each thread that runs a parallel loop gets an OpenMP team of its own, which lives as long as the thread. Once all
    teams have more threads than there are processors, GNU's OpenMP puts the engine's team to sleep within each step.
    """
    torch.get_num_threads()  # else the first loop would set the number again
    threadpool_limits(1, user_api="openmp")


def is_out_of_memory(error: Exception) -> bool:
    """Whether torch had no memory left. PyTorch has no class of its own for the CPU's memory."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def free_frames(error: BaseException) -> None:
    """Frees all that the functions of a failed load had, device memory above all.

    The load keeps the error, and the error its traceback with every function's variables. Callers that raise the error
    again become part of the traceback, and such circles stay until Python's garbage collector finds them.
    """
    at: BaseException | None = error
    while at is not None:
        traceback.clear_frames(at.__traceback__)
        at = at.__cause__ or at.__context__


def engine_failure(cause: Exception) -> EngineFailure:
    """The error of a load that failed for a reason that is no LorarepError."""
    failure = EngineFailure("the adapter could not be loaded")
    failure.__cause__ = cause
    return failure
