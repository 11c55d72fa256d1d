"""The states of a resident: its table is walked, and no transition outside it is possible."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from lorarep_runtime.adapters.resident import TRANSITIONS, Resident, State

ADAPTER: Any = SimpleNamespace(nbytes=64)
COPY: Any = SimpleNamespace(nbytes=64)

Change = Callable[[Resident], object]


class Item(Resident):
    """Counts how often its extras are freed."""

    label = "item"

    def __init__(self) -> None:
        super().__init__(10)
        self.freed = 0

    def make(self, progress: object) -> Any:
        return ADAPTER

    def free_extras(self) -> None:
        self.freed += 1


CHANGES: dict[str, Change] = {
    "begin_load": lambda item: item.begin_load(),
    "arrive": lambda item: item.arrive(ADAPTER),
    "give_up_load": lambda item: item.give_up_load(),
    "begin_leaving": lambda item: item.begin_leaving(),
    "leave": lambda item: item.leave(None),
    "leave with a copy": lambda item: item.leave(COPY),
    "drop_copy": lambda item: item.drop_copy(),
    "forget": lambda item: item.forget(),
}
"""All that changes a resident's state, or its copy."""
ON_DEVICE = ("begin_load", "arrive")
IN_HOST = (*ON_DEVICE, "begin_leaving", "leave with a copy")
PATHS: dict[tuple[State, bool], tuple[str, ...]] = {
    (State.ON_DISK, False): (),
    (State.LOADING, False): ("begin_load",),
    (State.ON_DEVICE, False): ON_DEVICE,
    (State.LEAVING, False): (*ON_DEVICE, "begin_leaving"),
    (State.IN_HOST, True): IN_HOST,
    (State.LOADING, True): (*IN_HOST, "begin_load"),
    (State.ON_DEVICE, True): (*IN_HOST, *ON_DEVICE),
    (State.LEAVING, True): (*IN_HOST, *ON_DEVICE, "begin_leaving"),
}
"""How each state is reached, without and with a copy in host memory."""


def at(state: State, has_copy: bool) -> Item:
    item = Item()
    for change in PATHS[state, has_copy]:
        CHANGES[change](item)
    assert (item.state, item.copy is not None) == (state, has_copy)
    return item


def reached() -> dict[str, set[tuple[State, State]]]:
    """Every change from every state: where it leads, if it is not refused."""
    found: dict[str, set[tuple[State, State]]] = {}
    for state, has_copy in PATHS:
        for name, change in CHANGES.items():
            item = at(state, has_copy)
            try:
                change(item)
            except AssertionError:
                assert item.state is state
                assert_consistent(item)
                continue
            assert_consistent(item)
            if item.state is not state:
                found.setdefault(name.split()[0], set()).add((state, item.state))
    return found


def assert_consistent(item: Resident) -> None:
    """The state and the data agree."""
    assert (item.adapter is not None) == (item.state in (State.ON_DEVICE, State.LEAVING))
    assert (item.load is not None) == (item.state is State.LOADING)
    if item.state is State.IN_HOST:
        assert item.copy is not None
    if item.state is State.ON_DISK:
        assert item.copy is None
    tier = "device" if item.adapter is not None else "host" if item.copy is not None else "disk"
    assert item.tier == tier


def test_the_table_is_what_the_changes_do_and_nothing_else() -> None:
    assert reached() == TRANSITIONS
    assert {state for steps in TRANSITIONS.values() for pair in steps for state in pair} == set(State)


@pytest.mark.parametrize(("state", "has_copy"), list(PATHS))
def test_a_resident_without_memory_is_on_disk_however_it_got_there(state: State, has_copy: bool) -> None:
    item = at(state, has_copy)
    if state is State.LOADING:
        item.forget()
        assert item.state is State.LOADING  # a thread is at it
        item.give_up_load()
    elif state is State.LEAVING:
        item.drop_copy()
        item.leave(None)
    else:
        item.forget()
    assert item.state is State.ON_DISK
    assert_consistent(item)


def test_what_goes_with_the_weights_is_freed_with_the_last_memory() -> None:
    item = at(State.ON_DEVICE, True)
    item.drop_copy()
    assert item.freed == 0
    item.begin_leaving()
    item.leave(None)
    assert item.freed == 1
    item = at(State.IN_HOST, True)
    item.drop_copy()
    assert item.freed == 1
    item = at(State.LEAVING, False)
    item.leave(COPY)
    assert item.freed == 0


def test_only_what_nobody_needs_on_the_device_may_leave() -> None:
    for state, has_copy in PATHS:
        assert at(state, has_copy).may_leave == (state is State.ON_DEVICE)
    for field, value in (("users", 1), ("is_promised", True), ("pinned", True)):
        item = at(State.ON_DEVICE, False)
        setattr(item, field, value)
        assert not item.may_leave


def test_an_arrived_adapter_says_how_large_it_is() -> None:
    assert at(State.ON_DISK, False).load_bytes == 10
    assert at(State.ON_DEVICE, False).size == ADAPTER.nbytes
