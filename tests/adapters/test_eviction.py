"""The order of eviction, over plain values: without an adapter or a device."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lorarep_runtime.adapters.eviction import Evictable, choose, first


def evictable(name: str, size: int = 10, *, late: bool = False, priority: int = 0, used: int = 0) -> Evictable[str]:
    return Evictable(name, size, late, priority, used)


def test_held_ones_go_last_then_the_highest_priority_then_the_latest_used() -> None:
    late = evictable("late", late=True, priority=-5, used=0)
    important = evictable("important", priority=1, used=0)
    recent, old = evictable("recent", used=9), evictable("old", used=1)
    unimportant = evictable("unimportant", priority=-1, used=99)
    everyone = [late, important, recent, old, unimportant]
    assert choose(everyone, 50) == ["unimportant", "old", "recent", "important", "late"]
    assert first(everyone) == "unimportant"
    assert first([]) is None


def test_no_more_go_than_the_bytes_need() -> None:
    three = [evictable(name, used=i) for i, name in enumerate("abc")]
    assert [choose(three, missing) for missing in (-1, 0, 1, 10, 11, 30)] == [
        [],
        [],
        ["a"],
        ["a"],
        ["a", "b"],
        ["a", "b", "c"],
    ]


def test_nobody_goes_where_all_together_are_too_small() -> None:
    assert choose([evictable("a"), evictable("b")], 21) is None
    assert choose([], 1) is None
    assert choose([], 0) == []


evictables = st.lists(
    st.builds(Evictable, st.integers(), st.integers(1, 50), st.booleans(), st.integers(-2, 2), st.integers(0, 99))
)


@given(evictables, st.integers(-10, 400))
def test_the_chosen_are_the_shortest_beginning_of_the_order_that_is_enough(
    all_of_them: list[Evictable[int]], missing: int
) -> None:
    chosen = choose(all_of_them, missing)
    order = sorted(all_of_them, key=lambda x: (x.goes_late, x.priority, x.used))
    if chosen is None:
        assert sum(x.size for x in order) < missing
        return
    assert list(chosen) == [x.item for x in order[: len(chosen)]]
    assert sum(x.size for x in order[: len(chosen)]) >= missing
    assert not chosen or sum(x.size for x in order[: len(chosen) - 1]) < missing
