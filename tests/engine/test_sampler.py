"""Choosing tokens, against `transformers`' own processors."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lorarep_runtime.engine.sampler import NO_TOKEN, SamplerState, checked, choose, sample
from lorarep_runtime.errors import InvalidArgument
from lorarep_runtime.request import Request, Sampling, Stopping

VOCAB = 50
PROMPT = (3, 7, 7, 11)
DRAWS = 4_000


def random_logits(seed: int, rows: int = 1) -> Tensor:
    return 3 * torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed))


def state(sampling: Sampling, answer: tuple[int, ...] = (), **stopping: object) -> SamplerState:
    made = SamplerState(Request(PROMPT, sampling, Stopping(**stopping)), frozenset({2}))  # type: ignore[arg-type]
    for token in answer:
        made.append(token)
    return made


def expected(logits: Tensor, sampling: Sampling, answer: tuple[int, ...]) -> Tensor:
    """Probabilities (vocab) by `transformers`, in vLLM's order: its own has min-p last."""
    processors = LogitsProcessorList()
    if sampling.allowed_token_ids:
        processors.append(SuppressTokensLogitsProcessor(sorted({*range(VOCAB)} - {*sampling.allowed_token_ids})))
    if sampling.logit_bias:
        processors.append(SequenceBiasLogitsProcessor([[[token], bias] for token, bias in sampling.logit_bias]))
    if sampling.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    processors.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.min_p:
        processors.append(MinPLogitsWarper(sampling.min_p))
    if sampling.top_k:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        processors.append(TopPLogitsWarper(sampling.top_p))
    return processors(torch.tensor([[*PROMPT, *answer]]), logits)[0].softmax(-1)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0),
        Sampling(temperature=0.4),
        Sampling(temperature=1.5, top_k=5),
        Sampling(temperature=1.0, top_p=0.7),
        Sampling(temperature=1.0, min_p=0.1),
        Sampling(temperature=1.2, repetition_penalty=1.8),
        Sampling(temperature=1.5, top_k=12, top_p=0.8, min_p=0.05, repetition_penalty=1.3),
        Sampling(
            temperature=1.0,
            allowed_token_ids=(30, 4, 11, 5, 7, 20),
            logit_bias=((5, 2.5), (7, -100.0), (4, 1.0), (8, 100.0)),
            repetition_penalty=1.8,
        ),
    ],
    ids=str,
)
def test_tokens_are_drawn_as_transformers_would(sampling: Sampling) -> None:
    answer = (11, 20)
    logits = random_logits(5)
    wanted = expected(logits.clone(), sampling, answer)
    drawn: Counter[int] = Counter()
    for seed in range(DRAWS):
        seeded = Sampling(**{**sampling.__dict__, "seed": seed})
        drawn[sample(logits, [state(seeded, answer)])[0].token] += 1
    got = torch.tensor([drawn[token] / DRAWS for token in range(VOCAB)])
    assert set(drawn) <= set(wanted.nonzero().flatten().tolist())
    # Five standard deviations of a frequency.
    assert ((got - wanted).abs() <= 5 * (wanted * (1 - wanted) / DRAWS).sqrt() + 1e-9).all()


def test_min_p_comes_before_top_p() -> None:
    """In vLLM's order 0.5 of 0.7 is enough for top-p; in that of `transformers`, 0.5 of 1 is not."""
    logits = torch.tensor([[0.5, 0.2, 0.1, 0.1, 0.1]]).log()
    both = Sampling(temperature=1.0, top_p=0.7, min_p=0.3)
    assert expected(logits.clone(), both, ()).tolist() == [1, 0, 0, 0, 0]
    drawn = {sample(logits, [state(Sampling(**{**both.__dict__, "seed": seed}))])[0].token for seed in range(50)}
    assert drawn == {0}
    alone = [sample(logits, [state(Sampling(temperature=1.0, min_p=0.3, seed=seed))])[0].token for seed in range(50)]
    assert set(alone) == {0, 1}


def test_presence_and_frequency_penalties_are_openais() -> None:
    """mu[j] -> mu[j] - c[j] · frequency - (c[j] > 0) · presence, of the answer alone."""
    logits = torch.zeros(1, VOCAB)
    logits[0, 10], logits[0, 20], logits[0, 30], logits[0, 3] = 4.0, 3.2, 2.9, 1.0
    answer = (10, 10, 20)

    def chosen(**penalties: float) -> int:
        return sample(logits, [state(Sampling(**penalties), answer)])[0].token

    assert chosen() == 10
    assert chosen(frequency_penalty=0.7) == 30  # 2.6, 2.5, 2.9
    assert chosen(frequency_penalty=0.5) == 10  # 3.0, 2.7, 2.9
    assert chosen(presence_penalty=1.0) == 10  # 3.0, 2.2, 2.9
    assert chosen(presence_penalty=1.2) == 30  # 2.8, 2.0, 2.9
    assert chosen(presence_penalty=-2.0) == 10


def test_bad_words_rule_out_what_transformers_rules_out_by_the_answer_alone() -> None:
    draw = random.Random(1)
    for _ in range(200):
        words = {tuple(draw.choices((3, 5, 8, 9), k=draw.randint(1, 4))) for _ in range(draw.randint(1, 6))}
        answer = tuple(draw.choices((3, 5, 8), k=draw.randint(0, 6)))
        logits = random_logits(2)
        processor = NoBadWordsLogitsProcessor([list(word) for word in words], eos_token_id=2)
        ids = torch.tensor([answer], dtype=torch.int64)
        likeliest = int(processor(ids, logits.index_fill(1, torch.tensor([3, 5, 8, 9]), 90.0))[0].argmax())
        made = state(Sampling(bad_words=tuple(words)), answer)
        biased = logits.index_fill(1, torch.tensor([3, 5, 8, 9]), 90.0)
        assert sample(biased, [made])[0].token == likeliest
        excluded = processor(ids, logits.clone())[0].isneginf().nonzero().flatten().tolist()
        assert made.bad_words.excluded() == excluded
        assert made.is_plain is (max(map(len, words)) == 1)
        assert not made.is_greedy


def test_bias_and_allowed_tokens_change_the_likeliest_one() -> None:
    logits = random_logits(1, rows=3)
    first, second = logits[0].topk(2).indices.tolist()
    biased = Sampling(logit_bias=((second, 100.0),))
    allowed = Sampling(allowed_token_ids=(9, second))
    states = [state(biased), state(Sampling()), state(allowed)]
    assert [each.is_greedy for each in states] == [False, True, False]
    assert all(each.is_plain for each in states)
    got = [one.token for one in sample(logits[[0, 0, 0]], states)]
    assert got == [second, first, second]
    ends = Sampling(allowed_token_ids=(2, 9))
    for stopping in (dict(min_new_tokens=1, stop_token_ids=(9,)), dict(min_new_tokens=2, stop_token_ids=(9, 5))):
        with pytest.raises(InvalidArgument, match="allowed_token_ids"):
            state(ends, **stopping)
    assert sample(logits[[0]], [state(ends, min_new_tokens=1)])[0].token == 9
    state(ends, stop_token_ids=(9,))


def test_a_repetition_penalty_looks_at_a_prompt_once() -> None:
    class Prompt(tuple[int, ...]):
        looks = 0

        def __iter__(self) -> Iterator[int]:
            Prompt.looks += 1
            return super().__iter__()

    asked = SamplerState(Request(Prompt(PROMPT), Sampling(repetition_penalty=1.5)), frozenset())
    logits = random_logits(8)
    for new in (20, 3, 20, 30):
        penalized = logits.clone()
        seen = sorted({*PROMPT, *asked.counts})
        penalized[0, seen] = torch.where(penalized[0, seen] > 0, penalized[0, seen] / 1.5, penalized[0, seen] * 1.5)
        looks = Prompt.looks
        assert sample(logits, [asked])[0].token == int(penalized.argmax())
        assert Prompt.looks == looks
        asked.append(new)
    assert sorted(asked.seen(logits.device).tolist()) == [3, 7, 11, 20, 30]


def test_a_prompts_tokens_meet_the_repetition_penalty_alone() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 7], logits[0, 8] = 2.0, 1.5
    assert sample(logits, [state(Sampling(presence_penalty=2, frequency_penalty=2))])[0].token == 7
    assert sample(logits, [state(Sampling(repetition_penalty=1.5))])[0].token == 8


def test_a_seeded_row_does_not_depend_on_its_neighbours() -> None:
    logits = random_logits(1, rows=6)
    samplings = [
        Sampling(),
        Sampling(temperature=1, seed=1),
        Sampling(temperature=0.7, top_k=9, seed=2),
        Sampling(temperature=1, top_p=0.9, min_p=0.01, seed=3),
        Sampling(repetition_penalty=1.4),
        Sampling(temperature=2, frequency_penalty=1, seed=5),
    ]
    together = [one.token for one in sample(logits, [state(s, (9, 9)) for s in samplings])]
    alone = [sample(logits[i : i + 1], [state(s, (9, 9))])[0].token for i, s in enumerate(samplings)]
    assert together == alone
    assert sample(logits, [state(s, (9, 9)) for s in samplings])[1].token == together[1]


def test_the_logits_stay_as_they_are() -> None:
    logits = random_logits(2)
    before = logits.clone()
    sample(logits, [state(Sampling(temperature=1, top_k=3, repetition_penalty=2, seed=1), (4,), min_new_tokens=9)])
    assert torch.equal(logits, before)


@pytest.mark.parametrize("temperature", [1e-30, 1e-40, 1e-300])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    logits = 1e4 * random_logits(3)
    assert sample(logits, [state(Sampling(temperature=temperature, seed=1))])[0].token == int(logits.argmax())


def test_a_row_that_is_no_numbers_has_no_token_and_leaves_the_others_theirs() -> None:
    logits = random_logits(6, rows=5)
    logits[1], logits[2, 7] = torch.nan, torch.inf
    fine = state(Sampling(temperature=1, seed=4))
    asked = [fine, fine, fine]
    asked += [state(Sampling(temperature=1, repetition_penalty=1e-38, seed=4))]
    asked += [state(Sampling(temperature=1, seed=4), min_new_tokens=1, stop_token_ids=tuple(range(VOCAB)))]
    tokens = [one.token for one in sample(logits, asked)]
    assert tokens[0] == sample(logits[:1], [fine])[0].token
    assert tokens[1:3] == [NO_TOKEN, NO_TOKEN]
    assert all(0 <= token < VOCAB for token in tokens[3:])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1, seed=4), Sampling(repetition_penalty=2)])
def test_no_logprob_is_nan(value: float, sampling: Sampling) -> None:
    logits = random_logits(9)
    logits[0, 2] = value  # an end token, which may not come yet
    request = Request(PROMPT, sampling, Stopping(min_new_tokens=1), logprobs=1)
    got = sample(logits, [SamplerState(request, frozenset({2}))])[0]
    assert (got.token == NO_TOKEN) == (value != -torch.inf)
    assert got.logprob is None or math.isfinite(got.logprob.logprob)


if torch.cuda.is_available():

    def test_choosing_does_not_wait_for_the_device() -> None:
        logits = random_logits(7, rows=4).cuda()
        asked = [
            state(Sampling(temperature=1, top_k=3, seed=1)),
            state(Sampling(temperature=0.5, top_p=0.5, repetition_penalty=2, seed=2), (4, 5)),
            state(Sampling(presence_penalty=1), (4, 4)),
            state(Sampling(), min_new_tokens=2),
        ]
        torch.cuda.set_sync_debug_mode("error")
        try:
            choose(tokens := logits.argmax(-1), logits, asked)
            tokens = checked(tokens, logits)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert tokens.tolist() == [one.token for one in sample(logits.cpu(), asked)]


def test_no_end_token_before_the_least_number_of_tokens() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 2], logits[0, 40], logits[0, 8] = 9.0, 8.0, 7.0
    asked = dict(min_new_tokens=2, stop_token_ids=(40,))
    assert sample(logits, [state(Sampling(), (5,), **asked)])[0].token == 8
    assert sample(logits, [state(Sampling(), (5, 5), **asked)])[0].token == 2


def test_logprobs_are_of_the_model_and_best_first() -> None:
    logits = random_logits(4)
    asked = SamplerState(Request(PROMPT, Sampling(temperature=2, seed=3), logprobs=3), frozenset())
    got = sample(logits, [asked])[0]
    reference = logits[0].log_softmax(-1)
    assert got.logprob is not None
    assert got.logprob.logprob == pytest.approx(float(reference[got.token]), abs=1e-6)
    top = reference.topk(3)
    assert got.logprob.rank == 1 + int((reference > reference[got.token]).sum()) > 1
    assert [token for token, _ in got.logprob.top] == top.indices.tolist()
    assert [value for _, value in got.logprob.top] == pytest.approx(top.values.tolist(), abs=1e-6)
