"""Which adapters leave for another, over residents without weights and without a model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lorarep_runtime.adapters.claim import Claim
from lorarep_runtime.adapters.occupancy import Occupancy
from lorarep_runtime.adapters.residency import Residency
from lorarep_runtime.adapters.resident import Resident, State
from lorarep_runtime.config import AdapterLimits
from lorarep_runtime.errors import Exhausted
from lorarep_runtime.model.compiled_adapter import Adapter

SIZE = 10
ADAPTER: Any = SimpleNamespace(nbytes=SIZE)


class Item(Resident):
    def __init__(self, label: str, size: int = SIZE) -> None:
        super().__init__(size)
        self._label = label

    @property
    def label(self) -> str:
        return self._label

    def make(self, progress: object) -> Adapter:
        return Adapter((0,), (), torch.zeros(SIZE, dtype=torch.uint8), (), None, "lora", 1, 1)


class Device:
    """Room for some adapters of SIZE bytes, each used later than those before it."""

    def __init__(self, room: int) -> None:
        self.occupancy = Occupancy(AdapterLimits(device_bytes=room * SIZE), lambda adapter: SIZE)
        self.tick = 0

    def add(self, label: str, **fields: Any) -> Item:
        item = Item(label)
        item.begin_load()
        item.arrive(ADAPTER)
        self.tick += 1
        item.used = self.tick
        for name, value in fields.items():
            setattr(item, name, value)
        self.occupancy.update(item)
        return item

    def leave_for(self, adapters: int, *, for_claim: bool) -> list[str] | None:
        """Those that leave for something as large as some adapters."""
        victims = self.occupancy.choose_victims(Item("new", adapters * SIZE), for_claim)
        return None if victims is None else [item.label for item in victims]


def test_adapters_that_waiting_requests_hold_leave_last_and_for_a_claim_alone() -> None:
    device = Device(room=3)
    device.add("held", leases=1)
    device.add("old")
    device.add("recent")
    assert [device.leave_for(n, for_claim=True) for n in (1, 2, 3)] == [
        ["old"],
        ["old", "recent"],
        ["old", "recent", "held"],
    ]
    assert [device.leave_for(n, for_claim=False) for n in (1, 2, 3)] == [["old"], ["old", "recent"], None]


@pytest.mark.parametrize("fields", [dict(users=1, leases=1), dict(is_promised=True, leases=1), dict(pinned=True)])
def test_those_in_use_or_promised_or_pinned_stay(fields: dict[str, Any]) -> None:
    device = Device(room=2)
    device.add("stays", **fields)
    device.add("idle")
    assert device.leave_for(1, for_claim=True) == ["idle"]
    if "pinned" in fields:  # it can never have room
        with pytest.raises(Exhausted, match=f"beside {SIZE} of pinned ones"):
            device.leave_for(2, for_claim=True)
    else:
        assert device.leave_for(2, for_claim=True) is None


def test_room_that_others_are_promised_is_not_given_twice() -> None:
    device = Device(room=3)
    device.add("idle")
    reservation = device.occupancy.reserve(Item("first"), [])
    assert device.leave_for(1, for_claim=True) == []
    assert device.leave_for(2, for_claim=True) == ["idle"]
    device.occupancy.release(reservation)
    assert device.leave_for(2, for_claim=True) == []


def test_a_prefetch_takes_no_room_from_a_waiting_request_and_a_claim_does() -> None:
    residency = Residency(torch.device("cpu"), AdapterLimits(device_bytes=SIZE))
    held, wanted = Item("held"), Item("wanted")
    with residency.hold(held) as first, residency.hold(wanted) as second:
        first.prefetch()
        with residency.changed:
            assert residency.changed.wait_for(lambda: held.state is State.ON_DEVICE, 60)
        second.prefetch()
        assert (held.state, wanted.state) == (State.ON_DEVICE, State.ON_DISK)
        assert second.claim() is Claim.LOADING
        assert second.wait() is Claim.READY
        assert held.state is State.ON_DISK
