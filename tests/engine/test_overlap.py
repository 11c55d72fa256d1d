"""Steps launched before the last one has been read give the tokens of steps one after the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from lorarep_runtime.engine.engine import Engine
from lorarep_runtime.engine.overlap import MOST_PASSES
from lorarep_runtime.engine.step_loop import StepLoop
from lorarep_runtime.errors import Cancelled, EngineFailure
from lorarep_runtime.model.kv_cache import pages_of
from lorarep_runtime.request import Event, Output, Request, Sampling, Stopping
from tests.support.decoders import LayerDecoder, with_decoder
from tests.support.engines import PROMPT, assert_nothing_held, engine_for, greedy, sampled
from tests.support.models import save_adapter, save_base

PAGE = 2 * 16 * 2 * 16 * 4


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base("qwen2", tmp_path_factory.mktemp("overlap") / "base")


@pytest.fixture(scope="module")
def adapter(base: Path) -> Path:
    maps = [[0, 4], [2, 5]]
    return save_adapter(base, base.parent / "adapter", r=4, target_modules=["q_proj"], layer_replication=maps)


def ends_at(token: int) -> Request:
    return Request(PROMPT, stopping=Stopping(max_new_tokens=64, ignore_eos=True, stop_token_ids=(token,)))


@pytest.mark.parametrize(
    "scheduler",
    [dict(), dict(max_sequences=3), dict(max_step_tokens=16, max_sequences=5), dict(kv_bytes=50 * PAGE)],
    ids=str,
)
@pytest.mark.parametrize("rows", [0, 24, 128], ids=["passes", "rows of a few steps", "rows of a step"])
def test_tokens_are_those_of_steps_one_after_the_other(
    base: Path, adapter: Path, scheduler: dict[str, Any], rows: int
) -> None:
    """Prompts in passes, and those that are short as rows of steps."""
    one_by_one, ahead = (engine_for(base, adapters={"deep": adapter}, **scheduler) for _ in range(2))
    decoder = with_decoder(ahead)
    decoder.most_rows = rows
    twelfth = one_by_one.generate([(greedy(new_tokens=12), one_by_one.adapters.lease([]))])[0].tokens[-1]
    asked = [
        (greedy(new_tokens=70), "deep"),
        (greedy(PROMPT[:7], new_tokens=50), None),
        (ends_at(twelfth), None),
        (sampled(1), "deep"),
        (replace(greedy(PROMPT[:5], new_tokens=9), logprobs=2), None),
        (Request(PROMPT[:9], stopping=Stopping(max_new_tokens=40, min_new_tokens=20)), "deep"),
    ]
    answers = [
        engine.generate((r, engine.adapters.lease([(name, 1.0)] if name else [])) for r, name in asked)
        for engine in (one_by_one, ahead)
    ]
    assert [a.tokens for a in answers[1]] == [a.tokens for a in answers[0]]
    assert [a.finished.reason for a in answers[1]] == [a.finished.reason for a in answers[0]]
    assert [p.token for p in answers[1][4].logprobs] == list(answers[0][4].tokens)
    assert decoder.steps > decoder.told + 10
    assert (decoder.prompts > 0) == (rows > 0)
    assert (ahead.stats().preemptions > 0) == ("kv_bytes" in scheduler)
    assert_nothing_held(ahead)


def submit(engine: Engine, request: Request, on_event: Callable[[Event], None]) -> int:
    return engine.submit(request, engine.adapters.lease([]), on_event)


def test_a_step_is_launched_before_the_last_is_read_and_none_past_the_end(base: Path) -> None:
    engine = engine_for(base)
    decoder = with_decoder(engine)
    launched: list[int] = []
    submit(engine, greedy(new_tokens=6), lambda event: launched.append(decoder.steps))
    while engine.loop.step():
        pass
    # The first token is the prompt's; the last event is the end.
    assert launched == [0, 2, 3, 4, 5, 5, 5]
    assert decoder.told == 1


def test_steps_go_on_without_the_sequences_that_end(base: Path, adapter: Path) -> None:
    """Those that end by their length are left out of the next step before their last token is read; one that ends by
    its token has been computed once more. The rows of the others are never set anew."""
    one_by_one, ahead = (engine_for(base, adapters={"deep": adapter}) for _ in range(2))
    decoder = with_decoder(ahead)
    seventh = one_by_one.generate([(greedy(new_tokens=7), one_by_one.adapters.lease([]))])[0].tokens[-1]
    hot = replace(greedy(PROMPT[:6], new_tokens=33), sampling=Sampling(temperature=1.5, seed=3))
    asked = [
        (greedy(PROMPT[:5], new_tokens=4), None),
        (greedy(PROMPT[:7], new_tokens=20), "deep"),
        (ends_at(seventh), None),
        (greedy(PROMPT[:9], new_tokens=20), None),
        (hot, "deep"),
    ]
    answers = [
        engine.generate((r, engine.adapters.lease([(name, 1.0)] if name else [])) for r, name in asked)
        for engine in (one_by_one, ahead)
    ]
    assert [a.tokens for a in answers[1]] == [a.tokens for a in answers[0]]
    assert decoder.told == 1
    assert_nothing_held(ahead)


def test_a_prompt_that_is_computed_a_token_at_a_time_goes_on_with_its_own_tokens(base: Path) -> None:
    """Where there is room for one row beside those that decode, all sequences have one row, as if all decoded."""
    one_by_one, ahead = (engine_for(base, max_sequences=2) for _ in range(2))
    decoder = with_decoder(ahead)
    decoder.most_rows = 2
    # The third begins when the second ends, and is then one of all that may run.
    asked = [greedy(new_tokens=40), greedy(new_tokens=4), greedy(PROMPT[:7], new_tokens=9)]
    answers = [engine.generate((r, engine.adapters.lease([])) for r in asked) for engine in (one_by_one, ahead)]
    assert [a.tokens for a in answers[1]] == [a.tokens for a in answers[0]]


@pytest.mark.parametrize("was_first", [False, True])
def test_passes_over_prompts_that_arrive_together_leave_few_steps_between_them(base: Path, was_first: bool) -> None:
    """Those of them that stream wait for four passes at most. A stream that was first has a step beside each."""
    engine = engine_for(base, max_step_tokens=40, max_sequences=16)
    decoder, work = LayerDecoder(engine), []

    def noted(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def noting(*arguments: Any) -> Any:
            work.append(name)
            return call(*arguments)

        return noting

    decoder.prefill = noted("pass", decoder.prefill)  # type: ignore[method-assign]
    decoder.step = noted("step", decoder.step)  # type: ignore[method-assign]
    engine.loop = engine.make_loop(decoder)
    if was_first:
        engine.submit(greedy(new_tokens=200), engine.adapters.lease([]), lambda event: None)
        for _ in range(5):
            engine.loop.step()
        work.clear()
    for i in range(15):
        engine.submit(greedy((i, *PROMPT[1:]), new_tokens=12), engine.adapters.lease([]), lambda event: None)
    while engine.loop.is_busy:
        engine.loop.step()
    together = [len(list(some)) for name, some in groupby(work) if name == "pass"]
    assert max(together) == (1 if was_first else MOST_PASSES)
    assert sum(together) > MOST_PASSES


def test_rows_that_sample_are_overlapped_too(base: Path) -> None:
    hot = Sampling(temperature=1.5, top_k=50, top_p=0.97, min_p=0.01)
    asked = [replace(greedy(PROMPT[: 5 + seed]), sampling=replace(hot, seed=seed)) for seed in range(3)] + [greedy()]
    one_by_one, ahead = (engine_for(base) for _ in range(2))
    decoder = with_decoder(ahead)
    answers = [engine.generate((r, engine.adapters.lease([])) for r in asked) for engine in (one_by_one, ahead)]
    assert [a.tokens for a in answers[1]] == [a.tokens for a in answers[0]]
    assert len(set(answers[0][0].tokens)) > 10
    assert decoder.told == 1


def test_rows_that_are_not_plain_are_read_before_their_next_step(base: Path) -> None:
    engine = engine_for(base)
    decoder = with_decoder(engine)
    launched: list[int] = []
    for request in (replace(greedy(new_tokens=4), logprobs=1), greedy(new_tokens=4)):
        submit(engine, request, lambda event: launched.append(decoder.steps))
    while engine.loop.step():
        pass
    assert [launched.count(steps) for steps in range(4)] == [2, 2, 2, 4]


@pytest.mark.parametrize(("has_time", "early"), [(False, []), (True, [26, 27, 28, 29, 30, 31, 32])])
def test_where_there_is_time_pages_are_taken_before_they_are_wanted(
    base: Path, monkeypatch: pytest.MonkeyPatch, has_time: bool, early: list[int]
) -> None:
    monkeypatch.setattr(StepLoop, "has_time", has_time)
    engine = engine_for(base)
    with_decoder(engine)
    submit(engine, greedy(PROMPT, new_tokens=29), lambda event: None)  # of which 48 are computed: three pages
    more: list[int] = []
    while engine.loop.step():
        for sequence in engine.loop.scheduler.running:
            if sequence.table.pages.shape[1] > pages_of(sequence.computed):
                more.append(sequence.computed)
    assert more == early


def test_where_few_pages_are_left_none_is_taken_before_it_is_wanted(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StepLoop, "has_time", False)
    engine = engine_for(base)
    decoder = with_decoder(engine)
    for prompt in (PROMPT, PROMPT[:15]):
        submit(engine, greedy(prompt), lambda event: None)
    engine.loop.step()
    first, second = engine.loop.scheduler.running
    while first.computed < 32:
        engine.loop.step()
    engine.pool.take(engine.pool.free - first.table.depth)
    monkeypatch.setattr(StepLoop, "has_time", True)
    engine.loop.step()
    assert (first.computed, first.table.pages.shape[1], second.table.pages.shape[1]) == (33, 3, 2)
    assert decoder.told == 1


def test_a_request_that_comes_during_a_step_is_admitted_after_it(base: Path) -> None:
    engine = engine_for(base)
    decoder = with_decoder(engine)
    submit(engine, greedy(), lambda event: None)
    for _ in range(3):
        engine.loop.step()
    submit(engine, greedy(), lambda event: None)
    launched = decoder.steps
    engine.loop.step()
    assert (decoder.steps, len(engine.loop.scheduler.running)) == (launched, 1)
    engine.loop.step()
    assert len(engine.loop.scheduler.running) == 2


def test_a_request_that_is_cancelled_during_a_step_ends_there_and_the_others_go_on(base: Path) -> None:
    engine = engine_for(base)
    expected = engine.generate([(greedy(), engine.adapters.lease([]))])[0].tokens
    with_decoder(engine)
    cancelled: list[Event] = []
    others: list[Event] = []
    number = submit(engine, greedy(), cancelled.append)
    submit(engine, greedy(), others.append)
    for _ in range(5):
        engine.loop.step()
    assert engine.loop.overlap.pending is not None
    engine.cancel(number)
    while engine.loop.step():
        pass
    assert [type(event) for event in cancelled[:-1]] == [Output] * 4
    assert isinstance(cancelled[-1], Cancelled)
    assert tuple(t for event in others if isinstance(event, Output) for t in event.tokens) == expected
    assert_nothing_held(engine)


def test_an_adapter_is_held_until_no_step_reads_it(base: Path, adapter: Path) -> None:
    """The one row ends by a stop token that nobody foresaw: its next step is pending."""
    engine = engine_for(base, adapters={"a": adapter})
    first = engine.generate([(greedy(new_tokens=4), engine.adapters.lease([("a", 1.0)]))])[0].tokens
    with_decoder(engine)
    held: list[int] = []
    engine.submit(
        ends_at(first[3]),
        engine.adapters.lease([("a", 1.0)]),
        lambda event: held.append(engine.adapters.get("a").references),
    )
    while engine.stats().running or engine.stats().waiting:
        engine.loop.step()
    assert engine.loop.overlap.pending is not None
    assert held[-1] == engine.adapters.get("a").references == 1
    engine.loop.step_or_wait()
    assert_nothing_held(engine)


@pytest.mark.parametrize("broken", ["step", "set_pages"])
def test_a_step_that_cannot_be_launched_ends_its_requests_alone(
    base: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    """Whether it fails itself or where its pages are taken note of."""
    engine = engine_for(base)
    expected = engine.generate([(greedy(), engine.adapters.lease([]))])[0].tokens
    decoder = with_decoder(engine)
    events: list[Event] = []
    # Its third overlapped step is the first token on a second page.
    submit(engine, greedy(PROMPT[:14]), events.append)
    for _ in range(3):
        engine.loop.step()
    with monkeypatch.context() as patched:
        patched.setattr(decoder, broken, lambda *_: 1 / 0)
        engine.loop.step()
    assert [type(event) for event in events] == [Output, Output, EngineFailure]
    assert not engine.loop.step()
    assert_nothing_held(engine)
    assert engine.generate([(greedy(), engine.adapters.lease([]))])[0].tokens == expected
