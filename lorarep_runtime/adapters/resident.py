"""A resident: one adapter or mix that can be in device memory, and the states that it goes through.

             ┌──────────────────────────────────────────────┐
             │                                              ▼
    ON_DISK ───► LOADING ───► ON_DEVICE ───► LEAVING ───► IN_HOST
      ▲ ▲ ▲         │             │             │           │ │
      │ │ └─────────┘             │             │           │ └──► LOADING
      │ └─────────────────────────┴─────────────┘           │
      └─────────────────────────────────────────────────────┘

A copy in host memory is data and no state of its own: a resident may keep it while it is on the device, so that it can
leave again without another copy. IN_HOST says that the copy is all that memory holds.
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Literal

from lorarep_runtime.model.compiled_adapter import Adapter
from lorarep_runtime.progress import Progress

Tier = Literal["device", "host", "disk"]


class State(enum.Enum):
    """Where a resident is, and where it is moving."""

    ON_DISK = enum.auto()
    """No memory holds it: it has to be compiled from its files, or mixed from its parts."""
    LOADING = enum.auto()
    """A thread brings it to the device, from its files or from its host copy."""
    ON_DEVICE = enum.auto()
    """Requests can compute with it."""
    LEAVING = enum.auto()
    """A thread moves it out of the device; no request may start to compute with it."""
    IN_HOST = enum.auto()
    """Host memory alone holds it."""


TRANSITIONS: Mapping[str, frozenset[tuple[State, State]]] = {
    "begin_load": frozenset({(State.ON_DISK, State.LOADING), (State.IN_HOST, State.LOADING)}),
    "arrive": frozenset({(State.LOADING, State.ON_DEVICE)}),
    "give_up_load": frozenset({(State.LOADING, State.ON_DISK), (State.LOADING, State.IN_HOST)}),
    "begin_leaving": frozenset({(State.ON_DEVICE, State.LEAVING)}),
    "leave": frozenset({(State.LEAVING, State.ON_DISK), (State.LEAVING, State.IN_HOST)}),
    "drop_copy": frozenset({(State.IN_HOST, State.ON_DISK)}),
    "forget": frozenset({(State.ON_DEVICE, State.ON_DISK), (State.IN_HOST, State.ON_DISK)}),
}
"""The state before and the state after each method of `Resident` that changes the state."""


class Resident(ABC):
    """An adapter's revision, or a mix of several.

    `Residency` alone calls the methods that change it, and does so under its lock.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        """Bytes that it takes on the device."""
        self.adapter: Adapter | None = None
        """The adapter in device memory, while ON_DEVICE or LEAVING."""
        self.copy: Adapter | None = None
        """The copy in host memory; see the module's docstring."""
        self.load: Future[None] | None = None
        """The load, while LOADING. It is done in the moment in which the state changes."""
        self.is_published = False
        """Whether new requests may find it, as far as it depends on this resident; see `is_findable`."""
        self.leases = 0
        """Number of requests that hold it, running or not."""
        self.users = 0
        """Number of requests that compute with it. While there are any it cannot leave."""
        self.is_promised = False
        """Whether a request has claimed it that does not compute yet. Until then it cannot leave."""
        self.pinned = False
        """Whether it never leaves the device."""
        self.priority = 0
        """The resident with the lowest priority leaves the device first, of those that may leave."""
        self.used = 0
        """Tick of its last use."""
        self._state = State.ON_DISK

    @property
    @abstractmethod
    def label(self) -> str:
        """How metrics and the ledger call it."""

    @abstractmethod
    def make(self, progress: Progress | None) -> Adapter:
        """Compiles or mixes it anew, on the device.

        Raises:
            LorarepError: it cannot be made.
        """

    @property
    def sources(self) -> Sequence[Resident]:
        """The residents that `make` reads: those that are on the device, as far as they are."""
        return ()

    @property
    def scratch(self) -> int:
        """Device bytes that `make` takes in addition to its result, for sources that are not on the device."""
        return sum(source.size for source in self.sources if source.state is not State.ON_DEVICE)

    def free_extras(self) -> None:  # noqa: B027 (most have none)
        """Frees host memory that goes with the weights, since no memory holds these any more."""

    @property
    def state(self) -> State:
        """The state of the resident: the memory that holds it, or the move that a thread makes."""
        return self._state

    @property
    def tier(self) -> Tier:
        """The fastest memory that it is in."""
        return "device" if self.adapter is not None else "host" if self.copy is not None else "disk"

    @property
    def is_findable(self) -> bool:
        """Whether new requests can find it."""
        return self.is_published

    @property
    def is_wanted(self) -> bool:
        """Whether requests hold it or can find it."""
        return self.leases > 0 or self.is_findable

    @property
    def may_leave(self) -> bool:
        """Whether it is on the device, and neither in use, nor promised, nor pinned."""
        return self._state is State.ON_DEVICE and not (self.users or self.is_promised or self.pinned)

    @property
    def load_bytes(self) -> int:
        """Device bytes that its next load takes at most."""
        return self.size + (0 if self.copy is not None else self.scratch)

    def keep(self) -> None:
        """Keeps it on the device for a load that reads it, as for a request that computes with it."""
        self.leases += 1
        self.users += 1

    def give_back(self) -> None:
        """Ends what `keep` began."""
        self.leases -= 1
        self.users -= 1

    def begin_load(self) -> Future[None]:
        """A load begins. Returns the future that its end completes."""
        self._enter("begin_load", State.LOADING)
        self.load = Future()
        return self.load

    def arrive(self, adapter: Adapter) -> None:
        """The load has brought the adapter to the device."""
        self._enter("arrive", State.ON_DEVICE)
        self.load = None
        self.adapter, self.size = adapter, adapter.nbytes

    def give_up_load(self) -> None:
        """The load has failed, or nobody wants its result."""
        self._enter("give_up_load", State.ON_DISK if self.copy is None else State.IN_HOST)
        self.load = None

    def begin_leaving(self) -> None:
        """Others take its place on the device."""
        self._enter("begin_leaving", State.LEAVING)

    def leave(self, copy: Adapter | None) -> None:
        """The device holds it no more; the host may, by an earlier copy or by this one."""
        copy = self.copy or copy
        self._enter("leave", State.ON_DISK if copy is None else State.IN_HOST)
        self.adapter, self.copy = None, copy
        if self.copy is None:
            self.free_extras()

    def drop_copy(self) -> None:
        """Host memory is needed for others."""
        self.copy = None
        if self._state is State.IN_HOST:
            self._enter("drop_copy", State.ON_DISK)
            self.free_extras()

    def forget(self) -> None:
        """Nobody wants it: all memory goes. What a load brings is given up when it arrives."""
        if self._state is not State.LOADING and self._state is not State.ON_DISK:
            self._enter("forget", State.ON_DISK)
        self.adapter = self.copy = None

    def _enter(self, change: str, state: State) -> None:
        if (self._state, state) not in TRANSITIONS[change]:
            raise AssertionError(f"{self.label}: {change} cannot lead from {self._state.name} to {state.name}")
        self._state = state
