"""The bytes that adapters take of device and host memory, and the adapters that have to go so that others fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lorarep_runtime.adapters import eviction
from lorarep_runtime.adapters.eviction import Evictable
from lorarep_runtime.adapters.resident import Resident, State
from lorarep_runtime.config import AdapterLimits
from lorarep_runtime.errors import Exhausted
from lorarep_runtime.model.compiled_adapter import Adapter


@dataclass(eq=False)
class Reservation:
    """Device memory for a load."""

    size: int
    """Bytes of the load."""
    free: int
    """Bytes of the load that are free already; leaving adapters still take the others."""

    def free_up(self, size: int) -> None:
        """Adds the bytes of an adapter that has left for the load."""
        self.free = min(self.size, self.free + size)


class Occupancy:
    """The residents in memory, and the memory that is reserved for others. The caller holds the residency's lock.

    Args:
        limits: how many bytes adapters may take on the device and in host memory.
        host_size: bytes of host memory that an adapter's copy takes.
    """

    def __init__(self, limits: AdapterLimits, host_size: Callable[[Adapter], int]) -> None:
        self._limits = limits
        self._host_size = host_size
        self._residents: set[Resident] = set()
        """All that are in device or host memory."""
        self._reservations: set[Reservation] = set()
        self._reserved_host_bytes = 0
        """Host memory for copies that are being made."""

    def in_memory(self) -> list[Resident]:
        """All residents that take device or host memory."""
        return list(self._residents)

    def on_device(self) -> list[Resident]:
        """All residents that take device memory."""
        return [item for item in self._residents if item.adapter is not None]

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory that copies take."""
        return sum(self._host_size(item.copy) for item in self._residents if item.copy is not None)

    def update(self, item: Resident) -> None:
        """Takes note of a change of an item: it may have come into memory, or no memory may hold it any more."""
        if item.adapter is None and item.copy is None:
            self._residents.discard(item)
        else:
            self._residents.add(item)

    # Device memory.

    def choose_victims(self, item: Resident, for_claim: bool) -> Sequence[Resident] | None:
        """The residents that have to leave the device for an item, in order; None if there is no room for now.

        Args:
            for_claim: as for `evictable`.

        Raises:
            Exhausted: the item can never have room.
        """
        size, limit = item.load_bytes, self._limits.device_bytes
        if limit is None:
            return []
        here = self.on_device()
        pinned = sum(x.size for x in here if x.pinned and x is not item)
        if size > limit - pinned:
            besides = f" beside {pinned} of pinned ones" if pinned else ""
            raise Exhausted(f"adapter memory: {size} bytes wanted, the limit is {limit}{besides}")
        free = limit - sum(x.free for x in self._reservations) - sum(x.size for x in here)
        return eviction.choose(self.evictable(for_claim), size - free)

    def evictable(self, for_claim: bool) -> list[Evictable[Resident]]:
        """The residents that may leave the device.

        Args:
            for_claim: whether they leave for a request that wants to start. Then those that waiting requests hold may
                leave as well, but after all others.
        """
        return [
            Evictable(x, x.size, x.leases > 0, x.priority, x.used)
            for x in self._residents
            if x.may_leave and (for_claim or not x.leases)
        ]

    def reserve(self, item: Resident, victims: Sequence[Resident]) -> Reservation:
        """Reserves device memory for the load of an item, for which others leave."""
        size = item.load_bytes
        reservation = Reservation(size, max(0, size - sum(victim.size for victim in victims)))
        self._reservations.add(reservation)
        return reservation

    def release(self, reservation: Reservation) -> None:
        """Ends a reservation: its load has arrived or failed."""
        self._reservations.remove(reservation)

    # Host memory.

    def reserve_host(self, adapter: Adapter) -> int:
        """Reserves host memory for a copy of an adapter, for which older copies go.

        Copies of adapters that are on the device go first, then the lowest priority and the least recently used.

        Returns:
            Bytes; 0 if there is no room.
        """
        size = self._host_size(adapter)
        free = self._limits.host_bytes - self._reserved_host_bytes - self.host_bytes
        copies = [
            Evictable(x, self._host_size(x.copy), x.adapter is None, x.priority, x.used)
            for x in self._residents
            if x.copy is not None and x.state is not State.LOADING  # a load reads its copy
        ]
        dropped = eviction.choose(copies, size - free)
        if dropped is None:
            return 0
        for item in dropped:
            item.drop_copy()
            self.update(item)
        self._reserved_host_bytes += size
        return size

    def release_host(self, size: int) -> None:
        """Ends a reservation of host memory: the copy has been made or has failed."""
        self._reserved_host_bytes -= size
