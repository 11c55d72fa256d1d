"""From logits to tokens: every row has its request's own parameters and its own stream of random numbers."""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lorarep_runtime.device.staging import moved
from lorarep_runtime.engine.bad_words import BadWords
from lorarep_runtime.engine.masks import MaskedAnswer
from lorarep_runtime.errors import InvalidArgument
from lorarep_runtime.request import Request, TokenLogprob
from lorarep_runtime.text.grammar import allowed

LEAST_TEMPERATURE = torch.finfo(torch.float32).tiny
"""Up to this temperature the likeliest token is chosen: smaller ones are 0 in fp32."""

ALL_SHARES = 1 << 52
"""A probability of 1 as a whole number: fp64 holds it and all smaller ones."""
NO_TOKEN = -1
"""Stands for the token of a row whose logits are no finite numbers."""


@dataclass(frozen=True)
class Sampled:
    """The next token of one sequence."""

    token: int
    """NO_TOKEN where there is none to choose."""
    logprob: TokenLogprob | None
    """None where the request did not ask for log-probabilities."""


class SamplerState:
    """The state of a request that, with its logits, determines its next token.

    Raises:
        InvalidArgument: no token may come.
    """

    def __init__(self, request: Request, eos_ids: frozenset[int], vocab_size: int | None = None) -> None:
        self.request = request
        self.vocab_size = vocab_size
        """Number of tokens that may come; None is as many as there are logits."""
        self.eos_ids = eos_ids
        """Tokens with which a model ends an answer."""
        self.stop_ids = frozenset(request.stopping.stop_token_ids)
        """Tokens with which the caller ends it."""
        self._ends = torch.tensor(sorted(self.eos_ids | self.stop_ids), dtype=torch.int64)
        allowed = {*request.sampling.allowed_token_ids}
        if allowed and request.stopping.min_new_tokens and not allowed - self.eos_ids - self.stop_ids:
            raise InvalidArgument("all of them end the answer, which min_new_tokens forbids", field="allowed_token_ids")
        self._biased = torch.tensor([token for token, _ in request.sampling.logit_bias], dtype=torch.int64)
        self._bias = torch.tensor([bias for _, bias in request.sampling.logit_bias], dtype=torch.float32)
        self._allowed = torch.tensor(request.sampling.allowed_token_ids, dtype=torch.int64)
        self.bad_words = BadWords(request.sampling.bad_words)
        self.seed = secrets.randbits(63) if request.sampling.seed is None else request.sampling.seed
        self.counts: dict[int, int] = {}
        """Number of times that each token is in the answer."""
        self.new_tokens = 0
        """Number of tokens in the answer."""
        self.form: MaskedAnswer | None = None
        """Which tokens its form lets come next; None where it has none."""
        # Made once, in the thread that submits: each step would sort a long prompt anew.
        self._known = {*request.prompt} if request.sampling.repetition_penalty != 1 else None
        self._seen = torch.tensor(sorted(self._known or ()), dtype=torch.int64)
        self._unseen: list[int] = []
        """Tokens that are not in `_seen` yet."""

    def append(self, token: int) -> None:
        """Counts a token of the answer."""
        self.counts[token] = self.counts.get(token, 0) + 1
        self.new_tokens += 1
        self.bad_words.append(token)
        if self._known is not None and token not in self._known:
            self._known.add(token)
            self._unseen.append(token)
        if self.form is not None and token not in self.eos_ids:
            self.form.advance(token, self.excluded)

    def seen(self, device: torch.device) -> Tensor:
        """Distinct tokens of prompt and answer, int64 on a device. Only where there is a repetition penalty."""
        self._seen = _on(device, self._seen)
        if self._unseen:
            self._seen = torch.cat([self._seen, moved(torch.tensor(self._unseen), device)])
            self._unseen.clear()
        return self._seen

    def ends(self, device: torch.device) -> Tensor:
        """Tokens that end the answer, int64 on a device."""
        self._ends = _on(device, self._ends)
        return self._ends

    def bias(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Tokens, int64, and what is added to their logits, fp32, on a device."""
        self._biased, self._bias = _on(device, self._biased), _on(device, self._bias)
        return self._biased, self._bias

    def allowed(self, device: torch.device) -> Tensor:
        """Tokens that may come, int64 on a device; none are all."""
        self._allowed = _on(device, self._allowed)
        return self._allowed

    def uniform(self, unread: int) -> float:
        """The random number in [0, 1) of the token that comes after `unread` others.

        It is a function of the seed and the token's place in the answer alone (Salmon et al., 2011).
        """
        return float(np.random.Generator(np.random.Philox(key=self.seed, counter=self.new_tokens + unread)).random())

    @property
    def has_penalty(self) -> bool:
        """Whether earlier tokens change the scores."""
        s = self.request.sampling
        return bool(s.repetition_penalty != 1 or s.presence_penalty or s.frequency_penalty) or (
            self.bad_words.depends_on_answer
        )

    @property
    def must_go_on(self) -> bool:
        """Whether the answer is too short to end."""
        return self.new_tokens < self.request.stopping.min_new_tokens

    @property
    def excluded(self) -> frozenset[int]:
        """Tokens that may not come next."""
        return self.eos_ids | self.stop_ids if self.must_go_on else frozenset()

    @property
    def is_plain(self) -> bool:
        """Whether the next token depends on nothing but its logits and a random number."""
        return not self.has_penalty and not self.must_go_on and self.form is None

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is the next one."""
        s = self.request.sampling
        return self.is_plain and s.temperature == 0 and not (s.logit_bias or s.allowed_token_ids or s.bad_words)


def sample(logits: Tensor, states: Sequence[SamplerState]) -> list[Sampled]:
    """The next token of each row. A row's result does not depend on the other rows.

    Scores are processed in the order of vLLM: allowed tokens, bias, penalties, tokens that may not come,
    temperature, min-p, top-k, top-p. `transformers` has min-p last, which keeps the tokens that top-p takes from all
    that min-p would drop, too.

    Args:
        logits: (rows, vocab) fp32; left as they are.
        states: one for each row. Masks of forms have been taken (`take_masks`).

    Returns:
        One token for each row.
    """
    widest = logits.shape[1]
    widths = [min(state.vocab_size or widest, widest) for state in states]
    if len(set(widths)) < 2:
        return _sample(logits[:, : min(widths, default=widest)], states)
    # Adapters may have other vocabularies. A row is computed as wide as its own: else others would decide its rounding.
    sampled: dict[int, Sampled] = {}
    for width in set(widths):
        rows = [row for row, own in enumerate(widths) if own == width]
        sampled.update(zip(rows, _sample(logits[rows, :width], [states[row] for row in rows]), strict=True))
    return [sampled[row] for row in range(len(states))]


def _sample(logits: Tensor, states: Sequence[SamplerState]) -> list[Sampled]:
    """`sample` for rows of one vocabulary."""
    likeliest = logits.argmax(-1)
    choose(likeliest, logits, states)
    tokens = checked(likeliest, logits).tolist()  # waits for the device, as log-probabilities do, where asked for
    return [_sampled(logits[i], token, states[i].request) for i, token in enumerate(tokens)]


def checked(tokens: Tensor, logits: Tensor) -> Tensor:
    """Tokens (rows) as they were chosen; NO_TOKEN where the chosen logit is NaN or infinite. Waits for nothing.

    The greatest logit is NaN where any of its row is, for `argmax` and `sort` of torch.
    """
    chosen = logits.gather(1, tokens.unsqueeze(1)).squeeze(1)
    return tokens.masked_fill(~chosen.isfinite(), NO_TOKEN)


def _sampled(logits: Tensor, token: int, request: Request) -> Sampled:
    logprob = None if token == NO_TOKEN else _logprob(logits, token, request)
    if logprob is not None and not math.isfinite(logprob.logprob):
        return Sampled(NO_TOKEN, None)
    return Sampled(token, logprob)


def choose(tokens: Tensor, logits: Tensor, states: Sequence[SamplerState], *, unread: int = 0) -> None:
    """Replaces the likeliest tokens by those that `sample` gives, without a wait for the device.

    Args:
        tokens: (rows) int64, the likeliest token of each row; written to.
        logits: (rows, vocab) fp32; left as they are.
        states: one for each row.
        unread: number of tokens of each row that were chosen since its state last took one in; 0 unless all are plain.
    """
    others = [i for i, state in enumerate(states) if not state.is_greedy]
    if not others:
        return
    states = [states[i] for i in others]
    # Parameters of all rows go to the device in one copy: float64 holds each of them exactly.
    parameters = torch.tensor([_parameters(state, logits.shape[1], unread) for state in states], dtype=torch.float64)
    rows = moved(torch.tensor(others), logits.device)
    scores = logits.index_select(0, rows)
    for row, state in zip(scores, states, strict=True):
        _penalize(row, state)
    _mask(scores, [state.form for state in states])
    drawn = scores.argmax(-1)
    if any(state.request.sampling.temperature for state in states):
        drawn = _draw(scores, drawn, *moved(parameters, logits.device).T.unsqueeze(2))
    tokens.index_copy_(0, rows, drawn)


def _parameters(state: SamplerState, vocab: int, unread: int) -> tuple[float, ...]:
    """A row's temperature, index of the last score of top-k, top-p, min-p and random number."""
    s = state.request.sampling
    top_k, top_p = s.top_k or vocab, s.top_p if s.top_p < 1 else math.inf
    uniform = state.uniform(unread) if s.temperature else 0.0
    return max(s.temperature, LEAST_TEMPERATURE), min(top_k, vocab) - 1, top_p, s.min_p, uniform


def _penalize(scores: Tensor, state: SamplerState) -> None:
    """Changes a row's scores (vocab) by allowed tokens, bias, penalties, bad words, and ends where it must go on."""
    sampling, device = state.request.sampling, scores.device
    if sampling.allowed_token_ids:
        allowed = state.allowed(device)
        scores.copy_(torch.full_like(scores, -math.inf).index_copy_(0, allowed, scores[allowed]))
    if sampling.logit_bias:
        scores.index_add_(0, *state.bias(device))
    if sampling.repetition_penalty != 1:
        seen = state.seen(device)
        own = scores[seen]
        scores[seen] = torch.where(own > 0, own / sampling.repetition_penalty, own * sampling.repetition_penalty)
    if state.counts and (sampling.presence_penalty or sampling.frequency_penalty):
        tokens, counts = moved(torch.tensor([list(state.counts), list(state.counts.values())]), device)
        scores[tokens] -= sampling.presence_penalty + sampling.frequency_penalty * counts
    if sampling.bad_words and (excluded := state.bad_words.excluded()):
        scores.index_fill_(0, moved(torch.tensor(excluded), device), -math.inf)
    if state.must_go_on and state.form is None:  # a form's mask has it already
        scores.index_fill_(0, state.ends(device), -math.inf)


def _mask(scores: Tensor, forms: Sequence[MaskedAnswer | None]) -> None:
    """Rules out the tokens of each row (rows, vocab) that its form does not let come."""
    masked = [(i, form.mask) for i, form in enumerate(forms) if form is not None and form.mask is not None]
    if masked:
        rows = moved(torch.tensor([i for i, _ in masked]), scores.device)
        may_come = allowed(moved(torch.stack([mask for _, mask in masked]), scores.device), scores.shape[1])
        scores.index_copy_(0, rows, scores[rows].masked_fill(~may_come, -math.inf))


def _on(device: torch.device, values: Tensor) -> Tensor:
    return values if values.device == device else moved(values, device)


def _draw(
    scores: Tensor, greedy: Tensor, temperature: Tensor, last: Tensor, top_p: Tensor, min_p: Tensor, uniform: Tensor
) -> Tensor:
    """Draws a token of each row, or takes its likeliest one where its temperature is 0.

    Args:
        scores: (rows, vocab) fp32, after penalties.
        greedy: (rows) int64, the likeliest tokens.
        temperature, last, top_p, min_p, uniform: (rows, 1) float64, as `_parameters`.

    Returns:
        (rows) int64.
    """
    # Temperatures near 0 would overflow; the difference to the largest score cannot.
    scores = (scores - scores.amax(-1, keepdim=True)) / temperature.float()
    scores, order = scores.sort(dim=-1, descending=True, stable=True)
    scores.masked_fill_(scores.exp() < min_p.float(), -math.inf)  # the likeliest one's score is 0
    scores.masked_fill_(scores < scores.gather(1, last.long()), -math.inf)
    # Whole numbers: their sums do not depend on the order, which a device chooses by the number of rows.
    shares = (scores.softmax(-1).double() * ALL_SHARES).long()
    shares.masked_fill_(shares.cumsum(-1) - shares >= top_p * ALL_SHARES, 0)
    cumulative = shares.cumsum(-1)
    place = torch.searchsorted(cumulative, (cumulative[:, -1:] * uniform).long(), right=True)
    # Not past the last token that has a share. None has where scores overflow, are NaN or all forbidden.
    place = place.minimum((shares > 0).sum(-1, keepdim=True) - 1).clamp_(min=0)
    drawn = order.gather(1, place).squeeze(1)
    return torch.where(temperature.squeeze(1) > LEAST_TEMPERATURE, drawn, greedy)


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
