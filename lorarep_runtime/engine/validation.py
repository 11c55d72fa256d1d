"""Checks of a request's fields before anything is allocated for it."""

from __future__ import annotations

import math

from lorarep_runtime.config import PAGE_TOKENS
from lorarep_runtime.errors import InvalidArgument, TooLong
from lorarep_runtime.request import MAX_PROMPT_LOGPROBS, Request, Sampling, Stopping, StructuredOutput

MAX_LOGPROBS = 20
MAX_PENALTY = 2.0
MAX_BIAS = 100.0
MAX_BIASED_TOKENS = 1024
MAX_ALLOWED_TOKENS = 1024
MAX_BAD_WORDS = 2048
"""Two for each text: with a space before it, and without."""
MAX_TOKENS_OF_A_WORD = 32
"""A step looks at as many ends of the answer, at most."""
MAX_STOPS = 16
MAX_STOP_TOKENS = 1024
MAX_STOP_CHARACTERS = 1024
MAX_SALT_CHARACTERS = 256
MAX_FORM_CHARACTERS = 64 << 10
MAX_CHOICES = 1024


def validate(request: Request, vocab_size: int) -> None:
    """Refuses a request with a field out of its range. It looks at each token, so `validate_length` comes first.

    Args:
        vocab_size: number of tokens of the base's vocabulary, or of the adapter's own.

    Raises:
        InvalidArgument: with the field's name.
    """
    if not request.prompt:
        raise InvalidArgument("has no tokens", field="prompt")
    sampling, stopping = request.sampling, request.stopping
    for field, tokens, most in (
        ("stop_token_ids", stopping.stop_token_ids, MAX_STOP_TOKENS),
        ("logit_bias", [token for token, _ in sampling.logit_bias], MAX_BIASED_TOKENS),
        ("allowed_token_ids", sampling.allowed_token_ids, MAX_ALLOWED_TOKENS),
        ("prompt", request.prompt, len(request.prompt)),
    ):
        if len(tokens) > most:
            raise InvalidArgument(f"{len(tokens)} tokens are over the limit of {most}", field=field)
        for token in tokens:
            if not 0 <= token < vocab_size:
                raise InvalidArgument(f"token {token} is not one of the vocabulary's {vocab_size}", field=field)
    _validate_bad_words(sampling, vocab_size)
    _validate_sampling(sampling)
    _validate_stopping(stopping)
    if request.structured_output is not None:
        _validate_form(request.structured_output, request)
    _within("logprobs", request.logprobs or 0, 0, min(MAX_LOGPROBS, vocab_size))
    _validate_prompt_logprobs(request, vocab_size)
    if (length := len(request.cache_salt)) > MAX_SALT_CHARACTERS:
        raise InvalidArgument(f"{length} characters are over the limit of {MAX_SALT_CHARACTERS}", field="cache_salt")


def _validate_bad_words(sampling: Sampling, vocab_size: int) -> None:
    words = sampling.bad_words
    if len(words) > MAX_BAD_WORDS:
        raise InvalidArgument(f"{len(words)} are over the limit of {MAX_BAD_WORDS}", field="bad_words")
    for word in words:
        if not 0 < len(word) <= MAX_TOKENS_OF_A_WORD:
            raise InvalidArgument(
                f"one of {len(word)} tokens; 1 to {MAX_TOKENS_OF_A_WORD} are possible", field="bad_words"
            )
        if not all(0 <= token < vocab_size for token in word):
            raise InvalidArgument(f"one has tokens that are none of the vocabulary's {vocab_size}", field="bad_words")
    if words and sampling.allowed_token_ids:
        raise InvalidArgument("cannot be together with allowed_token_ids", field="bad_words")


def _validate_prompt_logprobs(request: Request, vocab_size: int) -> None:
    if (top := request.prompt_logprobs) is None:
        return
    _within("prompt_logprobs", top, 0, min(MAX_LOGPROBS, vocab_size))
    if (count := len(request.prompt) * (1 + top)) > MAX_PROMPT_LOGPROBS:
        raise InvalidArgument(
            f"{count} of {len(request.prompt)} tokens are over the limit of {MAX_PROMPT_LOGPROBS}",
            field="prompt_logprobs",
        )


def _validate_sampling(sampling: Sampling) -> None:
    _within("temperature", sampling.temperature, 0, math.inf)
    _within("top_k", sampling.top_k, 0, math.inf)
    _within("top_p", sampling.top_p, 0, 1, above=True)
    _within("min_p", sampling.min_p, 0, 1)
    _within("repetition_penalty", sampling.repetition_penalty, 0, math.inf, above=True)
    _within("presence_penalty", sampling.presence_penalty, -MAX_PENALTY, MAX_PENALTY)
    _within("frequency_penalty", sampling.frequency_penalty, -MAX_PENALTY, MAX_PENALTY)
    for _, bias in sampling.logit_bias:
        _within("logit_bias", bias, -MAX_BIAS, MAX_BIAS)
    if sampling.seed is not None:
        _within("seed", sampling.seed, 0, 2**63 - 1)


def _validate_stopping(stopping: Stopping) -> None:
    _within("max_new_tokens", stopping.max_new_tokens, 1, math.inf)
    _within("min_new_tokens", stopping.min_new_tokens, 0, stopping.max_new_tokens)
    if len(stopping.stop) > MAX_STOPS:
        raise InvalidArgument(f"{len(stopping.stop)} strings are over the limit of {MAX_STOPS}", field="stop")
    for stop in stopping.stop:
        if not 0 < len(stop) <= MAX_STOP_CHARACTERS:
            raise InvalidArgument(
                f"a string of {len(stop)} characters; 1 to {MAX_STOP_CHARACTERS} are possible", field="stop"
            )


def _validate_form(form: StructuredOutput, request: Request) -> None:
    if (length := len(form.text) + sum(map(len, form.choices))) > MAX_FORM_CHARACTERS:
        raise InvalidArgument(f"{length} characters are over the limit of {MAX_FORM_CHARACTERS}", field=form.field)
    if form.kind == "choice" and not 0 < len(form.choices) <= MAX_CHOICES:
        raise InvalidArgument(f"{len(form.choices)} choices; 1 to {MAX_CHOICES} are possible", field=form.field)
    if request.stopping.ignore_eos:
        raise InvalidArgument("cannot be together with structured_output, which an end token ends", field="ignore_eos")
    if request.sampling.allowed_token_ids:
        raise InvalidArgument("cannot be together with structured_output", field="allowed_token_ids")
    if request.sampling.bad_words:
        raise InvalidArgument("cannot be together with structured_output", field="bad_words")


def _within(field: str, value: float, low: float, high: float, *, above: bool = False) -> None:
    # NaN compares false with everything; infinity is no number a caller means.
    if not (math.isfinite(value) and low <= value <= high) or (above and value == low):
        raise InvalidArgument(f"{value} is not {'over' if above else 'at least'} {low} and at most {high}", field=field)


def validate_length(request: Request, depth: int, *, shallowest: int = 1, max_tokens: int, total_pages: int) -> None:
    """Refuses a request that could not be answered even alone.

    Args:
        depth: positions of the request's stack.
        shallowest: positions of the shallowest named stack: no other one has longer sequences.
        max_tokens: most tokens of prompt and answer together.
        total_pages: pages of the KV cache.

    Raises:
        TooLong: with the numbers of tokens. The field is "prompt" where no answer of any length would be possible.
    """
    prompt, answer = len(request.prompt), request.stopping.max_new_tokens
    counted = max(depth, shallowest)
    memory = total_pages // counted * PAGE_TOKENS
    whose = ", those of the shallowest named stack," if depth < shallowest else ""
    why = f" that {counted} positions{whose} have KV memory for" if memory < max_tokens else ""
    limit = min(memory, max_tokens)
    if prompt >= limit:
        raise TooLong(f"{prompt} tokens, of {limit}{why}, leave none for an answer", field="prompt")
    if prompt + answer > limit:
        raise TooLong(
            f"{prompt} and {answer} tokens are over the limit of {limit} together{why}",
            field="prompt and max_new_tokens",
        )
