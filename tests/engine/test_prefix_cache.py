"""Requests that begin alike share pages, and nobody's answer changes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lorarep_runtime.config import PAGE_TOKENS
from lorarep_runtime.engine.engine import Engine
from lorarep_runtime.engine.launched_step import LaunchedStep
from lorarep_runtime.engine.offline import Completion
from lorarep_runtime.engine.prefill_pass import SlicePacer
from lorarep_runtime.engine.step_loop import StepLoop
from lorarep_runtime.errors import AlreadyExists, Cancelled, EngineFailure, FailedPrecondition, InvalidArgument
from lorarep_runtime.model.batch import Batch
from lorarep_runtime.request import Event, Finished
from tests.support.decoders import LateForward, with_decoder
from tests.support.engines import PROMPT, assert_nothing_held, engine_for, greedy
from tests.support.loops import DEPTH, VOCAB, Counting, Loop
from tests.support.models import save_adapter, save_base

PAGE = 2 * 16 * 2 * 16 * 4
LAYERS = 6
LONG = PROMPT + PROMPT  # 40 tokens: two full pages at each position
TARGETS = ["q_proj", "v_proj", "down_proj"]
Adapters = list[tuple[str, float]]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base("qwen2", tmp_path_factory.mktemp("prefixes") / "base")


@pytest.fixture(scope="module")
def adapters(base: Path) -> dict[str, Path]:
    own: dict[str, dict[str, Any]] = {
        "lora": {},
        "dora": dict(use_dora=True),
        "deep": dict(layer_replication=[[0, 4], [2, 5]]),
        "other": {},
    }
    return {
        name: save_adapter(base, base.parent / name, seed=seed, r=4, target_modules=TARGETS, **config)
        for seed, (name, config) in enumerate(own.items())
    }


def ask(engine: Engine, prompt: tuple[int, ...], adapters: Adapters, new_tokens: int = 20, **fields: Any) -> Completion:
    """The answer to a request that is alone."""
    stack = fields.pop("stack", None)
    request = replace(greedy(prompt, new_tokens), **fields)
    (answer,) = engine.generate([(request, engine.adapters.lease(adapters, stack))])
    return answer


def cached(engine: Engine, prompt: tuple[int, ...], adapters: Adapters | None = None, **fields: Any) -> int:
    """How many of a prompt's tokens are in the cache."""
    return ask(engine, prompt, adapters or [], 1, **fields).finished.cached_tokens


STACKS = {"repeated": (0, 1, 2, 1, 2, 3, 4, 5)}
TARGETED: list[tuple[Adapters, str | None]] = [
    ([], None),
    ([], "repeated"),
    ([("lora", 1.0)], None),
    ([("dora", 1.0)], None),
    ([("deep", 1.0)], None),
    ([("lora", 0.5), ("dora", 1.5)], None),
]
"""The base, two more stacks, a LoRA, a DoRA and a mix."""


def conversations(engine: Engine) -> tuple[list[tuple[int, ...]], list[int]]:
    """For each target a prompt, and then three that begin like it: all answers, and the cached tokens of each."""
    first = LONG + PROMPT[:9]
    answers = engine.generate((greedy(first, 20), engine.adapters.lease(*target)) for target in TARGETED)
    later = [
        (greedy(prompt, 5), engine.adapters.lease(*target))
        for target, answer in zip(TARGETED, answers, strict=True)
        for prompt in (LONG + PROMPT[5:8], (*first, *answer.tokens, *PROMPT[:5]), LONG[:33])
    ]
    answers += engine.generate(later)
    return [answer.tokens for answer in answers], [answer.finished.cached_tokens for answer in answers]


@pytest.fixture(scope="module")
def without_cache(base: Path, adapters: dict[str, Path]) -> list[tuple[int, ...]]:
    engine = engine_for(base, stacks=STACKS, adapters=adapters, prefix_cache=False)
    tokens, hits = conversations(engine)
    assert not any(hits)
    assert engine.stats().prefix_queries == 0
    return tokens


@pytest.mark.parametrize(
    ("scheduler", "rows"),
    [
        (dict(), None),
        (dict(max_step_tokens=16), None),
        (dict(chunked_prefill=False, max_sequences=16), 0),
        (dict(max_sequences=16), 24),
    ],
    ids=["at once", "in chunks", "in passes", "as rows of steps"],
)
def test_tokens_are_those_without_a_cache(
    base: Path,
    adapters: dict[str, Path],
    without_cache: list[tuple[int, ...]],
    scheduler: dict[str, Any],
    rows: int | None,
) -> None:
    """And nobody finds what another adapter or stack has computed."""
    engine = engine_for(base, stacks=STACKS, adapters=adapters, **scheduler)
    if rows is not None:
        with_decoder(engine).most_rows = rows
    tokens, hits = conversations(engine)
    assert tokens == without_cache
    # The second of the later ones has 49 tokens of the first prompt and 20 of its answer, of which the last was not
    # computed with.
    assert hits == [0] * len(TARGETED) + [32, 64, 32] * len(TARGETED)
    stats = engine.stats()
    assert (stats.prefix_queries, stats.prefix_hits) == (stats.tokens_in, sum(hits))
    assert_nothing_held(engine)


def test_of_a_prompt_that_is_cached_whole_the_last_token_is_computed(base: Path) -> None:
    engine = engine_for(base)
    first = ask(engine, LONG[:32], [])
    assert first.finished.cached_tokens == 0
    again = ask(engine, LONG[:32], [])
    assert (again.tokens, again.finished.cached_tokens) == (first.tokens, 16)
    longer = ask(engine, LONG[:33], [])
    assert longer.finished.cached_tokens == 32
    assert longer.tokens == ask(engine_for(base), LONG[:33], []).tokens


def test_an_adapter_that_takes_anothers_name_meets_none_of_its_pages(
    base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    engine = engine_for(base, adapters={"a": adapters["lora"]})
    assert [cached(engine, LONG, [("a", 1.0)]) for _ in range(2)] == [0, 32]
    assert cached(engine, LONG, [("a", 0.5)]) == 0
    engine.adapters.load("a", str(adapters["other"]), trusted=True, replace=True)
    answer = ask(engine, LONG, [("a", 1.0)])
    assert answer.finished.cached_tokens == 0
    alone = engine_for(base, adapters={"a": adapters["other"]})
    assert answer.tokens == ask(alone, LONG, [("a", 1.0)]).tokens
    engine.adapters.load("renamed", str(adapters["lora"]), trusted=True)
    assert cached(engine, LONG, [("renamed", 1.0)]) == 32


def test_a_folder_whose_config_has_changed_is_another_adapter(base: Path, tmp_path: Path) -> None:
    """Although its weights are the same: they are loaded as such, and share no pages."""
    folder = save_adapter(base, tmp_path / "adapter", r=4, lora_alpha=8, target_modules=TARGETS)
    engine = engine_for(base, adapters={"a": folder})
    assert [cached(engine, LONG, [("a", 1.0)]) for _ in range(2)] == [0, 32]
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 64}))
    with pytest.raises(AlreadyExists):
        engine.adapters.load("a", str(folder), trusted=True)
    engine.adapters.load("a", str(folder), trusted=True, replace=True)
    answer = ask(engine, LONG, [("a", 1.0)])
    assert answer.finished.cached_tokens == 0
    assert answer.tokens == ask(engine_for(base, adapters={"a": folder}), LONG, [("a", 1.0)]).tokens


def test_requests_of_different_salts_share_nothing(base: Path) -> None:
    engine = engine_for(base)
    salts = ["", "one", "two", "one", "", "two"]
    assert [cached(engine, LONG, cache_salt=salt) for salt in salts] == [0, 0, 0, 32, 32, 32]
    with pytest.raises(InvalidArgument, match="cache_salt: 257 characters"):
        ask(engine, LONG, [], cache_salt="s" * 257)


def test_a_full_cache_leaves_as_much_room_as_an_empty_one(base: Path) -> None:
    """Whatever others have left there, the longest request runs as it would alone."""
    engine = engine_for(base, kv_bytes=LAYERS * 6 * PAGE)
    expected = ask(engine, LONG, [], 50).tokens
    for start in range(2):
        ask(engine, tuple(range(start, 90 + start)), [], 2)
        assert ask(engine, LONG, [], 50).tokens == expected
    assert engine.stats().preemptions == 0
    assert_nothing_held(engine)


def test_what_was_used_last_stays_longest(base: Path) -> None:
    engine = engine_for(base, kv_bytes=LAYERS * 6 * PAGE)
    others = [tuple(range(start, start + 33)) for start in (0, 50, 100)]
    assert [cached(engine, prompt) for prompt in others[:2]] == [0, 0]
    assert cached(engine, others[0]) == 32
    assert cached(engine, others[2]) == 0  # three columns, of which two are free
    assert [cached(engine, prompt) for prompt in (others[0], others[1])] == [32, 16]


def test_a_stream_that_gave_its_pages_back_finds_them(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of its prompt and of its answer, as far as nobody has needed them."""
    engine = engine_for(base, kv_bytes=LAYERS * 5 * PAGE)
    begun: list[tuple[int, int]] = []
    schedule = engine.loop.scheduler.schedule

    def recorded() -> Any:
        made = schedule()
        begun.extend((sequence.computed, len(sequence.tokens)) for sequence in made.admitted)
        return made

    monkeypatch.setattr(engine.loop.scheduler, "schedule", recorded)
    prompts = [PROMPT[:12], PROMPT[5:20]]
    answers = engine.generate((greedy(prompt, 34), engine.adapters.lease([])) for prompt in prompts)
    assert engine.stats().preemptions
    assert begun[:2] == [(0, 12), (0, 15)]
    assert all(computed >= PAGE_TOKENS for computed, _ in begun[2:])
    assert [answer.finished.cached_tokens for answer in answers] == [0, 0]
    expected = [ask(engine_for(base), prompt, [], 34).tokens for prompt in prompts]
    assert [answer.tokens for answer in answers] == expected
    assert_nothing_held(engine)


class Caller:
    def __init__(self, engine: Engine, prompt: tuple[int, ...], new_tokens: int = 40) -> None:
        self.events: list[Event] = []
        self.id = engine.submit(greedy(prompt, new_tokens), engine.adapters.lease([]), self.events.append)


def with_a_step_under_way(engine: Engine) -> tuple[Caller, tuple[int, ...]]:
    """A stream whose step is pending that fills its second page, and the tokens until there."""
    with_decoder(engine)
    caller = Caller(engine, PROMPT)
    engine.loop.step()
    (sequence,) = engine.loop.scheduler.running
    while sequence.computed < 32:
        engine.loop.step()
    assert engine.loop.overlap.pending is not None
    return caller, tuple(sequence.tokens)


def to_the_end(engine: Engine) -> None:
    while engine.loop.is_busy:
        engine.loop.step()
    assert_nothing_held(engine)


def test_what_a_step_under_way_writes_is_not_found_when_its_request_is_cancelled(base: Path) -> None:
    engine = engine_for(base)
    caller, tokens = with_a_step_under_way(engine)
    engine.cancel(caller.id)
    to_the_end(engine)
    assert isinstance(caller.events[-1], Cancelled)
    assert len(tokens) == 32
    assert cached(engine, (*tokens, 1)) == 16


@pytest.mark.parametrize("broken", ["sampled", "__init__"])
def test_what_a_failed_step_writes_is_not_found(base: Path, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    """Whether it fails when it is read, or the next one when it is launched."""
    engine = engine_for(base)
    caller, tokens = with_a_step_under_way(engine)
    with monkeypatch.context() as patched:
        patched.setattr(LaunchedStep, broken, lambda *_, **__: 1 / 0)
        engine.loop.step()
    assert isinstance(caller.events[-1], EngineFailure)
    to_the_end(engine)
    assert cached(engine, (*tokens, 1)) == 16


def test_what_a_pass_under_way_writes_is_not_found(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither when its prompt is cancelled, whose pages it no longer writes to, nor when the pass fails."""
    monkeypatch.setattr(SlicePacer, "visits", lambda self: 1)
    engine = engine_for(base)
    with_decoder(engine)
    Caller(engine, PROMPT[:3])
    for _ in range(3):
        engine.loop.step()
    gone, other = Caller(engine, LONG), Caller(engine, LONG[1:])
    for _ in range(3):
        engine.loop.step()
    assert engine.loop.prefill.pending is not None
    engine.cancel(gone.id)
    engine.loop.step()
    assert isinstance(gone.events[-1], Cancelled)
    with monkeypatch.context() as patched:
        patched.setattr(LateForward, "advance", lambda self, visits: 1 / 0)
        engine.loop.step()
    assert isinstance(other.events[-1], EngineFailure)
    to_the_end(engine)
    assert [cached(engine, prompt) for prompt in (LONG, LONG[1:])] == [0, 0]


def test_a_shared_page_outlives_those_that_end(base: Path) -> None:
    """Streams that share a prompt's pages end at any time; nothing of the others changes."""
    engine = engine_for(base)
    expected = ask(engine, LONG, [], 40).tokens
    callers = [Caller(engine, LONG) for _ in range(3)]
    for _ in range(3):
        engine.loop.step()
    assert engine.pool.used == LAYERS * (2 + 3)
    engine.cancel(callers[0].id)
    engine.loop.step()
    assert engine.pool.used == LAYERS * (2 + 2)
    to_the_end(engine)
    for caller in callers[1:]:
        assert isinstance(caller.events[-1], Finished)
        assert tuple(t for event in caller.events[:-1] for t in event.tokens) == expected  # type: ignore[union-attr]


def test_an_answer_that_overflows_leaves_nothing_to_be_found() -> None:
    class Overflow(Counting):
        def logits(self, rows: torch.Tensor, /) -> torch.Tensor:
            return super().logits(rows) * float("inf")

    kinds: list[type[Counting]] = [Overflow]
    loop = Loop(forward=lambda batch: kinds[-1](batch))
    bad = loop.submit(prompt=tuple(range(20)), caches=True)
    assert loop.loop.step()
    assert isinstance(loop.answers[bad][-1], FailedPrecondition)
    kinds.append(Counting)
    good = loop.submit(prompt=tuple(range(20)), caches=True)
    while loop.loop.step():
        pass
    assert loop.stats.prefix_hits == 0
    assert loop.tokens(good) == [20, 21, 22]
    loop.assert_nothing_held()


def test_only_new_tokens_are_computed_and_only_new_pages_are_taken() -> None:
    batches: list[tuple[int, int]] = []

    def forward(batch: Batch) -> Counting:
        batches.append((len(batch.token_ids), int(batch.token_places[0])))
        return Counting(batch)

    loop = Loop(forward=forward, pages=4 * DEPTH)
    prompt = tuple(token % VOCAB for token in range(50))
    for _ in range(2):
        loop.submit(prompt=prompt, new_tokens=1, caches=True)
        while loop.loop.step():
            pass
    assert batches == [(50, 0), (2, 48)]
    loop.assert_nothing_held()


def test_two_that_share_run_where_pages_for_both_alone_would_be_missing() -> None:
    """A prompt of three pages; each has one more for itself."""
    loop = Loop(pages=5 * DEPTH)
    prompt = tuple(token % VOCAB for token in range(50))
    loop.submit(prompt=prompt, new_tokens=9, caches=True)
    loop.loop.step()
    loop.submit(prompt=prompt, new_tokens=9, caches=True)
    loop.loop.step()
    assert loop.stats.running == 2
    while loop.loop.step():
        pass
    assert loop.stats.preemptions == 0
    loop.assert_nothing_held()


def test_pages_are_taken_early_from_what_is_cached(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Overlapped steps do not stop where all free pages are cached ones."""
    monkeypatch.setattr(StepLoop, "has_time", True)
    engine = engine_for(base, kv_bytes=LAYERS * 4 * PAGE)
    expected = ask(engine_for(base), PROMPT, [], 40).tokens
    ask(engine, tuple(range(60)), [], 1)
    decoder = with_decoder(engine)
    assert ask(engine, PROMPT, [], 40).tokens == expected
    assert decoder.told == 1
