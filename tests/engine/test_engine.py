"""A request's answer is its own, whatever else the engine does."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders

from lorarep_runtime.engine.engine import Engine
from lorarep_runtime.engine.offline import Completion
from lorarep_runtime.errors import (
    Cancelled,
    DeadlineExceeded,
    EngineFailure,
    Exhausted,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    Unavailable,
)
from lorarep_runtime.request import Event, Finished, FinishReason, Output, Request, Sampling, Stopping
from tests.support.engines import PROMPT, assert_nothing_held, engine_for, greedy, sampled
from tests.support.models import MAPS, save_adapter, save_base, save_tokenizer

TARGETS = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base("qwen2", tmp_path_factory.mktemp("engine") / "base")


@pytest.fixture(scope="module")
def adapters(base: Path) -> dict[str, Path]:
    made = {}
    for i, (name, ranges) in enumerate(MAPS.items()):
        for kind in ("lora", "dora"):
            config = dict(r=2 + i, lora_alpha=8, use_dora=kind == "dora", target_modules=TARGETS)
            folder = base.parent / f"{kind}{i}"
            made[f"{kind} {name}"] = save_adapter(base, folder, seed=i, layer_replication=ranges, **config)
    return made


Asked = list[tuple[Request, list[tuple[str, float]]]]


@pytest.fixture(scope="module")
def sixteen(adapters: dict[str, Path]) -> Asked:
    """Sixteen requests: twelve adapters on six stacks, two mixes, the base twice; prompts of many lengths."""
    sets: list[list[tuple[str, float]]] = [[(name, 1.0)] for name in adapters]
    sets += [[("lora overlap", 0.5), ("dora overlap", 1.5)], [("lora shrinking", -1.0)], [], []]
    return [
        (
            (sampled(i, PROMPT[: 3 + i], 24) if i % 3 else greedy(PROMPT[: 3 + i], 24)),
            adapter_set,
        )
        for i, adapter_set in enumerate(sets)
    ]


def answers(engine: Engine, asked: Asked) -> list[Completion]:
    got = engine.generate((request, engine.adapters.lease(names)) for request, names in asked)
    assert_nothing_held(engine)
    return got


@pytest.fixture(scope="module")
def alone(base: Path, adapters: dict[str, Path], sixteen: Asked) -> list[tuple[int, ...]]:
    """Each request's tokens when nothing else is there."""
    engine = engine_for(base, adapters=adapters)
    return [answers(engine, [one])[0].tokens for one in sixteen]


@pytest.mark.parametrize(
    "scheduler",
    [
        dict(),
        dict(max_step_tokens=16),
        dict(max_step_tokens=16, max_sequences=5),
        dict(chunked_prefill=False),
        dict(chunked_prefill=False, max_step_tokens=16),
    ],
    ids=str,
)
def test_tokens_alone_are_the_tokens_in_any_batch(
    base: Path, adapters: dict[str, Path], sixteen: Asked, alone: list[tuple[int, ...]], scheduler: dict[str, Any]
) -> None:
    engine = engine_for(base, adapters=adapters, **scheduler)
    assert [answer.tokens for answer in answers(engine, sixteen)] == alone
    assert engine.stats().preemptions == 0


def test_tokens_survive_preemption(
    base: Path, adapters: dict[str, Path], sixteen: Asked, alone: list[tuple[int, ...]]
) -> None:
    page = 2 * 16 * 2 * 16 * 4
    engine = engine_for(base, adapters=adapters, kv_bytes=100 * page)
    assert [answer.tokens for answer in answers(engine, sixteen)] == alone
    assert engine.stats().preemptions > 5


def test_a_plan_serves_all_stacks_of_a_batch_at_once(base: Path, adapters: dict[str, Path], sixteen: Asked) -> None:
    engine = engine_for(base, adapters=adapters)
    answers(engine, sixteen)
    stats = engine.stats()
    assert max(stats.step_rows) == 16
    assert max(stats.step_adapters) == 14


class Stream:
    """Collects a request's events."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.first, self.ended = threading.Event(), threading.Event()

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        (self.first if isinstance(event, Output) else self.ended).set()

    @property
    def last(self) -> Event:
        assert self.ended.wait(600)
        return self.events[-1]


@pytest.fixture
def running(base: Path, adapters: dict[str, Path]) -> Iterator[Engine]:
    engine = engine_for(base, adapters=adapters)
    engine.start()
    yield engine
    engine.stop()


LONG = greedy(new_tokens=400)


def test_cancelling_ends_a_stream_and_frees_its_pages(running: Engine) -> None:
    stream, innocent = Stream(), Stream()
    cancelled = running.submit(LONG, running.adapters.lease([("dora overlap", 1.0)]), stream)
    running.submit(greedy(), running.adapters.lease([("lora overlap", 1.0)]), innocent)
    assert stream.first.wait(600)
    running.cancel(cancelled)
    running.cancel(cancelled)
    assert isinstance(stream.last, Cancelled)
    assert isinstance(innocent.last, Finished)
    assert len([e for e in innocent.events if isinstance(e, Output)]) == 64
    running.stop()
    assert_nothing_held(running)


def test_what_is_cancelled_is_gone_before_the_next_step(base: Path, adapters: dict[str, Path]) -> None:
    engine = engine_for(base, adapters=adapters, max_sequences=1)
    running, waiting = Stream(), Stream()
    ids = [engine.submit(LONG, engine.adapters.lease([("dora overlap", 1.0)]), s) for s in (running, waiting)]
    assert engine.loop.step()
    assert engine.stats().pages_used > 0
    for number in ids:
        engine.cancel(number)
    assert not engine.loop.step()
    assert [len(stream.events) for stream in (running, waiting)] == [2, 1]
    assert isinstance(running.last, Cancelled)
    assert isinstance(waiting.last, Cancelled)
    assert_nothing_held(engine)


def test_nothing_of_an_answer_is_in_the_next_ones_that_have_its_pages(base: Path) -> None:
    """Not even NaN, which no weight of 0 takes away."""
    engine = engine_for(base, kv_bytes=160 << 10)  # not enough for two of them
    before = engine.generate([(greedy(), engine.adapters.lease([]))])[0].tokens
    number = engine.submit(greedy(), engine.adapters.lease([]), lambda event: None)
    engine.loop.step()
    (sequence,) = engine.loop.scheduler.running
    for pages in engine.pool.tensors:
        pages[sequence.table.pages.ravel()] = torch.nan
    engine.cancel(number)
    assert not engine.loop.step()
    other = replace(greedy(), cache_salt="other")  # which finds none of its pages, and gets them all the same
    assert engine.generate([(other, engine.adapters.lease([]))])[0].tokens == before


def test_an_adapters_end_token_that_the_base_does_not_have_never_comes(base: Path, tmp_path: Path) -> None:
    folder = save_adapter(base, tmp_path, r=4, target_modules=["q_proj"])
    save_tokenizer(folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": [258, 99999]}')
    engine = engine_for(base, adapters={"own": folder})
    request = Request(PROMPT, stopping=Stopping(max_new_tokens=4, min_new_tokens=4))
    (answer,) = engine.generate([(request, engine.adapters.lease([("own", 1.0)]))])
    assert len(answer.tokens) == 4


def test_a_tokenizer_that_fails_ends_its_own_answers(base: Path, tmp_path: Path) -> None:
    """Even where it panics, which is no Exception."""
    folder = save_adapter(base, tmp_path, r=4, target_modules=["q_proj"])
    save_tokenizer(folder)
    fast = Tokenizer.from_file(str(folder / "tokenizer.json"))
    nothing = decoders.Replace(Regex(r"[\s\S]{2,}"), "")  # of two characters, and a space less than nothing panics
    fast.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Fuse(), nothing, decoders.Strip(" ", 0, 1)])
    fast.save(str(folder / "tokenizer.json"))
    engine = engine_for(base, adapters={"own": folder})
    alone = engine.generate([(greedy(), engine.adapters.lease([]))])[0].tokens
    stream, bad = Stream(), Stream()
    engine.submit(greedy(), engine.adapters.lease([]), stream)
    engine.submit(greedy(PROMPT[:1]), engine.adapters.lease([("own", 1.0)]), bad)
    while engine.loop.step():
        pass
    assert isinstance(bad.last, FailedPrecondition)
    assert "tokenizer" in str(bad.last)
    assert tuple(token for event in stream.events if isinstance(event, Output) for token in event.tokens) == alone
    assert_nothing_held(engine)


def test_a_deadline_ends_running_and_waiting_requests_before_the_next_step(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_for(base, max_sequences=1)
    now = time.monotonic()
    running, waiting = Stream(), Stream()
    for stream in (running, waiting):
        engine.submit(replace(LONG, deadline=now + 1000), engine.adapters.lease([]), stream)
    assert engine.loop.step()
    assert engine.stats().pages_used > 0
    monkeypatch.setattr("lorarep_runtime.engine.step_loop.time", SimpleNamespace(monotonic=lambda: now + 1000))
    assert not engine.loop.step()
    assert [len(stream.events) for stream in (running, waiting)] == [2, 1]
    assert isinstance(running.last, DeadlineExceeded)
    assert isinstance(waiting.last, DeadlineExceeded)
    assert_nothing_held(engine)


def test_stopping_refuses_new_requests_and_ends_the_others(running: Engine) -> None:
    stream = Stream()
    running.submit(LONG, running.adapters.lease([]), stream)
    assert stream.first.wait(600)
    running.stop()
    lease = running.adapters.lease([])
    with pytest.raises(Unavailable):
        running.submit(greedy(), lease, Stream())
    assert isinstance(stream.last, Unavailable)
    assert_nothing_held(running)


def test_a_flood_for_one_adapter_does_not_starve_the_others(base: Path, adapters: dict[str, Path]) -> None:
    engine = engine_for(base, adapters=adapters, max_sequences=2, max_queued_per_adapter=30)
    begun: list[str] = []

    def submit(name: str) -> None:
        def on_event(event: Event) -> None:
            if isinstance(event, Output) and seen not in begun:
                begun.append(seen)

        seen = f"{name} {engine.stats().waiting}"
        engine.submit(greedy(new_tokens=2), engine.adapters.lease([(name, 1.0)]), on_event)

    for _ in range(30):
        submit("lora overlap")
    with pytest.raises(Exhausted, match="max_queued_per_adapter"):
        submit("lora overlap")
    submit("dora overlap")
    submit("dora overlap")
    while engine.loop.step():
        pass
    # Both of the late adapter's are among the first, and the flood's keep their order.
    assert [name.split()[0] for name in begun[:4]].count("dora") == 2
    flood = [int(name.split()[-1]) for name in begun if name.startswith("lora")]
    assert flood == sorted(flood)
    assert len(flood) == 30


def test_an_adapters_limit_leaves_places_for_the_others(base: Path, adapters: dict[str, Path]) -> None:
    engine = engine_for(base, adapters=adapters, max_sequences=4, max_running_per_adapter=1)
    for name in ("lora overlap", "lora overlap", "dora overlap", "lora shrinking"):
        engine.submit(greedy(new_tokens=3), engine.adapters.lease([(name, 1.0)]), lambda event: None)
    engine.loop.step()
    running = [sequence.lease.names[0] for sequence in engine.loop.scheduler.running]
    assert running == ["lora overlap", "dora overlap", "lora shrinking"]
    while engine.loop.step():
        pass
    assert_nothing_held(engine)


def test_a_full_queue_refuses_at_once_with_a_hint(base: Path) -> None:
    engine = engine_for(base, max_queued=2)
    for _ in range(2):
        engine.submit(greedy(), engine.adapters.lease([]), Stream())
    with pytest.raises(Exhausted, match="max_queued") as error:
        engine.submit(greedy(), engine.adapters.lease([]), Stream())
    assert error.value.retry_after


def test_an_error_in_a_forward_pass_ends_its_streams_alone(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_for(base)
    expected = answers(engine, [(greedy(), [])])[0].tokens
    forward = engine.base.forward
    stream = Stream()
    engine.submit(greedy(), engine.adapters.lease([]), stream)
    monkeypatch.setattr(engine.base, "forward", lambda *_: 1 / 0)
    engine.loop.step()
    assert isinstance(stream.last, EngineFailure)
    assert_nothing_held(engine)
    monkeypatch.setattr(engine.base, "forward", forward)
    assert answers(engine, [(greedy(), [])])[0].tokens == expected


def test_a_callback_that_fails_disturbs_nobody(base: Path) -> None:
    engine = engine_for(base)
    engine.submit(greedy(), engine.adapters.lease([]), lambda event: 1 / 0)
    assert len(answers(engine, [(greedy(), [])])[0].tokens) == 64


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (Request(()), "prompt"),
        (Request((1, 272)), "prompt"),
        (Request((-1,)), "prompt"),
        (greedy(new_tokens=0), "max_new_tokens"),
        (greedy(new_tokens=500), "max_new_tokens"),
        (Request(PROMPT, sampling=Sampling(temperature=float("nan"))), "temperature"),
        (Request(PROMPT, sampling=Sampling(temperature=-0.1)), "temperature"),
        (Request(PROMPT, sampling=Sampling(top_p=0.0)), "top_p"),
        (Request(PROMPT, stopping=Stopping(max_new_tokens=4, min_new_tokens=5)), "min_new_tokens"),
        (Request(PROMPT, logprobs=1000), "logprobs"),
        (Request(PROMPT, stopping=Stopping(stop_token_ids=(5,) * 1025)), "stop_token_ids: 1025 tokens are over"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_bad_field_is_refused_by_name(base: Path, request_: Request, field: str) -> None:
    engine = engine_for(base)
    with pytest.raises(InvalidArgument, match=field):
        engine.submit(request_, engine.adapters.lease([]), Stream())


def test_the_tokens_of_too_long_a_prompt_are_not_looked_at(base: Path) -> None:
    class Prompt(tuple[int, ...]):
        def __iter__(self) -> Iterator[int]:
            raise AssertionError

    engine = engine_for(base)
    with pytest.raises(InvalidArgument, match=r"^prompt: 600 tokens"):
        engine.submit(Request(Prompt((5,) * 600)), engine.adapters.lease([]), Stream())


def test_a_request_that_could_never_fit_is_refused(base: Path, adapters: dict[str, Path]) -> None:
    engine = engine_for(base, adapters=adapters, kv_bytes=6 * 2 * 16 * 2 * 16 * 4)
    for names, whose in (((), ""), ([("lora shrinking", 1.0)], ", those of the shallowest named stack,")):
        with pytest.raises(InvalidArgument, match=f"that 6 positions{whose} have KV memory for"):
            engine.submit(greedy(), engine.adapters.lease(names), Stream())


def test_answers_end_for_the_reason_given(base: Path) -> None:
    engine = engine_for(base)
    tokens = answers(engine, [(greedy(), [])])[0].tokens

    def reason(stopping: Stopping) -> tuple[FinishReason, tuple[int, ...]]:
        answer = answers(engine, [(Request(PROMPT, stopping=stopping), [])])[0]
        assert answer.finished.completion_tokens == len(answer.tokens)
        return answer.finished.reason, answer.tokens

    stop_at = tokens.index(tokens[5]) + 1
    assert reason(Stopping(max_new_tokens=7, ignore_eos=True)) == (FinishReason.LENGTH, tokens[:7])
    assert reason(Stopping(max_new_tokens=64, ignore_eos=True, stop_token_ids=(tokens[5],))) == (
        FinishReason.STOP_TOKEN,
        tokens[:stop_at],
    )
    text = engine.base.tokenizer.decode(tokens)
    stop = text[4:6]
    assert reason(Stopping(max_new_tokens=64, ignore_eos=True, stop=(stop,)))[0] == FinishReason.STOP_STRING


def test_logprobs_are_those_of_the_logits(base: Path, adapters: dict[str, Path]) -> None:
    engine = engine_for(base, adapters=adapters)
    request = replace(greedy(new_tokens=8), logprobs=3)
    answer = answers(engine, [(request, [("dora overlap", 1.0)])])[0]
    lease = engine.adapters.lease([("dora overlap", 1.0)])
    logits = engine.logits([*PROMPT, *answer.tokens], lease)[len(PROMPT) - 1 : -1].log_softmax(-1)
    for row, token, got in zip(logits, answer.tokens, answer.logprobs, strict=True):
        assert got.token == token == got.top[0][0]
        assert got.logprob == pytest.approx(row[token].item(), abs=1e-4)
        assert [t for t, _ in got.top] == row.topk(3).indices.tolist()


def test_unknown_adapters_and_stacks_are_not_found(base: Path, adapters: dict[str, Path]) -> None:
    engine = engine_for(base, adapters=adapters)
    for names, stack in (([("nobody", 1.0)], None), ([], "nowhere")):
        with pytest.raises(NotFound):
            engine.adapters.lease(names, stack)
    for several, stack in ((["lora overlap", "lora shrinking"], None), (["lora overlap"], "base")):
        with pytest.raises(InvalidArgument, match="another stack"):
            engine.adapters.lease([(name, 1.0) for name in several], stack)
    assert_nothing_held(engine)
