"""Stacks cost no weight memory, and the ledger is what torch holds."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from lorarep_runtime.config import AdapterLimits
from lorarep_runtime.errors import Exhausted
from tests.engines import assert_nothing_held, engine_for, greedy
from tests.models import save_adapter, save_base

QUANTIZATIONS = ["none", "nf4", "int8"]
TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base("llama", tmp_path_factory.mktemp("memory") / "base")


@pytest.fixture(scope="module")
def adapters(base: Path) -> dict[str, Path]:
    maps = {"one": [[0, 4], [2, 6]], "two": [[0, 6], [0, 6], [0, 6]]}
    return {
        name: save_adapter(base, base.parent / name, r=8, target_modules=TARGETS, layer_replication=ranges)
        for name, ranges in maps.items()
    }


def storages() -> dict[int, int]:
    """Bytes of every tensor storage of this process, by address."""
    gc.collect()
    held = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and thing.device.type != "meta":
            storage = thing.untyped_storage()
            held[storage.data_ptr()] = storage.nbytes()
    return held


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_two_more_stacks_change_the_bases_bytes_by_nothing(
    quantization: str, base: Path, adapters: dict[str, Path]
) -> None:
    engine = engine_for(base, quantization)
    engine.generate([(greedy(), engine.adapters.lease([]))])
    before, ledger = storages(), engine.ledger()
    weights = [[t.data_ptr() for w in layer.values() for t in (*w.data, *w.constants)] for layer in engine.base.weights]
    for name, folder in adapters.items():
        engine.adapters.load(name, str(folder), trusted=True)
    engine.generate((greedy(), engine.adapters.lease([(name, 1.0)])) for name in adapters)
    after = storages()
    own = set()
    for name in adapters:
        lease = engine.adapters.lease([(name, 1.0)])
        own.add(lease.adapter.storage.untyped_storage().data_ptr())
        lease.release()
    assert own
    assert {address: size for address, size in after.items() if address not in own} == before
    assert weights == [
        [t.data_ptr() for w in layer.values() for t in (*w.data, *w.constants)] for layer in engine.base.weights
    ]
    now = engine.ledger().categories
    assert {name: size for name, size in now.items() if name != "adapters"} == {
        name: size for name, size in ledger.categories.items() if name != "adapters"
    }


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_the_ledger_agrees_with_what_torch_holds(quantization: str, base: Path, adapters: dict[str, Path]) -> None:
    before = storages()
    engine = engine_for(base, quantization, adapters=adapters, kv_bytes=1 << 20)
    engine.generate((greedy(), engine.adapters.lease([(name, 1.0)])) for name in adapters)
    held = sum(size for address, size in storages().items() if address not in before)
    ledger = engine.ledger()
    assert ledger.total == pytest.approx(held, rel=0.01)
    assert sum(ledger.adapters.values()) == ledger.categories["adapters"] > 0


def test_an_unloaded_adapter_is_freed_when_its_last_request_has_finished(base: Path, adapters: dict[str, Path]) -> None:
    engine = engine_for(base, adapters=adapters)
    expected = engine.generate([(greedy(), engine.adapters.lease([("one", 1.0)]))])[0].tokens
    lease = engine.adapters.lease([("one", 1.0)])
    engine.adapters.unload("one")
    held = engine.ledger().categories["adapters"]
    assert engine.generate([(greedy(), lease)])[0].tokens == expected
    assert engine.ledger().categories["adapters"] < held
    assert_nothing_held(engine)


def test_idle_adapters_make_room_and_come_back(base: Path, adapters: dict[str, Path]) -> None:
    engine = engine_for(base, adapters=adapters)
    expected = {n: engine.generate([(greedy(), engine.adapters.lease([(n, 1.0)]))])[0].tokens for n in adapters}
    room = max(info.bytes for info in engine.adapters.list())
    engine = engine_for(base, adapters=adapters, limits=AdapterLimits(memory_bytes=room))
    for _ in range(2):
        for name, tokens in expected.items():
            lease = engine.adapters.lease([(name, 1.0)])
            assert [i.name for i in engine.adapters.list() if i.loaded] == [name]
            assert engine.generate([(greedy(), lease)])[0].tokens == tokens
    assert engine.adapters.evictions == 5
    held = engine.adapters.lease([("two", 1.0)])
    with pytest.raises(Exhausted, match="adapter memory"):
        engine.adapters.lease([("one", 1.0)])
    held.release()
    assert_nothing_held(engine)
