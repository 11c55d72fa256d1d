"""Stacks cost no weight memory, and the ledger is what torch holds."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lorarep_runtime.adapters import header
from lorarep_runtime.config import AdapterLimits
from lorarep_runtime.errors import Exhausted
from tests.support.engines import assert_nothing_held, engine_for, greedy
from tests.support.models import FAMILIES, save_adapter, save_base, save_tokenizer

QUANTIZATIONS = ["none", "nf4", "int8"]
TARGETS = ["q_proj", "v_proj", "down_proj"]
SHORT = greedy(new_tokens=16)
"""It begins a page."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base("llama", tmp_path_factory.mktemp("memory") / "base")


@pytest.fixture(scope="module")
def dora(base: Path) -> Path:
    return save_adapter(base, base.parent / "dora", r=8, target_modules=TARGETS, use_dora=True)


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
    engine.generate([(SHORT, engine.adapters.lease([]))])
    before, ledger = storages(), engine.ledger()
    weights = [[t.data_ptr() for w in layer.values() for t in (*w.data, *w.constants)] for layer in engine.base.weights]
    for name, folder in adapters.items():
        engine.adapters.load(name, str(folder), trusted=True)
    engine.generate((SHORT, engine.adapters.lease([(name, 1.0)])) for name in adapters)
    after = storages()
    own = set()
    for name in adapters:
        lease = engine.adapters.lease([(name, 1.0)])
        lease.wait()
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
def test_the_ledger_agrees_with_what_torch_holds(
    quantization: str, base: Path, adapters: dict[str, Path], dora: Path
) -> None:
    before, adapters = storages(), adapters | {"dora": dora}
    engine = engine_for(base, quantization, adapters=adapters, kv_bytes=1 << 20)
    engine.generate((SHORT, engine.adapters.lease([(name, 1.0)])) for name in adapters)
    held = sum(size for address, size in storages().items() if address not in before)
    ledger = engine.ledger()
    assert ledger.total == pytest.approx(held, rel=0.01)
    assert sum(ledger.adapters.values()) == ledger.categories["adapters"] > 0


def test_doras_share_what_the_norms_of_all_of_them_need(base: Path, dora: Path) -> None:
    engine = engine_for(base)
    workspaces, storages = [engine.ledger().categories["workspace"]], []
    for name in ("one", "another"):
        engine.adapters.load(name, str(dora), trusted=True)
        workspaces.append(engine.ledger().categories["workspace"])
        lease = engine.adapters.lease([(name, 1.0)])
        lease.wait()
        storages.append(lease.adapter.storage)
        lease.release()
    none, one, another = workspaces
    rows = sum(out for module, (out, _) in engine.base.modules.items() if module.split(".")[-1] in TARGETS)
    assert one - none == 4 * rows * engine.base.layers
    assert another == one
    assert torch.equal(*storages)


def test_an_adapter_leaves_the_garbage_collector_little_to_look_at(base: Path, adapters: dict[str, Path]) -> None:
    engine, counts = engine_for(base), []
    header._header.cache_clear()
    for name, folder in adapters.items():  # of several depths
        gc.collect()
        before = len(gc.get_objects())
        engine.adapters.load(name, str(folder), trusted=True)
        gc.collect()
        counts.append(len(gc.get_objects()) - before)
    assert max(counts[1:]) < 100  # the first brings what is made once


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
    engine = engine_for(base, adapters=adapters, limits=AdapterLimits(device_bytes=room))
    for _ in range(2):
        for name, tokens in expected.items():
            lease = engine.adapters.lease([(name, 1.0)])
            lease.wait()
            assert [i.name for i in engine.adapters.list() if i.tier == "device"] == [name]
            assert engine.generate([(greedy(), lease)])[0].tokens == tokens
    assert engine.adapters.residency.evictions == 5
    held, waiting = engine.adapters.lease([("two", 1.0)]), engine.adapters.lease([("one", 1.0)])
    held.wait()
    with pytest.raises(Exhausted, match="adapter memory"):
        waiting.wait()
    held.release()
    waiting.release()
    assert_nothing_held(engine)


LOADING = """
import sys, threading, time
from pathlib import Path
import bitsandbytes  # a library of its size, imported by what is measured, would count as its memory
from lorarep_runtime.model.base import Base
from lorarep_runtime.config import BaseConfig

def anonymous():
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("RssAnon"))
    return int(line.split()[1]) << 10

before, peak, done = anonymous(), [0], threading.Event()
def watch():
    while not done.is_set():
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.001)
watcher = threading.Thread(target=watch)
watcher.start()
base = Base(BaseConfig(sys.argv[1], quantization=sys.argv[2], device="cpu"))
done.set()
watcher.join()
print(peak[0] - before)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base that is large beside what libraries take, in many files."""
    folder = tmp_path_factory.mktemp("large")
    config = FAMILIES["llama"]()
    config.update({"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 32, "head_dim": 64})
    config.update({"num_attention_heads": 8, "num_key_value_heads": 8})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.to_empty(device="cpu")
    with torch.inference_mode():
        for parameter in model.parameters():
            parameter.fill_(0.5)  # drawn ones take seconds
    model.save_pretrained(folder, max_shard_size="16MB")
    save_tokenizer(folder)
    return folder


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_the_unquantized_base_is_never_whole_in_memory(quantization: str, large: Path) -> None:
    shards = list(large.glob("model-*.safetensors"))
    assert len(shards) > 8
    unquantized = sum(shard.stat().st_size for shard in shards)
    measured = subprocess.run(
        [sys.executable, "-c", LOADING, str(large), quantization],
        stdout=subprocess.PIPE,
        check=True,
        # What the C library keeps for later after it has been freed is not what loading holds.
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
    )
    assert int(measured.stdout) < 0.7 * unquantized
