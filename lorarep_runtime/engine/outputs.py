"""From sampled tokens to events: the text of a token, whether it ends the answer, and the caller's callback."""

from __future__ import annotations

import logging
import time
from typing import NamedTuple

import numpy as np

from lorarep_runtime.engine.sampler import NO_TOKEN, Sampled
from lorarep_runtime.engine.sequence import Sequence
from lorarep_runtime.engine.stats import StatsRecorder
from lorarep_runtime.errors import FailedPrecondition
from lorarep_runtime.request import Event, Finished, FinishReason, Output, Timings

log = logging.getLogger(__name__)


class _Effect(NamedTuple):
    """The text that one token adds to an answer, and whether the answer ends with it."""

    reason: FinishReason | None
    """None where the answer goes on."""
    text: str
    stop: str = ""
    """The stop string that ended the answer, if one did."""


class Outputs:
    """Adds tokens to answers, counts them and tells callers. The step loop's thread alone touches it."""

    def __init__(self, stats: StatsRecorder) -> None:
        self._stats = stats

    def add_token(self, sequence: Sequence, sampled: Sampled) -> Finished | None:
        """Adds a token to an answer and tells the caller of it.

        Returns:
            The answer's last event where the token ends it, for `tell`.

        Raises:
            LorarepError: the sequence's tokenizer, which may be its adapter's, fails.
            FailedPrecondition: there is no token, as the sequence's logits are no finite numbers.
            InvalidArgument: the answer's form takes too much for a mask.
        """
        form = sequence.sampler.form
        if form is not None and form.error is not None:
            raise form.error
        prompt_logprobs = sequence.take_prompt_logprobs()
        if sampled.token == NO_TOKEN or (prompt_logprobs is not None and np.isnan(prompt_logprobs.logprobs).any()):
            raise _overflow(sequence.lease.names)
        now = time.monotonic()
        self._stats.record_token(sequence)
        sequence.append(sampled.token, now)
        effect = _apply_stop_rules(sequence, sampled.token)
        logprobs = () if sampled.logprob is None else (sampled.logprob,)
        self.tell(sequence, Output((sampled.token,), effect.text, logprobs, prompt_logprobs))
        if effect.reason is None:
            return None
        prompt_tokens = len(sequence.request.prompt)
        times = _timings(sequence, now)
        return Finished(
            effect.reason, prompt_tokens, sequence.new_tokens, times, effect.stop, cached_tokens=sequence.cached_tokens
        )

    def tell(self, sequence: Sequence, event: Event) -> None:
        """Calls a request's callback; an error of the callback is logged and goes no further."""
        try:
            sequence.on_event(event)
        except Exception:
            log.exception("a caller's callback failed")


def _apply_stop_rules(sequence: Sequence, token: int) -> _Effect:
    """Feeds the last token of an answer to its text and decides whether the answer ends with it."""
    stopping = sequence.request.stopping
    if token in sequence.sampler.stop_ids:
        return _Effect(FinishReason.STOP_TOKEN, sequence.text.finish())
    if token in sequence.sampler.eos_ids and not stopping.ignore_eos:
        return _Effect(FinishReason.END_TOKEN, sequence.text.finish())
    text, stop = sequence.text.feed(token, may_stop=sequence.new_tokens >= stopping.min_new_tokens)
    if stop:
        return _Effect(FinishReason.STOP_STRING, text, stop)
    if sequence.new_tokens == stopping.max_new_tokens:
        return _Effect(FinishReason.LENGTH, text + sequence.text.finish())
    return _Effect(None, text)


def _overflow(names: tuple[str, ...]) -> FailedPrecondition:
    if not names:
        return FailedPrecondition("its logits are NaN or infinite", field="base")
    which = f"{names[0]!r}" if len(names) == 1 else f"the mix of {', '.join(map(repr, names))}"
    return FailedPrecondition(f"the logits with {which} are NaN or infinite", field="adapters")


def _timings(sequence: Sequence, now: float) -> Timings:
    assert sequence.first_token_at is not None
    started_at = sequence.started_at or now
    return Timings(
        queued=started_at - sequence.submitted_at,
        prefill=sequence.first_token_at - started_at,
        decode=now - sequence.first_token_at,
    )
