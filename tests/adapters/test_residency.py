"""Device, host and disk: which adapters leave, how they come back, and that every waiting request starts in the end."""

from __future__ import annotations

import gc
import random
import shutil
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from lorarep_runtime.adapters import maker
from lorarep_runtime.adapters.claim import Claim
from lorarep_runtime.adapters.compile import compile_adapter
from lorarep_runtime.adapters.files import AdapterFiles
from lorarep_runtime.adapters.peft_config import MATCHING_SECONDS
from lorarep_runtime.adapters.resident import State
from lorarep_runtime.config import AdapterLimits
from lorarep_runtime.engine.engine import Engine
from lorarep_runtime.errors import Cancelled, DataLoss, Exhausted, LorarepError, NotFound
from lorarep_runtime.request import Event, Finished, Output
from tests.support.engines import assert_nothing_held, engine_for, greedy
from tests.support.models import save_adapter, save_base

NAMES = tuple("abcdef")
MIX = (("c", 0.7), ("b", 1.0))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base("llama", tmp_path_factory.mktemp("residency") / "base")


@pytest.fixture(scope="module")
def folders(base: Path) -> dict[str, Path]:
    asked = dict(r=8, target_modules=["q_proj", "o_proj", "down_proj"], layer_replication=[[0, 4], [2, 5]])
    return {n: save_adapter(base, base.parent / n, seed=i, use_dora=n in "bd", **asked) for i, n in enumerate(NAMES)}


@pytest.fixture(scope="module")
def size(base: Path, folders: dict[str, Path]) -> int:
    """Bytes of the largest adapter."""
    engine = engine_for(base, adapters=folders)
    return max(info.bytes for info in engine.adapters.list())


@pytest.fixture(scope="module")
def alone(base: Path, folders: dict[str, Path]) -> dict[tuple, tuple[int, ...]]:
    """What each adapter answers by itself."""
    engine = engine_for(base, adapters=folders)
    asked = [((name, 1.0),) for name in NAMES] + [MIX]
    answers = {key: engine.generate([(greedy(new_tokens=8), engine.adapters.lease(key))])[0].tokens for key in asked}
    assert len(set(answers.values())) == len(asked)
    return answers


def residency(engine: Engine) -> dict[str, str]:
    return {info.name: info.tier for info in engine.adapters.list()}


def brought(engine: Engine, name: str) -> None:
    lease = engine.adapters.lease([(name, 1.0)])
    lease.wait()
    lease.release()


def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that are compiled from now on."""
    seen: list[str] = []
    real = compile_adapter
    monkeypatch.setattr(
        maker, "compile_adapter", lambda file, *a, **k: seen.append(file.path.parent.name) or real(file, *a, **k)
    )
    return seen


def test_what_leaves_is_copied_to_the_host_and_comes_back_without_compiling(
    base: Path, folders: dict[str, Path], size: int, alone: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_for(base, limits=AdapterLimits(device_bytes=2 * size, host_bytes=3 * size), adapters=folders)
    assert residency(engine) == dict(a="disk", b="host", c="host", d="host", e="device", f="device")
    seen = compiled(monkeypatch)
    for name, expected in (("c", []), ("d", []), ("a", ["a"]), ("c", ["a"])):
        request = greedy(new_tokens=8), engine.adapters.lease([(name, 1.0)])
        assert engine.generate([request])[0].tokens == alone[((name, 1.0),)]
        assert seen == expected
        assert engine.adapters.residency.host_bytes <= 3 * size
    assert_nothing_held(engine)


def test_pinned_ones_stay_and_the_lowest_priority_goes_first(base: Path, folders: dict[str, Path], size: int) -> None:
    engine = engine_for(base, limits=AdapterLimits(device_bytes=3 * size))

    def load(name: str, **more: object) -> None:
        engine.adapters.load(name, str(folders[name]), trusted=True, **more)

    load("a", pinned=True)
    load("b", priority=1)
    load("c")
    load("d")
    assert residency(engine) == dict(a="device", b="device", c="disk", d="device")
    brought(engine, "c")
    assert residency(engine) == dict(a="device", b="device", c="device", d="disk")
    load("c", pinned=True)
    load("b", pinned=True)
    with pytest.raises(Exhausted, match="pinned"):
        load("e")
    with pytest.raises(Exhausted, match="pinned"):
        engine.adapters.lease([("d", 1.0)])
    load("a", pinned=False)
    load("e", priority=-1)
    assert residency(engine) == dict(a="disk", b="device", c="device", d="disk", e="device")
    assert_nothing_held(engine)


def test_requests_wait_for_room_and_every_turn_comes(
    base: Path, folders: dict[str, Path], size: int, alone: dict
) -> None:
    """One adapter fits; a flood for it neither ends those that wait for others nor makes them last."""
    engine = engine_for(base, limits=AdapterLimits(device_bytes=size), adapters=folders, max_sequences=4)
    order: list[str] = []
    answers: dict[int, list[int]] = {}

    def submit(name: str) -> None:
        tokens = answers[len(answers)] = []

        def on_event(event: Event) -> None:
            if isinstance(event, Output):
                tokens.extend(event.tokens)
            else:
                assert isinstance(event, Finished), event
                assert tuple(tokens) == alone[((name, 1.0),)][:length]
                order.append(name)

        length = 5 + len(answers) % 4  # the flood never pauses
        engine.submit(greedy(new_tokens=length), engine.adapters.lease([(name, 1.0)]), on_event)

    for name in "aaabc":
        submit(name)
    flood = 20
    while engine.stats().running or engine.stats().waiting:
        engine.loop.step_or_wait()
        assert sum(engine.adapters.held_bytes().values()) <= size
        if flood and "b" not in order:
            submit("a")
            flood -= 1
    assert sorted(order) == sorted("aaabc" + "a" * (20 - flood))
    assert order.index("b") < 12
    assert_nothing_held(engine)


def test_without_a_budget_requests_wait_for_memory_that_others_compute_with(
    base: Path, folders: dict[str, Path], alone: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_for(base, adapters={name: folders[name] for name in "ab"})
    first, second = (engine.adapters._named[name] for name in "ab")
    second.begin_leaving()
    engine.adapters.residency._move_out(second)
    assert second.state is State.ON_DISK
    real, refused = second.make, []

    def make(progress):
        if first.users:
            refused.append(first.users)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(progress)

    monkeypatch.setattr(second, "make", make)
    events: list[Event] = []
    engine.submit(greedy(new_tokens=8), engine.adapters.lease([("a", 1.0)]), events.append)
    engine.loop.step()
    assert first.users
    (answer,) = engine.generate([(greedy(new_tokens=8), engine.adapters.lease([("b", 1.0)]))])
    assert refused
    assert isinstance(events[-1], Finished)
    assert answer.tokens == alone[(("b", 1.0),)]


def test_a_load_that_fails_pins_nothing(base: Path, folders: dict[str, Path], size: int) -> None:
    engine = engine_for(base, adapters={name: folders[name] for name in "ab"}, limits=AdapterLimits(device_bytes=size))
    busy = engine.adapters.lease([("b", 1.0)])
    busy.wait()
    with pytest.raises(Exhausted):
        engine.adapters.load("a", str(folders["a"]), trusted=True, pinned=True, priority=7)
    info = engine.adapters.get("a")
    assert (info.pinned, info.priority) == (False, 0)
    busy.release()
    assert engine.adapters.load("a", str(folders["a"]), trusted=True, pinned=True, priority=7).tier == "device"
    assert engine.adapters.get("a").pinned


def test_patterns_of_an_adapter_that_has_waited_have_as_long_again(
    base: Path, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []
    monkeypatch.setattr(maker, "compile_adapter", lambda file, config, *rest, **more: seen.append(config.deadline))
    finder = AdapterFiles(engine_for(base).base, {}, AdapterLimits(), None)
    checked = finder.check(str(folders["a"]), None, None, None, trusted=True)
    late = time.monotonic() + 3600
    monkeypatch.setattr(time, "monotonic", lambda: late)
    finder.compile(checked, None)
    assert seen == [late + MATCHING_SECONDS]


def test_what_came_for_a_request_stays_until_it_starts(base: Path, folders: dict[str, Path], size: int) -> None:
    engine = engine_for(base, limits=AdapterLimits(device_bytes=size), adapters={n: folders[n] for n in "ab"})
    first, second, third = (engine.adapters.lease([(name, 1.0)]) for name in "aba")
    assert first.claim() is Claim.LOADING
    while engine.adapters.get("a").tier != "device":
        time.sleep(0.01)
    assert second.claim() is Claim.NO_MEMORY
    first.release()  # it left before it started: its place is free again
    second.wait()
    second.release()
    third.release()
    assert_nothing_held(engine)


def test_a_load_of_the_same_adapter_takes_nothing_from_a_request(
    base: Path, folders: dict[str, Path], size: int
) -> None:
    engine = engine_for(base, limits=AdapterLimits(device_bytes=size), adapters={n: folders[n] for n in "ab"})
    first, second = (engine.adapters.lease([(name, 1.0)]) for name in "ab")
    assert first.claim() is Claim.LOADING
    assert engine.adapters.load("a", str(folders["a"]), trusted=True).tier == "device"
    assert second.claim() is Claim.NO_MEMORY  # it came for the first one, too
    assert first.claim() is Claim.READY
    first.release()
    second.wait()
    second.release()
    assert_nothing_held(engine)


def test_an_adapter_that_cannot_come_back_ends_its_requests_alone(
    base: Path, folders: dict[str, Path], size: int, alone: dict, tmp_path: Path
) -> None:
    gone = shutil.copytree(folders["a"], tmp_path / "gone")
    engine = engine_for(base, limits=AdapterLimits(device_bytes=size), adapters={"gone": gone, "b": folders["b"]})
    shutil.rmtree(gone)
    leases = [engine.adapters.lease([(name, 1.0)]) for name in ("gone", "b", "gone")]
    ends: list[Event] = []
    for lease in leases:
        engine.submit(greedy(new_tokens=8), lease, lambda event: isinstance(event, Output) or ends.append(event))
    while len(ends) < 3:
        engine.loop.step_or_wait()
    assert [type(end) for end in ends if not isinstance(end, Finished)] == [NotFound, NotFound]
    answer = engine.generate([(greedy(new_tokens=8), engine.adapters.lease([("b", 1.0)]))])[0]
    assert answer.tokens == alone[(("b", 1.0),)]
    # Changed files are another revision: the name does not get other weights in silence.
    shutil.copytree(folders["c"], gone)
    with pytest.raises(LorarepError, match="not what it was"):
        engine.adapters.lease([("gone", 1.0)]).wait()


def test_a_cancelled_load_leaves_nothing_and_holds_nobody_up(base: Path, folders: dict[str, Path], alone: dict) -> None:
    engine = engine_for(base, adapters={"a": folders["a"]})

    def stop(stage: str, done: int, total: int) -> None:
        raise Cancelled("enough")

    with pytest.raises(Cancelled, match="enough"):
        engine.adapters.load("b", str(folders["b"]), trusted=True, progress=stop)
    assert residency(engine) == dict(a="device")
    assert engine.adapters.held_bytes().keys() == {"a"}
    assert engine.adapters.load("b", str(folders["b"]), trusted=True).tier == "device"


@pytest.mark.parametrize("error", [DataLoss, RuntimeError, KeyboardInterrupt])
def test_memory_of_a_failed_load_is_freed_at_once(
    base: Path, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    engine = engine_for(base)
    taken: list[weakref.ref[torch.Tensor]] = []

    def fails(*given: object, **more: object) -> None:
        storage = torch.zeros(64)
        taken.append(weakref.ref(storage))
        try:
            raise ValueError("a file is not what it was")
        except ValueError as cause:
            raise error("it cannot be compiled") from cause

    monkeypatch.setattr(maker, "compile_adapter", fails)
    gc.collect()
    gc.disable()
    try:
        with pytest.raises((LorarepError, KeyboardInterrupt)) as kept:
            engine.adapters.load("a", str(folders["a"]), trusted=True)
        assert [storage() for storage in taken] == [None], kept.value
    finally:
        gc.enable()


def test_another_revision_takes_the_name_only_where_it_may(
    base: Path, folders: dict[str, Path], alone: dict, tmp_path: Path
) -> None:
    engine = engine_for(base, adapters={"a": folders["a"]})
    running = engine.adapters.lease([("a", 1.0)])
    engine.adapters.load("a", str(folders["b"]), trusted=True, replace=True)
    answers = engine.generate([(greedy(new_tokens=8), x) for x in (running, engine.adapters.lease([("a", 1.0)]))])
    assert [answer.tokens for answer in answers] == [alone[(("a", 1.0),)], alone[(("b", 1.0),)]]
    assert engine.adapters.held_bytes().keys() == {"a"}


@pytest.mark.parametrize("host", [0, 2])
def test_many_adapters_in_little_memory(
    base: Path, folders: dict[str, Path], size: int, alone: dict, host: int
) -> None:
    """Requests of many threads, each for whatever it likes; none waits for ever and every token is right."""
    limits = AdapterLimits(device_bytes=4 * size, host_bytes=host * size)
    engine = engine_for(base, limits=limits, adapters=folders, max_sequences=4)
    over: list[int] = []

    def arrived() -> None:
        if sum(engine.adapters.held_bytes().values()) > 4 * size:
            over.append(1)

    engine.adapters.residency.subscribe(arrived)
    engine.start()
    wrong: list[object] = []

    def ask(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(12):
            key = chance.choice(list(alone))
            lease = engine.adapters.lease(key)
            answer = engine.generate([(greedy(new_tokens=8), lease)])[0]
            if answer.tokens != alone[key]:
                wrong.append((key, answer.tokens))

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    engine.stop()
    assert wrong == over == []
    assert engine.adapters.residency.host_bytes <= host * size
    assert_nothing_held(engine)


def test_copies_are_bit_for_bit(base: Path, folders: dict[str, Path], size: int) -> None:
    engine = engine_for(base, limits=AdapterLimits(device_bytes=size, host_bytes=size), adapters={"b": folders["b"]})
    lease = engine.adapters.lease([("b", 1.0)])
    lease.wait()
    before = lease.adapter
    lease.release()
    brought_other = engine.adapters.load("a", str(folders["a"]), trusted=True)
    assert brought_other.tier == "device"
    lease = engine.adapters.lease([("b", 1.0)])
    lease.wait()
    after = lease.adapter
    assert after is not before
    assert after.storage.data_ptr() != before.storage.data_ptr()
    for key, entry in before.entries.items():
        for mine, theirs in zip(after.entries[key], entry, strict=True):
            assert (mine is None) == (theirs is None)
            if mine is not None:
                assert torch.equal(mine, theirs)
                assert mine.stride() == theirs.stride()
                assert mine.untyped_storage().data_ptr() == after.storage.untyped_storage().data_ptr()
    lease.release()


def test_a_load_behind_another_of_its_name_can_be_cancelled(base: Path, folders: dict[str, Path]) -> None:
    engine = engine_for(base)
    begun, on = threading.Event(), threading.Event()

    def hold(stage: str, done: int, total: int) -> None:
        begun.set()
        assert on.wait(60)

    def stop(stage: str, done: int, total: int) -> None:
        assert stage == "waiting"
        raise Cancelled("enough")

    with ThreadPoolExecutor(1) as thread:
        first = thread.submit(engine.adapters.load, "a", str(folders["a"]), trusted=True, progress=hold)
        assert begun.wait(60)
        with pytest.raises(Cancelled, match="enough"):
            engine.adapters.load("a", str(folders["b"]), trusted=True, progress=stop)
        on.set()
        assert first.result().tier == "device"
