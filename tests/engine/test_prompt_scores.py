"""Log-probabilities of prompts are those of a physically stacked model, however the prompt is computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lorarep_runtime.adapters.lease import Lease
from lorarep_runtime.engine import prompt_scores
from lorarep_runtime.engine.offline import Completion
from lorarep_runtime.engine.prompt_scores import most_rows, score
from lorarep_runtime.engine.scheduler import Schedule
from lorarep_runtime.errors import FailedPrecondition, InvalidArgument
from lorarep_runtime.request import Output, PromptLogprobs, Request
from tests.support.decoders import with_decoder
from tests.support.engines import PROMPT, assert_nothing_held, engine_for, greedy
from tests.support.models import VOCAB, reference, reference_logits, save_adapter, save_base, stack_of

LONG = PROMPT * 3
TOP = 3
RANGES = [[0, 4], [2, 5]]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base("qwen2", tmp_path_factory.mktemp("scores") / "base")


@pytest.fixture(scope="module")
def adapters(base: Path) -> Mapping[str, Path]:
    targets = ["q_proj", "up_proj"]
    return {"lora": save_adapter(base, base.parent / "lora", target_modules=targets, layer_replication=RANGES)}


def wanted(prompt: tuple[int, ...] = LONG, new_tokens: int = 4, top: int = TOP) -> Request:
    return replace(greedy(prompt, new_tokens), prompt_logprobs=top)


def check(answer: Completion, base: Path, adapter: Path | None, prompt: tuple[int, ...] = LONG) -> None:
    """Compares with `transformers` and PEFT."""
    model = reference(base, adapter, stack_of(None if adapter is None else RANGES))
    expected = reference_logits(model, prompt).log_softmax(-1)
    got = answer.prompt_logprobs
    assert got is not None
    places = list(got)
    assert [place.token for place in places] == list(prompt[1:])
    for place, row in zip(places, expected, strict=False):
        own = row[place.token].item()
        assert place.logprob == pytest.approx(own, abs=1e-4)
        # Logits that are nearly equal may change their places.
        assert int((row > own + 1e-4).sum()) < place.rank <= int((row > own - 1e-4).sum())
        assert [logprob for _, logprob in place.top] == pytest.approx(row.topk(TOP).values.tolist(), abs=1e-4)
        assert [row[token].item() for token, _ in place.top] == pytest.approx([p for _, p in place.top], abs=1e-4)


@pytest.mark.parametrize("decoder", [False, True], ids=["general", "captured"])
@pytest.mark.parametrize("rows", [7, 1000], ids=["in parts", "at once"])
def test_they_are_those_of_transformers(
    base: Path, adapters: Mapping[str, Path], rows: int, decoder: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside others that want none, with and without an adapter, and with what others have left in the prefix cache."""
    monkeypatch.setattr(prompt_scores, "LOGITS_BYTES", rows * 4 * VOCAB)
    engine = engine_for(base, adapters=adapters)
    if decoder:
        with_decoder(engine).most_rows = 160

    def lease(name: str | None) -> Lease:
        return engine.adapters.lease([(name, 1.0)] if name else [])

    plain = engine.generate([(greedy(LONG, 4), lease("lora"))])[0]
    asked = [(wanted(), "lora"), (greedy(LONG[1:], 4), "lora"), (wanted(), None), (wanted(LONG[:2]), None)]
    lora, other, none, short = engine.generate((request, lease(name)) for request, name in asked)
    check(lora, base, adapters["lora"])
    check(none, base, None)
    check(short, base, None, LONG[:2])
    assert other.prompt_logprobs is plain.prompt_logprobs is None
    assert lora.tokens == plain.tokens
    assert (lora.finished.cached_tokens, plain.finished.cached_tokens) == (0, 0)
    again = engine.generate([(greedy(LONG, 4), lease("lora"))])[0]
    assert again.finished.cached_tokens > 0
    assert_nothing_held(engine)


def test_a_prompt_of_one_token_has_none(base: Path) -> None:
    engine = engine_for(base)
    (answer,) = engine.generate([(wanted(LONG[:1]), engine.adapters.lease([]))])
    assert answer.prompt_logprobs is None or len(answer.prompt_logprobs) == 0


def test_a_prompt_that_is_computed_anew_has_each_once(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pages are taken from it between two parts of the prompt, and once more between tokens of the answer."""
    monkeypatch.setattr(prompt_scores, "LOGITS_BYTES", 7 * 4 * VOCAB)
    engine = engine_for(base)
    outputs: list[Output] = []
    engine.submit(wanted(new_tokens=8), engine.adapters.lease([]), lambda event: outputs.append(event))
    scheduler, steps = engine.loop.scheduler, 0
    while engine.loop.is_busy:
        engine.loop.step()
        steps += 1
        if steps in (4, 16):
            (sequence,) = scheduler.running
            assert sequence.needs_prompt_logits == (steps == 4)
            scheduler._preempt(sequence, Schedule())
    *parts, last = outputs
    assert [part.prompt_logprobs is None for part in parts] == [False] + 7 * [True]
    check(Completion((), "", (), last, parts[0].prompt_logprobs), base, None)
    assert_nothing_held(engine)


@pytest.mark.parametrize(("times", "rows"), [(1, 7), (3, 2)])
def test_no_step_has_more_logits_than_fit(times: int, rows: int, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with adapters whose vocabularies are so many times as large as the base's."""
    monkeypatch.setattr(prompt_scores, "LOGITS_BYTES", 7 * 4 * VOCAB)
    engine = engine_for(base, chunked_prefill=False)
    forward, most = engine.base.forward, []

    def counted(batch: object, pool: object, rows: torch.Tensor) -> torch.Tensor:
        most.append(len(rows))
        return forward(batch, pool, rows)

    monkeypatch.setattr(engine.base, "forward", counted)
    leases = [engine.adapters.lease([]) for _ in range(4)]
    for lease in leases:
        lease.vocab_size *= times
    engine.generate((wanted(), lease) for lease in leases)
    assert max(most) <= rows + 4  # and the rows of tokens to come
    assert most_rows(VOCAB) == 7
    assert most_rows(1 << 30) == 1


def test_nan_and_infinity_are_no_log_probabilities(base: Path) -> None:
    logits = torch.zeros(4, VOCAB)
    logits[0, 5], logits[1, 6], logits[2, 7] = torch.nan, torch.inf, -torch.inf
    places = score(logits, [1, 1, 7, 2], 0)
    assert np.isnan(places.logprobs).tolist() == [True, True, False, False]
    assert places.logprobs[2] == -torch.inf
    assert [place.top for place in places] == [()] * 4
    engine = engine_for(base)
    engine.base.model.get_input_embeddings().weight.data[PROMPT[3]] = torch.nan
    with pytest.raises(FailedPrecondition, match="NaN"):
        engine.generate([(wanted(PROMPT), engine.adapters.lease([]))])
    assert_nothing_held(engine)


def test_parts_are_the_whole() -> None:
    whole = score(torch.randn(6, VOCAB), [1, 2, 3, 4, 5, 6], 2)
    parts = [whole.part(0, 4), whole.part(4, 6)]
    assert [*parts[0], *parts[1]] == list(PromptLogprobs.joined(parts)) == list(whole)


def test_too_many_are_refused(base: Path) -> None:
    engine = engine_for(base)
    for request in (wanted(top=21), wanted((1,) * 13_000, top=20)):
        with pytest.raises(InvalidArgument) as error:
            engine.check(request)
        assert error.value.field == "prompt_logprobs"
