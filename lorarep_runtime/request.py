"""What a caller asks of the engine and what comes back. Token ids only: text lives in `text`."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, in the order of `transformers`: penalties, temperature, top-k, top-p, min-p."""

    temperature: float = 0.0
    """0 is greedy."""
    top_k: int = 0
    """0 keeps all."""
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    """Divides positive logits, multiplies negative ones, of every token in prompt or answer (Keskar et al., 2019)."""
    presence_penalty: float = 0.0
    """Subtracted once from every token in the answer (OpenAI)."""
    frequency_penalty: float = 0.0
    """Subtracted from every token once for each time it is in the answer (OpenAI)."""
    seed: int | None = None
    """The same seed, prompt and parameters give the same tokens whatever else is in the batch; None draws one."""


@dataclass(frozen=True)
class Stopping:
    """When an answer ends."""

    max_new_tokens: int = 256
    min_new_tokens: int = 0
    """Until then no end token is sampled and no stop string ends the answer."""
    stop: tuple[str, ...] = ()
    """Strings that end the answer; never part of it."""
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False


@dataclass(frozen=True)
class Request:
    """One prompt to continue."""

    prompt: tuple[int, ...]
    sampling: Sampling = Sampling()
    stopping: Stopping = Stopping()
    logprobs: int | None = None
    """How many of the likeliest tokens to report beside each chosen one; None reports nothing, 0 the chosen one."""
    deadline: float | None = None
    """`time.monotonic()` seconds."""


class FinishReason(Enum):
    """Why an answer ended."""

    LENGTH = "length"
    END_TOKEN = "end_token"
    STOP_TOKEN = "stop_token"
    STOP_STRING = "stop_string"


@dataclass(frozen=True)
class TokenLogprob:
    """A token's log-probability under the model, before penalties and temperature."""

    token: int
    logprob: float
    rank: int
    """1 is the likeliest."""
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens, best first."""


@dataclass(frozen=True)
class Output:
    """What one step adds to an answer. `text` may lag behind `tokens`: it never ends in half a character or stop."""

    tokens: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Timings:
    """Seconds."""

    queued: float
    """From submission until the first step that worked on it."""
    prefill: float
    """From there to the first token."""
    decode: float
    """From the first token to the last."""

    @property
    def first_token(self) -> float:
        return self.queued + self.prefill

    @property
    def total(self) -> float:
        return self.queued + self.prefill + self.decode


@dataclass(frozen=True)
class Finished:
    """The last event of an answer that ended as asked."""

    reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    timings: Timings
    stop: str = ""
    """The string that ended it, if one did."""


Event = Output | Finished | Exception
"""A stream is Outputs, then one Finished or one LorarepError."""
