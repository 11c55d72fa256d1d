"""Room for mixes beside their parts, and for what leaves the device."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorarep_runtime.adapters import maker
from lorarep_runtime.config import AdapterLimits
from lorarep_runtime.errors import Exhausted
from tests.adapters.test_residency import MIX, alone, base, compiled, folders, residency, size
from tests.support.engines import assert_nothing_held, engine_for, greedy

__all__ = ["alone", "base", "folders", "size"]


def test_the_parts_of_a_mix_stay_while_it_is_made(
    base: Path, folders: dict[str, Path], size: int, alone: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = {name: folders[name] for name in "bcad"}
    engine = engine_for(base, limits=AdapterLimits(device_bytes=4 * size), adapters=order)
    seen = compiled(monkeypatch)
    busy = [engine.adapters.lease([(name, 1.0)]) for name in "ad"]
    lease = engine.adapters.lease(MIX)  # has no room yet
    for other in busy:
        other.wait()  # and so the parts have been used least recently
        other.release()
    assert engine.generate([(greedy(new_tokens=8), lease)])[0].tokens == alone[MIX]
    tiers = residency(engine)
    assert (tiers["b"], tiers["c"]) == ("device", "device")
    assert seen == []
    assert_nothing_held(engine)


def test_a_mix_that_has_no_room_beside_its_parts_is_refused(base: Path, folders: dict[str, Path], size: int) -> None:
    engine = engine_for(
        base, limits=AdapterLimits(device_bytes=3 * size), adapters={name: folders[name] for name in "bc"}
    )
    with pytest.raises(Exhausted, match="parts"):
        engine.adapters.lease(MIX)
    assert residency(engine) == dict(b="device", c="device")
    assert_nothing_held(engine)


def test_what_the_host_has_no_memory_for_leaves_without_a_copy(
    base: Path, folders: dict[str, Path], size: int, alone: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = AdapterLimits(device_bytes=size, host_bytes=2 * size)
    engine = engine_for(base, limits=limits, adapters={"a": folders["a"]})

    def fails(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as short:
        short.setattr(maker, "copied_to", fails)
        engine.adapters.load("b", str(folders["b"]), trusted=True)
    assert residency(engine) == dict(a="disk", b="device")
    for name in "ab":
        request = greedy(new_tokens=8), engine.adapters.lease([(name, 1.0)])
        assert engine.generate([request])[0].tokens == alone[((name, 1.0),)]
    assert residency(engine) == dict(a="host", b="device")


def test_the_end_of_a_use_is_news(base: Path, folders: dict[str, Path]) -> None:
    """Else who waits for memory would hear of it late."""
    engine, told = engine_for(base, adapters={"a": folders["a"]}), []
    lease = engine.adapters.lease([("a", 1.0)])
    lease.wait()
    engine.adapters.residency.subscribe(lambda: told.append(1))
    lease.release()
    assert told == [1]
