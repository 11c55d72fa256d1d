"""From logits to tokens: every row with its request's own parameters and its own stream of random numbers."""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lorarep_runtime.device.staging import moved
from lorarep_runtime.errors import InvalidArgument
from lorarep_runtime.request import Request, Sampling, Stopping, TokenLogprob

MAX_LOGPROBS = 20
MAX_PENALTY = 2.0
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 1024
LEAST_TEMPERATURE = torch.finfo(torch.float32).tiny
"""Up to it the likeliest token is chosen: smaller ones are 0 in fp32."""


@dataclass(frozen=True)
class Sampled:
    """The next token of one sequence."""

    token: int
    logprob: TokenLogprob | None
    """None where the request did not ask."""


class SamplerState:
    """What choosing a request's next token depends on beside its logits."""

    def __init__(self, request: Request, eos_ids: frozenset[int]) -> None:
        self.request = request
        self.eos_ids = eos_ids
        """Tokens that end an answer of their own accord."""
        self.seed = secrets.randbits(63) if request.sampling.seed is None else request.sampling.seed
        self.counts: dict[int, int] = {}
        """How often each token is in the answer."""
        self.new_tokens = 0

    def append(self, token: int) -> None:
        """Takes note of a token of the answer."""
        self.counts[token] = self.counts.get(token, 0) + 1
        self.new_tokens += 1

    def uniform(self, unread: int = 0) -> float:
        """The random number in [0, 1) of the token after the next `unread` ones, a function of seed and place alone
        (Salmon et al., 2011)."""
        return float(np.random.Generator(np.random.Philox(key=self.seed, counter=self.new_tokens + unread)).random())


def validate(request: Request, vocab_size: int) -> None:
    """Refuses what is out of range, naming the field.

    Raises:
        InvalidArgument
    """
    sampling, stopping = request.sampling, request.stopping
    if not request.prompt:
        raise InvalidArgument("has no tokens", field="prompt")
    for field, tokens in (("prompt", request.prompt), ("stop_token_ids", stopping.stop_token_ids)):
        for token in tokens:
            if not 0 <= token < vocab_size:
                raise InvalidArgument(f"token {token} is not one of the base's {vocab_size}", field=field)
    _within("temperature", sampling.temperature, 0, math.inf)
    _within("top_k", sampling.top_k, 0, math.inf)
    _within("top_p", sampling.top_p, 0, 1, above=True)
    _within("min_p", sampling.min_p, 0, 1)
    _within("repetition_penalty", sampling.repetition_penalty, 0, math.inf, above=True)
    _within("presence_penalty", sampling.presence_penalty, -MAX_PENALTY, MAX_PENALTY)
    _within("frequency_penalty", sampling.frequency_penalty, -MAX_PENALTY, MAX_PENALTY)
    if sampling.seed is not None:
        _within("seed", sampling.seed, 0, 2**63 - 1)
    _within("max_new_tokens", stopping.max_new_tokens, 1, math.inf)
    _within("min_new_tokens", stopping.min_new_tokens, 0, stopping.max_new_tokens)
    _within("logprobs", request.logprobs or 0, 0, min(MAX_LOGPROBS, vocab_size))
    if len(stopping.stop) > MAX_STOPS:
        raise InvalidArgument(f"{len(stopping.stop)} strings are over the limit of {MAX_STOPS}", field="stop")
    for stop in stopping.stop:
        if not 0 < len(stop) <= MAX_STOP_CHARACTERS:
            raise InvalidArgument(
                f"a string of {len(stop)} characters; 1 to {MAX_STOP_CHARACTERS} are possible", field="stop"
            )


def _within(field: str, value: float, low: float, high: float, *, above: bool = False) -> None:
    # NaN compares false with everything; infinity is no number a caller means.
    if not (math.isfinite(value) and low <= value <= high) or (above and value == low):
        raise InvalidArgument(f"{value} is not {'over' if above else 'at least'} {low} and at most {high}", field=field)


def sample(logits: Tensor, states: Sequence[SamplerState]) -> list[Sampled]:
    """The next token of each row.

    Args:
        logits: (rows, vocab) fp32; left as they are.
        states: of the rows.

    Returns:
        One for each row. The order of processing is that of `transformers`: penalties, end tokens that may not come
        yet, temperature, top-k, top-p, min-p. A row's result does not depend on the others.
    """
    likeliest = logits.argmax(-1)
    choose(likeliest, logits, states)
    tokens = likeliest.tolist()  # waits for the device, as log-probabilities do, where they are asked for
    return [Sampled(token, _logprob(logits[i], token, states[i].request)) for i, token in enumerate(tokens)]


def choose(tokens: Tensor, logits: Tensor, states: Sequence[SamplerState], *, unread: int = 0) -> None:
    """Puts the tokens that `sample` gives in the place of the likeliest ones, without a wait for the device.

    Args:
        tokens: (rows) int64.
        unread: how many tokens of each row have been chosen of which its state does not know. Of plain rows alone.
    """
    if others := [i for i, state in enumerate(states) if not _is_greedy(state)]:
        rows = moved(torch.tensor(others), logits.device)
        tokens.index_copy_(0, rows, _choose(logits.index_select(0, rows), [states[i] for i in others], unread))


def is_plain(state: SamplerState) -> bool:
    """Whether the next token depends on nothing but its logits and a random number."""
    return not _has_penalty(state.request.sampling) and not _must_go_on(state.request.stopping, state)


def _is_greedy(state: SamplerState) -> bool:
    """Whether the likeliest token is the one."""
    return is_plain(state) and state.request.sampling.temperature == 0


def _has_penalty(sampling: Sampling) -> bool:
    return bool(sampling.repetition_penalty != 1 or sampling.presence_penalty or sampling.frequency_penalty)


def _must_go_on(stopping: Stopping, state: SamplerState) -> bool:
    return state.new_tokens < stopping.min_new_tokens


def _choose(scores: Tensor, states: Sequence[SamplerState], unread: int) -> Tensor:
    """(rows) int64, as `choose` puts them into place; the logits are used up."""
    device = scores.device
    for row, state in zip(scores, states, strict=True):
        if _has_penalty(state.request.sampling):
            _penalize(row, state)
        if _must_go_on(state.request.stopping, state):
            ends = [*state.eos_ids, *state.request.stopping.stop_token_ids]
            row.index_fill_(0, moved(torch.tensor(ends, dtype=torch.int64), device), -math.inf)
    greedy = scores.argmax(-1)
    if all(state.request.sampling.temperature == 0 for state in states):
        return greedy

    # All of them in one copy: float64 holds each exactly.
    rows = [_parameters(state, scores.shape[1], unread) for state in states]
    parameters = torch.tensor(rows, dtype=torch.float64)
    temperature, last, top_p, min_p, uniform = moved(parameters, device).T.unsqueeze(2)
    # Temperatures near 0 would overflow; the difference to the largest score cannot.
    scores = (scores - scores.amax(-1, keepdim=True)) / temperature.float()
    scores, order = scores.sort(dim=-1, descending=True, stable=True)
    scores.masked_fill_(scores < scores.gather(1, last.long()), -math.inf)
    probabilities = scores.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    # Rounding must not take the end of a distribution that was asked for whole.
    probabilities.masked_fill_(before >= top_p.float(), 0)
    probabilities.masked_fill_(probabilities < min_p.float() * probabilities[:, :1], 0)
    cumulative = probabilities.double().cumsum(-1)
    place = torch.searchsorted(cumulative, cumulative[:, -1:] * uniform, right=True)
    # Nor lead past the last token that has a probability. None has where scores overflow, are NaN or all forbidden.
    place = place.minimum((probabilities > 0).sum(-1, keepdim=True) - 1).clamp_(min=0)
    drawn = order.gather(1, place).squeeze(1)
    return torch.where(temperature.squeeze(1) > LEAST_TEMPERATURE, drawn, greedy)


def _parameters(state: SamplerState, vocab: int, unread: int) -> tuple[float, ...]:
    """Temperature, index of the last of top-k, top-p, min-p, random number."""
    s = state.request.sampling
    top_k, top_p = s.top_k or vocab, s.top_p if s.top_p < 1 else math.inf
    return max(s.temperature, LEAST_TEMPERATURE), min(top_k, vocab) - 1, top_p, s.min_p, state.uniform(unread)


def _penalize(scores: Tensor, state: SamplerState) -> None:
    sampling, device = state.request.sampling, scores.device
    if sampling.repetition_penalty != 1:
        seen = moved(torch.tensor(sorted({*state.request.prompt, *state.counts})), device)
        own = scores[seen]
        scores[seen] = torch.where(own > 0, own / sampling.repetition_penalty, own * sampling.repetition_penalty)
    if state.counts:
        tokens, counts = moved(torch.tensor([list(state.counts), list(state.counts.values())]), device)
        scores[tokens] -= sampling.presence_penalty + sampling.frequency_penalty * counts


def _logprob(logits: Tensor, token: int, request: Request) -> TokenLogprob | None:
    if request.logprobs is None:
        return None
    logprobs = logits.log_softmax(-1)
    top = logprobs.topk(request.logprobs)
    return TokenLogprob(
        token,
        float(logprobs[token]),
        1 + int((logprobs > logprobs[token]).sum()),
        tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True)),
    )
