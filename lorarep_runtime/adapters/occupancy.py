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
    sources: Sequence[Resident]
    """Residents on the device that the load reads, and that stay until its end."""

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
        self._residents: dict[Resident, tuple[int, int]] = {}
        """All that are in device or host memory, and the bytes that each takes there."""
        self._device_bytes = self._host_bytes = 0
        """Sums of these."""
        self._reservations: set[Reservation] = set()
        self._reserved_host_bytes = 0
        """Host memory for copies that are being made."""

    def taken(self) -> list[tuple[Resident, tuple[int, int]]]:
        """All residents that take device or host memory, and the bytes of both."""
        return list(self._residents.items())

    def on_device(self) -> list[Resident]:
        """All residents that take device memory."""
        return [item for item in self._residents if item.adapter is not None]

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory that copies take."""
        return self._host_bytes

    def update(self, item: Resident) -> None:
        """Takes note of a change of an item: it may have come into memory, or no memory may hold it any more."""
        device, host = self._residents.pop(item, (0, 0))
        self._device_bytes -= device
        self._host_bytes -= host
        if item.adapter is None and item.copy is None:
            return
        device = 0 if item.adapter is None else item.size
        host = 0 if item.copy is None else self._host_size(item.copy)
        self._residents[item] = device, host
        self._device_bytes += device
        self._host_bytes += host

    # Device memory.

    def choose_victims(
        self, item: Resident, for_claim: bool, sources: Sequence[Resident] = ()
    ) -> Sequence[Resident] | None:
        """The residents that have to leave the device for an item, in order; None if there is no room for now.

        Args:
            for_claim: as for `evictable`.
            sources: residents on the device that the item is made from, which stay.

        Raises:
            Exhausted: the item can never have room.
        """
        size, limit = item.load_bytes, self._limits.device_bytes
        if limit is None:
            return []
        free = limit - sum(x.free for x in self._reservations) - self._device_bytes
        if size <= free:
            return []
        staying = {x for x in self._residents if x.pinned and x.adapter is not None and x is not item} | set(sources)
        if size > limit - (stays := sum(x.size for x in staying)):
            besides = f" beside {stays} of pinned ones and of its parts" if stays else ""
            raise Exhausted(f"adapter memory: {size} bytes wanted, the limit is {limit}{besides}")
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

    def reserve(self, item: Resident, victims: Sequence[Resident], sources: Sequence[Resident] = ()) -> Reservation:
        """Reserves device memory for the load of an item from its sources, for which others leave."""
        size = item.load_bytes
        reservation = Reservation(size, max(0, size - sum(victim.size for victim in victims)), sources)
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
            Evictable(x, host, x.adapter is None, x.priority, x.used)
            for x, (_, host) in self._residents.items()
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
