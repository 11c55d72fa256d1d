"""Which adapters are in device memory, which have a copy in the host's, and which are on disk alone.

A request computes with an adapter on the device, and while it computes the adapter stays. Idle adapters leave when
there is no room for wanted ones: the lowest priority first, then the least recently used. An adapter that leaves
keeps a copy in host memory if there is room, and comes back in the time of a copy instead of a compilation.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import Generic, TypeVar

import torch

from lorarep_runtime.adapters import eviction
from lorarep_runtime.adapters.claim import Claim
from lorarep_runtime.adapters.occupancy import Occupancy, Reservation
from lorarep_runtime.adapters.resident import Resident, State
from lorarep_runtime.adapters.transfers import Copy, Transfers, engine_failure, free_frames, is_out_of_memory
from lorarep_runtime.config import AdapterLimits
from lorarep_runtime.errors import Cancelled, Exhausted, LorarepError
from lorarep_runtime.failpoints import failpoint
from lorarep_runtime.model.compiled_adapter import Adapter, copied_to
from lorarep_runtime.progress import Progress

log = logging.getLogger(__name__)

R = TypeVar("R", bound=Resident)


class Hold(Generic[R]):
    """One request's hold on a resident, which keeps it known until the hold is released. Thread-safe."""

    def __init__(self, residency: Residency, item: R) -> None:
        self.item = item
        self.has_claim = False
        """Whether the last claim was READY or LOADING."""
        self._residency = residency
        self._is_computing = False
        self._load: Future[None] | None = None
        """The load that the last claim waits for."""
        self._ended_uses = 0
        """`Residency.ended_uses` at the last claim."""

    def __enter__(self) -> Hold[R]:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()

    @property
    def adapter(self) -> Adapter | None:
        """The adapter on the device. Only after a claim that was READY."""
        assert self._is_computing
        return self.item.adapter

    def claim(self, *, may_load: bool = True) -> Claim:
        """Has the resident brought to the device, and keeps it there once it has come. Never blocks.

        Args:
            may_load: whether it may be brought. If not, the answer is READY where it is on the device, else NO_MEMORY.

        Raises:
            LorarepError: it cannot be brought.
        """
        with self._residency.changed:
            if self._is_computing:
                return Claim.READY
            if not may_load and self.item.state is not State.ON_DEVICE:
                return Claim.NO_MEMORY
            load, self._load = self._load, None
            error = load.exception() if load is not None and load.done() else None
            # A cancelled load was another caller's: the resident is loaded again.
            if error is not None and not isinstance(error, Cancelled):
                # 1. The load failed for a reason of its own, and so does the request.
                if not isinstance(error, Exhausted):
                    raise error
                # 2. Memory was short, and no request has given any back: wait for those that compute, if there are any.
                if self._ended_uses == self._residency.ended_uses:
                    if not self._residency.is_in_use:
                        raise error
                    self._load, self.has_claim = load, False
                    return Claim.NO_MEMORY
                # 3. A request has ended since: try again.
            claim = self._residency.claim(self.item)
            self._load, self._ended_uses = self.item.load, self._residency.ended_uses
            self._is_computing = claim is Claim.READY
            self.has_claim = claim is not Claim.NO_MEMORY
            return claim

    def wait(self) -> Claim:
        """Blocks while the resident is loaded. Returns READY or NO_MEMORY; raises as `claim`."""
        with self._residency.changed:
            while (claim := self.claim()) is Claim.LOADING:
                self._residency.changed.wait()  # each end of a load or of a move notifies
            return claim

    def prefetch(self) -> None:
        """Has the resident brought to the device if there is room that no other request holds. Never blocks.

        Raises:
            Exhausted: it can never have room.
        """
        self._residency.prefetch(self.item)

    def load(self, progress: Progress | None) -> None:
        """Blocks until the resident is on the device, in room that no other request holds, and keeps it there.

        Raises:
            LorarepError: it cannot be brought; Exhausted if there is no room for now.
        """
        self._residency.load(self.item, progress)
        self._is_computing = True

    def release(self) -> None:
        """Gives the resident back; to be called once."""
        self._residency.release(self.item, was_computing=self._is_computing, had_claim=self.has_claim)


class Residency:
    """Loads adapters, moves them between memories, and makes room for those that requests claim. Thread-safe.

    Args:
        device: where adapters are computed with.
        limits: how many bytes adapters may take there and in host memory.
        copy: copies adapters between the two.
    """

    def __init__(self, device: torch.device, limits: AdapterLimits, copy: Copy = copied_to) -> None:
        self.changed = threading.Condition(threading.RLock())
        """Guards all residents and this object's fields, and the registry's; notified when a load or a move ends."""
        self.evictions = 0
        """Number of adapters that left the device for others."""
        self.ended_uses = 0
        """Number of holds that have ended while their adapter was in use; each may have freed device memory."""
        self.version = 0
        """Changes whenever there may be more room than before."""
        self._limits = limits
        self.transfers = Transfers(device, copy)
        """The threads that load and copy; its own listeners are told of each load."""
        self._occupancy = Occupancy(limits, self.transfers.host_size)
        self._tick = 0
        self._listeners: list[Callable[[], None]] = []

    def subscribe(self, listener: Callable[[], None]) -> None:
        """Has `listener` called, in any thread, when an adapter came to the device, could not come, or may leave."""
        self._listeners.append(listener)

    def _notify(self) -> None:
        for listener in self._listeners:
            listener()

    # What requests ask for.

    def hold(self, item: R) -> Hold[R]:
        """A request's hold on an item, running or not, until it is released."""
        with self.changed:
            item.leases += 1
            self._touch(item)
            return Hold(self, item)

    def release(self, item: Resident, *, was_computing: bool, had_claim: bool) -> None:
        """Ends a request's hold; see `Hold.release`."""
        with self.changed:
            item.leases -= 1
            if was_computing:
                item.users -= 1
                self.ended_uses += 1
            if not item.leases or (had_claim and not was_computing):
                item.is_promised = False
            self._forget_unwanted(item)
            if not item.leases and item.state is State.ON_DISK:
                item.free_extras()
            self.version += 1
        if was_computing:
            self._notify()

    def claim(self, item: Resident) -> Claim:
        """Takes an item into use if it is on the device; else has it loaded, for which idle ones leave.

        Raises:
            Exhausted: it can never have room.
        """
        with self.changed:
            if item.state is State.ON_DEVICE:
                self._use(item)
                item.is_promised = False
                return Claim.READY
            has_to_load = item.state in (State.ON_DISK, State.IN_HOST)
            if has_to_load and not self._start_load(item, for_claim=True):
                return Claim.NO_MEMORY
            item.is_promised = True
            return Claim.LOADING

    def prefetch(self, item: Resident, progress: Progress | None = None) -> None:
        """Has an item loaded that will be needed, if there is room that no other request holds or waits for.

        Raises:
            Exhausted: it can never have room.
        """
        with self.changed:
            if item.state in (State.ON_DISK, State.IN_HOST):
                self._start_load(item, for_claim=False, progress=progress)

    def load(self, item: Resident, progress: Progress | None) -> None:
        """Blocks until an item is on the device, and takes it into use; see `Hold.load`."""
        with self.changed:
            while item.state is not State.ON_DEVICE:
                self.changed.wait_for(lambda: item.state is not State.LEAVING)
                self.prefetch(item, progress)
                if (load := item.load) is not None:
                    self.changed.wait_for(load.done)
                    load.result()
                elif item.adapter is None:
                    limit = self._limits.device_bytes
                    raise Exhausted(
                        f"adapter memory: {item.size} bytes wanted, {limit} taken by adapters in use", retry_after=1.0
                    )
            self._use(item)

    # What operators decide.

    def set_policy(self, item: Resident, *, pinned: bool | None = None, priority: int | None = None) -> None:
        """Says how long an item stays on the device; None leaves a part of that as it is."""
        with self.changed:
            item.pinned = item.pinned if pinned is None else pinned
            item.priority = item.priority if priority is None else priority

    def publish(self, item: Resident, *, instead_of: Resident | None = None) -> None:
        """Lets new requests find an item from now on, and perhaps another item no more."""
        with self.changed:
            item.is_published = True
            self._touch(item)
            if instead_of is not None and instead_of is not item:
                self.retire(instead_of)

    def retire(self, item: Resident) -> None:
        """Lets no new request find an item. It is freed with the last request that holds it."""
        with self.changed:
            item.is_published = False
            self._forget_unwanted(item)

    # What there is.

    @property
    def is_in_use(self) -> bool:
        """Whether any request computes with an adapter."""
        with self.changed:
            return any(item.users for item in self._occupancy.on_device())

    def taken(self) -> list[tuple[Resident, tuple[int, int]]]:
        """All that take device or host memory, and the bytes of both, at one moment."""
        with self.changed:
            return self._occupancy.taken()

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory that copies take."""
        return self._occupancy.host_bytes

    # Room; always under the lock.

    def _touch(self, item: Resident) -> None:
        self._tick += 1
        item.used = self._tick

    def _use(self, item: Resident) -> None:
        item.users += 1
        self._touch(item)

    def _forget_unwanted(self, item: Resident) -> None:
        # What is leaving goes when it has left: a thread still reads its memory.
        if not item.is_wanted and item.state is not State.LEAVING:
            item.forget()
            self._occupancy.update(item)
            self.version += 1

    def _start_load(self, item: Resident, *, for_claim: bool, progress: Progress | None = None) -> bool:
        """Has a thread load an item, for which others leave; returns False if there is no room for now."""
        # What it is made from stays on the device, as if it were in use.
        sources = [] if item.copy is not None else [x for x in item.sources if x.state is State.ON_DEVICE]
        for source in sources:
            source.keep()
        victims = None
        try:
            victims = self._occupancy.choose_victims(item, for_claim, sources)
        finally:
            if victims is None:
                self._give_back(sources)
        if victims is None:
            return False
        for victim in victims:
            victim.begin_leaving()
        reservation = self._occupancy.reserve(item, victims, sources)
        bring = partial(self._bring, item, reservation, victims, for_claim, progress)
        self.transfers.submit(item, partial(self._load_in_thread, item, item.begin_load(), reservation, bring))
        return True

    def _give_back(self, sources: Sequence[Resident]) -> None:
        for source in sources:
            source.give_back()
            self._forget_unwanted(source)

    # Loads and moves; in threads, with the lock held for moments only.

    def _load_in_thread(
        self, item: Resident, load: Future[None], reservation: Reservation, bring: Callable[[], Adapter | BaseException]
    ) -> None:
        result = bring()
        # The state and the load's result change under one lock: no thread sees one without the other.
        with self.changed:
            self._occupancy.release(reservation)
            self._give_back(reservation.sources)
            if isinstance(result, Adapter) and item.is_wanted:
                item.arrive(result)
                self._touch(item)
            else:
                item.give_up_load()
            self._occupancy.update(item)
            if isinstance(result, Adapter):
                load.set_result(None)
            else:
                load.set_exception(result)
            self.version += 1
            self.changed.notify_all()
        self._notify()

    def _bring(
        self,
        item: Resident,
        reservation: Reservation,
        victims: Sequence[Resident],
        for_claim: bool,
        progress: Progress | None,
    ) -> Adapter | BaseException:
        """An item's adapter in device memory, once its victims have left; or why it cannot be there."""
        try:
            with ExitStack() as leaving:  # all leave, also where one fails to
                for victim in reversed(victims):
                    leaving.callback(self._move_out, victim, reservation)
            while True:
                try:
                    failpoint("adapter")
                    return self.transfers.to_device(item, progress)
                except RuntimeError as error:
                    # Others than us may hold the device's memory: only taking memory shows that it is short.
                    if not is_out_of_memory(error):
                        raise
                    victim = self._next_victim(item, for_claim, error)
                self._move_out(victim)
        except LorarepError as refusal:
            free_frames(refusal)
            return refusal
        except Exception as failure:
            log.exception("an adapter could not be brought to the device")
            free_frames(failure)
            return engine_failure(failure)
        except BaseException as panic:  # a panic of a library in Rust is no Exception
            free_frames(panic)
            return panic

    def _next_victim(self, item: Resident, for_claim: bool, cause: Exception) -> Resident:
        """The first that has to leave since the device was out of memory; raises Exhausted if none may."""
        with self.changed:
            victim = eviction.first(self._occupancy.evictable(for_claim))
            if victim is None:
                raise Exhausted(
                    f"device memory: no room for an adapter of {item.size} bytes", retry_after=1.0
                ) from cause
            victim.begin_leaving()
            return victim

    def _move_out(self, item: Resident, reservation: Reservation | None = None) -> None:
        """Moves a leaving item to host memory, if that has room, and gives its device memory to a reservation."""
        adapter, copy, reserved = item.adapter, None, 0
        assert adapter is not None
        try:
            if item.copy is None:
                with self.changed:
                    reserved = self._occupancy.reserve_host(adapter)
                copy = self.transfers.to_host(adapter) if reserved else None
        finally:
            with self.changed:
                self._occupancy.release_host(reserved)
                item.leave(copy)
                self._occupancy.update(item)
                if reservation is not None:
                    reservation.free_up(item.size)
                self._forget_unwanted(item)
                self.evictions += 1
                self.version += 1
                self.changed.notify_all()
        self._notify()
