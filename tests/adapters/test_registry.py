"""Names, leases and mixes: what callers do with adapters never holds up a step."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from lorarep_server.telemetry.metrics import EngineCollector
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from lorarep_runtime.adapters import files, maker, registry
from lorarep_runtime.adapters.mix import MAX_IDLE_MIXES, MAX_WEIGHT
from lorarep_runtime.adapters.mixing import mix_adapters
from lorarep_runtime.config import AdapterLimits
from lorarep_runtime.engine.engine import Engine
from lorarep_runtime.errors import FailedPrecondition, InvalidArgument, NotFound, PermissionDenied
from lorarep_runtime.hub.files import file_digest
from lorarep_runtime.request import Event, Finished
from tests.support.engines import PROMPT, assert_nothing_held, engine_for, greedy
from tests.support.hub_faults import FaultyHub
from tests.support.models import LAYERS, VOCAB, save_adapter, save_base
from tests.support.operations import operations
from tests.support.repositories import write

MAP = [[0, 4], [2, 5]]
MIX = [("one", 1.0), ("two", 0.5)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base("llama", tmp_path_factory.mktemp("registry") / "base")


@pytest.fixture(scope="module")
def adapters(base: Path) -> dict[str, Path]:
    asked = dict(r=4, target_modules=["q_proj", "o_proj"], layer_replication=MAP)
    return {
        name: save_adapter(base, base.parent / name, seed=i, use_dora=name == "two", **asked)
        for i, name in enumerate(("one", "two"))
    }


@pytest.fixture
def engine(base: Path, adapters: dict[str, Path]) -> Engine:
    return engine_for(base, adapters=adapters, kv_bytes=4 << 20)


class Gate:
    """A function that waits until it may go on."""

    def __init__(self, function) -> None:
        self.function = function
        self.reached, self.open = threading.Event(), threading.Event()

    def __call__(self, *given):
        self.reached.set()
        assert self.open.wait(60)
        return self.function(*given)


def answer_beside(engine: Engine, gate: Gate) -> None:
    """Answers a request from admission to its end while another thread waits at the gate."""
    events: list[Event] = []
    assert gate.reached.wait(60)
    engine.submit(greedy(new_tokens=4), engine.adapters.lease([("one", 1.0)]), events.append)
    while engine.loop.step():
        pass
    assert isinstance(events[-1], Finished)
    assert not gate.open.is_set()


def test_steps_go_on_while_an_adapter_is_compiled(
    engine: Engine, adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(engine.base.norm_terms)
    monkeypatch.setattr(engine.base, "norm_terms", gate)
    with ThreadPoolExecutor(1) as thread:
        loading = thread.submit(engine.adapters.load, "late", str(adapters["two"]), trusted=True)
        answer_beside(engine, gate)
        assert "late" not in {info.name for info in engine.adapters.list()}
        gate.open.set()
        assert loading.result().tier == "device"


def test_steps_go_on_while_a_file_is_hashed_and_somebody_asks_what_there_is(
    base: Path, adapters: dict[str, Path], hub: FaultyHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.publish("org/two", adapters["two"])
    limits = AdapterLimits(allow_repositories=("org/*",))
    engine = engine_for(base, adapters={"one": adapters["one"]}, limits=limits, cache_dir=tmp_path, kv_bytes=4 << 20)
    gate = Gate(file_digest)
    monkeypatch.setattr(files, "file_digest", gate)
    with ThreadPoolExecutor(2) as threads:
        leasing = threads.submit(engine.adapters.lease, [("org/two", 1.0)])
        assert gate.reached.wait(60)
        listing = threads.submit(engine.adapters.list)
        answer_beside(engine, gate)
        assert [info.name for info in listing.result(60)] == ["one"]
        gate.open.set()
        lease = leasing.result()
    assert len(engine.adapters.get("org/two").digest) == 64
    lease.release()


def test_the_lock_is_held_no_longer_for_more_names(
    base: Path, adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps wait for it: requests start and end under it."""
    monkeypatch.setattr(registry, "MAX_ON_DEMAND", 200)

    def costs(count: int) -> list[int]:
        engine = engine_for(base, adapters=adapters, limits=AdapterLimits(device_bytes=1 << 30), kv_bytes=1 << 20)
        names = engine.adapters
        lock: Any = names.residency.changed
        one = names._named["one"]
        named = [copy(one) for _ in range(count)]
        for i, clone in enumerate(named):
            clone.name = f"{i:03}"
            names._give_name(clone, on_demand=True)
            names.residency._occupancy.update(clone)  # in memory, as if it had been loaded
        collector = EngineCollector(lambda: engine, dict)
        works: list[Callable[[], object]] = [
            names.list,
            names.held_bytes,
            names._uses,
            engine.ledger,
            lambda: list(collector.collect()),
            lambda: names.lease([("two", 1.0)]).release(),
            lambda: names.unload("000"),
            lambda: names._give_name(named[0], on_demand=True),
        ]
        return [operations(work, lambda: lock._is_owned()) for work in works]

    few, many = costs(5), costs(200)
    assert all(cost[1] <= 1.1 * cost[0] + 20 for cost in zip(few, many, strict=True)), (few, many)


def test_steps_go_on_while_adapters_are_mixed(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(mix_adapters)
    monkeypatch.setattr(maker, "mix_adapters", gate)
    with ThreadPoolExecutor(2) as threads:
        leases = [engine.adapters.lease(MIX) for _ in range(2)]
        mixing = [threads.submit(lease.wait) for lease in leases]
        answer_beside(engine, gate)
        gate.open.set()
        for one in mixing:
            one.result()
    assert leases[0].adapter is leases[1].adapter
    for lease in leases:
        lease.release()
    assert_nothing_held(engine)


def test_a_mix_whose_part_is_unloaded_meanwhile_is_freed_with_its_last_request(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(mix_adapters)
    monkeypatch.setattr(maker, "mix_adapters", gate)
    lease = engine.adapters.lease(MIX)
    assert gate.reached.wait(60)
    engine.adapters.unload("two")
    gate.open.set()
    lease.wait()
    assert set(engine.adapters.held_bytes()) == {"one", "(leaving)"}
    lease.release()
    assert set(engine.adapters.held_bytes()) == {"one"}
    assert engine.adapters._mixes._mixes == {}


def test_a_mix_is_freed_although_its_part_has_got_its_name_back(
    engine: Engine, adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = engine.adapters.lease(MIX)
    lease.wait()
    checked = engine.adapters._checked

    def unloaded_meanwhile(*given):
        item = checked(*given)
        engine.adapters.unload("two")
        return item

    monkeypatch.setattr(engine.adapters, "_checked", unloaded_meanwhile)
    engine.adapters.load("two", str(adapters["two"]), trusted=True)
    lease.release()
    assert set(engine.adapters.held_bytes()) == {"one", "two"}


def test_a_server_without_an_allow_list_permits_no_repository(engine: Engine, hub: FaultyHub) -> None:
    with pytest.raises(PermissionDenied, match="org/name"):
        engine.adapters.lease([("org/name", 1.0)])
    assert hub.asked == []


def test_a_request_reaches_no_pull_request_of_a_repository_that_it_may_name(
    base: Path, adapters: dict[str, Path], hub: FaultyHub, tmp_path: Path
) -> None:
    hub.publish("org/one", adapters["one"])
    foreign = hub.publish("org/one", adapters["two"], branch="refs/pr/1")
    limits = AdapterLimits(allow_repositories=("org/*",))
    engine = engine_for(base, limits=limits, cache_dir=tmp_path, kv_bytes=4 << 20)
    for revision in ("refs/pr/1", foreign):
        with pytest.raises(PermissionDenied, match="revision"):
            engine.adapters.lease([(f"org/one@{revision}", 1.0)])
        with pytest.raises(PermissionDenied, match="revision"):
            engine.adapters.load("one", "org/one", revision)
    assert hub.downloads() == []
    assert engine.adapters.load("operator's", "org/one", "refs/pr/1", trusted=True).commit == foreign


def test_a_stack_that_no_operator_named_is_a_few_times_as_deep_as_the_base_at_most(
    base: Path, hub: FaultyHub, tmp_path: Path
) -> None:
    ranges = [*[[0, LAYERS]] * 4, [0, 1]]
    hub.publish(
        "org/deep", save_adapter(base, tmp_path / "deep", r=1, target_modules=["q_proj"], layer_replication=ranges)
    )
    limits = AdapterLimits(allow_repositories=("org/*",))
    engine = engine_for(base, limits=limits, cache_dir=tmp_path / "cache", kv_bytes=1 << 20)
    for ask in (lambda: engine.adapters.lease([("org/deep", 1.0)]), lambda: engine.adapters.load("x", "org/deep")):
        with pytest.raises(
            InvalidArgument, match=r"^layer_replication: 25 positions are over the limit of 24 .*--adapter"
        ):
            ask()
    assert "adapter_model.safetensors" not in hub.downloads()
    assert len(engine.adapters.load("x", "org/deep", trusted=True).stack) == 25
    permits = replace(limits, max_untrusted_positions=25)
    engine = engine_for(base, limits=permits, cache_dir=tmp_path / "cache", kv_bytes=1 << 20)
    engine.adapters.lease([("org/deep", 1.0)]).release()


def test_a_weight_that_overflows_is_refused_by_name(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    for weight in (1e39, -1e39, MAX_WEIGHT * 1.01, float("nan"), float("inf")):
        with pytest.raises(InvalidArgument, match="adapters: the weight of 'one'"):
            engine.adapters.lease([("one", weight)])
    monkeypatch.setattr(registry, "MAX_WEIGHT", 1e39)  # as a smaller one overflows in fp16
    lease = engine.adapters.lease([("one", 1e39), ("two", 1.0)])
    with pytest.raises(InvalidArgument, match=r"adapters: the weight 1e\+39 makes the mix infinite"):
        lease.wait()
    lease.release()
    assert_nothing_held(engine)


def test_a_repository_that_is_not_there_is_asked_for_once_in_a_while(
    base: Path, adapters: dict[str, Path], hub: FaultyHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = AdapterLimits(allow_repositories=("org/*",))
    engine = engine_for(base, limits=limits, cache_dir=tmp_path, kv_bytes=4 << 20)

    def asked() -> int:
        hub.asked.clear()
        with pytest.raises(NotFound, match="org/one"):
            engine.adapters.lease([("org/one", 1.0)])
        return len(hub.asked)

    assert asked() > 0
    assert asked() == 0
    hub.publish("org/one", adapters["one"])
    assert asked() == 0
    engine.adapters.load("operator's", "org/one", trusted=True)
    monkeypatch.setattr(files, "ABSENT_SECONDS", 0.0)
    engine.adapters._files._absent = files._Absent()
    engine.adapters.lease([("org/one", 1.0)]).release()


def test_one_callers_stack_that_is_not_there_hides_no_repository_from_others(
    base: Path, adapters: dict[str, Path], hub: FaultyHub, tmp_path: Path
) -> None:
    hub.publish("org/one", adapters["one"])
    engine = engine_for(base, limits=AdapterLimits(allow_repositories=("org/*",)), cache_dir=tmp_path, kv_bytes=4 << 20)
    with pytest.raises(NotFound, match="stack: 'misspelt' is none of"):
        engine.adapters.load("one", "org/one", stack="misspelt")
    assert hub.asked == []
    engine.adapters.load("one", "org/one")


def test_an_operators_answer_is_no_callers(base: Path, hub: FaultyHub, tmp_path: Path) -> None:
    hub.publish("org/one", write(tmp_path / "one", {"hidden/adapter_config.json": b"{}"}))
    limits = AdapterLimits(allow_repositories=("org/one/seen",))
    engine = engine_for(base, limits=limits, cache_dir=tmp_path / "cache", kv_bytes=4 << 20)
    for trusted, says in ((True, "org/one/hidden"), (False, "seen: has no adapter_model.safetensors")):
        with pytest.raises(NotFound, match=rf"{says}$"):
            engine.adapters.load("one", "org/one/seen", trusted=trusted)


def test_idle_mixes_do_not_pile_up(engine: Engine) -> None:
    for i in range(MAX_IDLE_MIXES + 5):
        lease = engine.adapters.lease([("one", 1.0), ("two", 1.0 + i)])
        lease.wait()
        lease.release()
    mixes = {item.label for item, _ in engine.adapters.residency.taken()} - {"one", "two"}
    assert len(mixes) == MAX_IDLE_MIXES + 1
    assert "1·one + 1·two" not in mixes
    assert engine.adapters.held_bytes().keys() == {"one", "two", "(mixes)"}


def test_names_that_requests_make_are_bounded_and_come_back(
    base: Path, adapters: dict[str, Path], hub: FaultyHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "MAX_ON_DEMAND", 2)
    commit = hub.publish("org/one", adapters["one"])
    for tag in "abcd":
        hub.tag("org/one", tag, commit)
    limits = AdapterLimits(allow_repositories=("org/*",))
    engine = engine_for(base, limits=limits, cache_dir=tmp_path, kv_bytes=4 << 20)

    def names() -> set[str]:
        return {info.name for info in engine.adapters.list()}

    engine.adapters.load("org/one", "org/one", trusted=True)
    engine.adapters.load("mine", "org/one")
    held = engine.adapters.lease([("org/one@a", 1.0)])
    engine.adapters.load("org/one@b", "org/one", "b")
    engine.adapters.lease([("org/one@c", 1.0)]).release()
    assert names() == {"org/one", "mine", "org/one@a", "org/one@c"}
    held.release()
    engine.adapters.lease([("org/one@d", 1.0)]).release()
    assert names() == {"org/one", "mine", "org/one@c", "org/one@d"}
    engine.adapters.lease([("org/one@a", 1.0)]).release()
    assert names() == {"org/one", "mine", "org/one@d", "org/one@a"}


def save_foreign_tokenizer(folder: Path, tokens: int) -> None:
    """Its tokens are numbers in angle brackets."""
    vocab = {f"<{i}>": i for i in range(tokens)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<0>"))
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<0>").save_pretrained(folder)


def test_an_adapters_own_tokenizer_is_used_if_the_operator_names_it(base: Path, tmp_path: Path) -> None:
    folder = save_adapter(base, tmp_path / "own", r=2, target_modules=["q_proj"])
    save_foreign_tokenizer(folder, VOCAB)
    engine = engine_for(base, adapters={"own": folder}, kv_bytes=1 << 20)
    lease = engine.adapters.lease([("own", 1.0)])
    assert lease.tokenizer.encode("<7>") == [7]
    (answer,) = engine.generate([(greedy(PROMPT, 5), lease)])
    assert answer.text == "".join(f"<{token}>" for token in answer.tokens)
    assert len(engine.base.tokenizer.encode("<7>")) == 3  # the base's own stays what it was


def test_what_an_adapter_has_of_a_tokenizer_is_used_or_refused(base: Path, tmp_path: Path) -> None:
    """Never the base's in its place, which may make other tokens."""
    folder = save_adapter(base, tmp_path / "own", r=2, target_modules=["q_proj"])
    save_foreign_tokenizer(folder, VOCAB)
    (folder / "tokenizer_config.json").unlink()
    (folder / "generation_config.json").write_text('{"eos_token_id": 7}')  # of no adapter that the Hub sends
    engine = engine_for(base, adapters={"own": folder}, kv_bytes=1 << 20)
    lease = engine.adapters.lease([("own", 1.0)])
    assert lease.tokenizer.encode("<7>") == [7]
    assert lease.tokenizer.eos_ids == frozenset()
    lease.release()
    (folder / "tokenizer.json").unlink()
    (folder / "added_tokens.json").write_text("{}")
    with pytest.raises(FailedPrecondition, match="has no vocabulary"):
        engine_for(base, adapters={"own": folder}, kv_bytes=1 << 20)
    (folder / "added_tokens.json").unlink()
    (folder / "chat_template.jinja").write_bytes(b"{{ messages[0].content }}\xff")
    with pytest.raises(FailedPrecondition, match=r"^chat_template\.jinja: is not UTF-8"):
        engine_for(base, adapters={"own": folder}, kv_bytes=1 << 20)


def test_an_adapters_tokenizer_that_does_not_fit_the_base_is_refused(base: Path, tmp_path: Path) -> None:
    folder = save_adapter(base, tmp_path / "own", r=2, target_modules=["q_proj"])
    save_foreign_tokenizer(folder, VOCAB + 1)
    with pytest.raises(FailedPrecondition, match=f"tokens go up to {VOCAB}.*rows for {VOCAB}"):
        engine_for(base, adapters={"own": folder}, kv_bytes=1 << 20)


def test_a_lease_waits_without_spinning_while_its_adapter_leaves(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    residency, item = engine.adapters.residency, engine.adapters._named["one"]
    claims: list[object] = []
    real = residency.claim
    monkeypatch.setattr(residency, "claim", lambda item: claims.append(item) or real(item))
    lease = engine.adapters.lease([("one", 1.0)])
    item.begin_leaving()
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(lease.wait)
        time.sleep(0.2)
        assert len(claims) == 1
        assert not waiting.done()
        residency._move_out(item)
        waiting.result()
    assert len(claims) < 5
    assert engine.adapters.get("one").tier == "device"
    lease.release()
    assert_nothing_held(engine)
