"""Prompts are computed in slices while other streams decode, and nobody's answer changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lorarep_runtime.config import PAGE_TOKENS, BaseConfig, EngineConfig, SchedulerConfig
from lorarep_runtime.engine import deferred_releases
from lorarep_runtime.engine.engine import Engine
from lorarep_runtime.engine.prefill_pass import SHARE, PrefillPass, SlicePacer
from lorarep_runtime.engine.step_loop import StepLoop
from lorarep_runtime.errors import Cancelled, EngineFailure
from lorarep_runtime.request import Event, Output, Request
from tests.support.decoders import LateForward, with_decoder
from tests.support.engines import PROMPT, assert_nothing_held, engine_for, greedy
from tests.support.models import save_adapter, save_base

LAYERS = 6
PAGE = 2 * 16 * 2 * 16 * 4


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base("qwen2", tmp_path_factory.mktemp("prefill") / "base")


@pytest.fixture
def slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has all slices be of one visit each."""
    monkeypatch.setattr(SlicePacer, "visits", lambda self: 1)


class Caller:
    def __init__(self, engine: Engine, request: Request, adapter: str | None = None) -> None:
        self.events: list[Event] = []
        lease = engine.adapters.lease([(adapter, 1.0)] if adapter else [])
        self.id = engine.submit(request, lease, self.events.append)

    @property
    def tokens(self) -> tuple[int, ...]:
        return tuple(t for event in self.events if isinstance(event, Output) for t in event.tokens)


def alone(base: Path, request: Request) -> tuple[int, ...]:
    engine = engine_for(base)
    return engine.generate([(request, engine.adapters.lease([]))])[0].tokens


def begun(engine: Engine, request: Request) -> tuple[Caller, Caller]:
    """A stream that decodes, and a prompt two slices into its pass."""
    with_decoder(engine)
    stream = Caller(engine, request)
    for _ in range(3):
        engine.loop.step()
    prompt = Caller(engine, request)
    engine.loop.step()  # the pending step is read
    for _ in range(2):
        engine.loop.step()
    assert engine.loop.prefill.pending is not None
    return stream, prompt


def to_the_end(engine: Engine) -> None:
    while engine.loop.is_busy:
        engine.loop.step()
    assert_nothing_held(engine)


@pytest.mark.usefixtures("slices")
def test_a_stream_has_a_token_between_any_two_slices(base: Path) -> None:
    engine = engine_for(base)
    stream, prompt = begun(engine, greedy(new_tokens=40))
    had = len(stream.tokens)
    steps = 0
    while not prompt.tokens:
        engine.loop.step()
        steps += 1
    assert (steps, len(stream.tokens) - had) == (LAYERS - 2, LAYERS - 2)
    to_the_end(engine)
    assert stream.tokens == prompt.tokens == alone(base, greedy(new_tokens=40))


def test_a_prompt_that_is_alone_is_not_sliced(base: Path) -> None:
    engine = engine_for(base)
    with_decoder(engine)
    prompt = Caller(engine, greedy())
    engine.loop.step()
    assert len(prompt.tokens) == 1


@pytest.mark.usefixtures("slices")
def test_streams_that_end_leave_a_prompt_the_whole_step(base: Path) -> None:
    engine = engine_for(base)
    stream, prompt = begun(engine, greedy(new_tokens=40))
    engine.cancel(stream.id)
    engine.loop.step()
    engine.loop.step()
    assert len(prompt.tokens) == 1
    to_the_end(engine)


@pytest.mark.usefixtures("slices")
@pytest.mark.parametrize("length", range(8, 14))
def test_a_cancelled_prompts_pages_are_back_within_a_step_and_are_not_written_to(base: Path, length: int) -> None:
    """Streams of some length take the pages while the pass that would write to them goes on for another prompt."""
    request = greedy(PROMPT[:length], new_tokens=3 * PAGE_TOKENS)
    engine = engine_for(base, kv_bytes=LAYERS * 6 * PAGE)
    with_decoder(engine)
    streams = [Caller(engine, request) for _ in range(2)]
    for _ in range(2):
        engine.loop.step()
    gone, stays = (Caller(engine, replace(request, prompt=PROMPT)) for _ in range(2))
    engine.loop.step()
    engine.loop.step()
    assert engine.loop.prefill.pending is not None
    used = engine.pool.used
    engine.cancel(gone.id)
    engine.loop.step()
    assert isinstance(gone.events[-1], Cancelled)
    # The prompt had two pages at each position; each stream may have begun its second.
    assert engine.pool.used in (used - 2 * LAYERS, used)
    to_the_end(engine)
    assert streams[0].tokens == streams[1].tokens == alone(base, request)
    assert stays.tokens == alone(base, replace(request, prompt=PROMPT))


@pytest.mark.usefixtures("slices")
def test_one_of_a_pass_is_cancelled_and_the_other_has_its_tokens(base: Path) -> None:
    request = greedy(new_tokens=3 * PAGE_TOKENS)
    engine = engine_for(base, kv_bytes=LAYERS * 9 * PAGE)
    with_decoder(engine)
    stream = Caller(engine, request)
    for _ in range(3):
        engine.loop.step()
    first, second = (Caller(engine, request) for _ in range(2))
    for _ in range(3):
        engine.loop.step()
    engine.cancel(first.id)
    to_the_end(engine)
    assert isinstance(first.events[-1], Cancelled)
    assert stream.tokens == second.tokens == alone(base, request)


@pytest.mark.usefixtures("slices")
def test_streams_do_not_take_pages_from_a_pass(base: Path) -> None:
    """Pages run short while the youngest computes: the next youngest gives its own back."""
    request = greedy(new_tokens=60)
    engine = engine_for(base, kv_bytes=LAYERS * 6 * PAGE)
    with_decoder(engine)
    older, younger = Caller(engine, request), Caller(engine, request)
    for _ in range(11):
        engine.loop.step()
    last = Caller(engine, replace(request, prompt=PROMPT[:17]))
    to_the_end(engine)
    assert engine.stats().preemptions
    assert older.tokens == younger.tokens == alone(base, request)
    assert last.tokens == alone(base, replace(request, prompt=PROMPT[:17]))


@pytest.mark.usefixtures("slices")
def test_a_stream_that_gave_its_pages_back_reads_the_new_ones(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To a decoder it looks like a stream that goes on: it has its old length again, and no other has decoded since."""
    monkeypatch.setattr(StepLoop, "has_time", False)  # no page is taken before it is wanted
    request = greedy(new_tokens=40)
    engine = engine_for(base, kv_bytes=4 * LAYERS * PAGE, max_step_tokens=32)
    with_decoder(engine)
    stream = Caller(engine, request)
    engine.loop.step()
    (sequence,) = engine.loop.scheduler.running
    while sequence.computed < 31:
        engine.loop.step()
    Caller(engine, replace(greedy(new_tokens=1), prompt=tuple(range(30))))
    while engine.loop.is_busy:
        engine.loop.step()
    assert engine.stats().preemptions == 1
    assert stream.tokens == alone(base, request)


@pytest.mark.usefixtures("slices")
def test_a_slice_that_fails_ends_the_prompt_alone(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_for(base)
    stream, prompt = begun(engine, greedy(new_tokens=40))

    def fails(self: LateForward, visits: int) -> None:
        raise RuntimeError("a kernel failed")

    with monkeypatch.context() as broken:
        broken.setattr(LateForward, "advance", fails)
        engine.loop.step()
    assert isinstance(prompt.events[-1], EngineFailure)
    again = Caller(engine, greedy(new_tokens=40))
    to_the_end(engine)
    assert stream.tokens == again.tokens == alone(base, greedy(new_tokens=40))


@pytest.mark.usefixtures("slices")
def test_an_adapter_is_held_until_no_slice_reads_it(base: Path, tmp_path: Path) -> None:
    maps = [[0, 4], [2, 5]]
    adapter = save_adapter(base, tmp_path / "adapter", r=4, target_modules=["q_proj"], layer_replication=maps)
    engine = engine_for(base, adapters={"a": adapter})
    with_decoder(engine)
    Caller(engine, greedy())
    for _ in range(3):
        engine.loop.step()
    gone, stays = (Caller(engine, greedy(), "a") for _ in range(2))
    for _ in range(3):
        engine.loop.step()
    assert engine.loop.prefill.pending is not None

    def references() -> int:
        return engine.adapters.get("a").references

    engine.cancel(gone.id)
    engine.loop.step()
    assert references() == 2
    while not stays.tokens:
        engine.loop.step()
    assert references() == 1
    to_the_end(engine)


def test_an_adapter_of_a_cancelled_prompt_is_held_until_the_device_has_passed_its_chunk(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody waits for a pass that ends in the middle of a prompt, so the device may read the adapter after it."""
    marks: list[SimpleNamespace] = []

    def mark(device: torch.device) -> SimpleNamespace:
        marks.append(SimpleNamespace(is_passed=False))
        return marks[-1]

    monkeypatch.setattr(deferred_releases, "DeviceMark", mark)
    adapter = save_adapter(base, tmp_path / "adapter", r=4, target_modules=["q_proj"])
    engine = engine_for(base, adapters={"a": adapter}, max_step_tokens=32)
    long = replace(greedy(new_tokens=4), prompt=PROMPT * 5)
    caller = Caller(engine, long, "a")
    engine.loop.step()
    assert engine.loop.prefill.pending is None
    assert not caller.tokens
    engine.cancel(caller.id)
    engine.loop.step()
    assert isinstance(caller.events[-1], Cancelled)
    assert engine.pool.used == 0
    assert engine.loop.is_busy
    assert not engine.loop.step()
    assert engine.adapters.get("a").references == 1
    marks[0].is_passed = True
    to_the_end(engine)


def test_a_loop_that_ends_releases_what_the_device_has_not_passed(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deferred_releases, "DeviceMark", lambda device: SimpleNamespace(is_passed=False))
    adapter = save_adapter(base, tmp_path / "adapter", r=4, target_modules=["q_proj"])
    engine = engine_for(base, adapters={"a": adapter}, max_step_tokens=32)
    caller = Caller(engine, replace(greedy(new_tokens=4), prompt=PROMPT * 5), "a")
    engine.loop.step()
    engine.cancel(caller.id)
    engine.start()
    engine.stop()
    assert_nothing_held(engine)


if torch.cuda.is_available():

    def test_a_gpu_reads_a_cancelled_prompts_adapter_before_it_is_released(
        base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        adapter = save_adapter(base, tmp_path / "adapter", r=4, target_modules=["q_proj"])
        config = BaseConfig(str(base), dtype="bfloat16", device="cuda")
        limits = SchedulerConfig(kv_bytes=64 << 20, max_step_tokens=32, prefix_cache=False)  # all is computed twice
        engine = Engine(EngineConfig(config, scheduler=limits))
        engine.adapters.load("a", str(adapter), trusted=True)
        prompt = replace(greedy(new_tokens=4), prompt=PROMPT * 5)
        monkeypatch.setattr(engine.loop.overlap.decoder, "rows_with_prompts", lambda decoding: 0)
        engine.generate([(prompt, engine.adapters.lease([("a", 1.0)]))])  # kernels load once, and wait for the device
        caller = Caller(engine, prompt, "a")
        launch = PrefillPass.launch_visits

        def slow(self: PrefillPass, *arguments: Any) -> None:
            torch.cuda._sleep(3_000_000_000)  # cycles: more than a second
            launch(self, *arguments)

        monkeypatch.setattr(PrefillPass, "launch_visits", slow)
        engine.loop.step()
        assert engine.loop.prefill.pending is None
        assert not caller.tokens
        engine.cancel(caller.id)
        engine.loop.step()
        assert isinstance(caller.events[-1], Cancelled)
        assert engine.adapters.get("a").references == 1
        torch.cuda.synchronize()
        engine.loop.step()
        assert_nothing_held(engine)


def test_slices_are_as_long_as_measured_times_allow() -> None:
    class Timer:
        def __init__(self, milliseconds: float | None) -> None:
            self.milliseconds = milliseconds

    def after(decoding: float | None, slices: Sequence[tuple[int, float | None]]) -> int:
        pacer = SlicePacer()
        pacer.record_decode(decoding)
        for visits, milliseconds in slices:
            pacer.record_slice(visits, Timer(milliseconds))  # type: ignore[arg-type]
        return pacer.visits()

    assert after(None, [(1, 2.0)]) == 1
    assert after(6.0, []) == 1
    assert after(6.0, [(1, None)]) == 1
    assert after(8.0, [(1, 2.0)]) == int(8 * SHARE / 2) == 2
    assert after(8.0, [(1, 2.0), (2, 1.0), (2, None)]) == int(8 * SHARE / 0.5) == 8
    assert after(6.0, [(1, 100.0)]) == 1
