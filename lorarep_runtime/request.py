"""Requests to the engine and the events of their answers. Prompts are token ids; `text` makes them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

MAX_PROMPT_LOGPROBS = 1 << 18
"""Most log-probabilities of a prompt, with those of the likeliest tokens: each is a number and a text to its caller."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, in the order of vLLM: allowed tokens, bias, penalties, temperature, min-p, top-k,
    top-p. Bad words rule tokens out before the temperature; their place among the others does not matter."""

    temperature: float = 0.0
    """0 is greedy."""
    min_p: float = 0.0
    """Keeps tokens that have at least this part of the likeliest one's probability."""
    top_k: int = 0
    """0 keeps all."""
    top_p: float = 1.0
    """Keeps the likeliest tokens until they have this probability together, of those that are left by then."""
    repetition_penalty: float = 1.0
    """Divides positive logits, multiplies negative ones, of every token in prompt or answer (Keskar et al., 2019)."""
    presence_penalty: float = 0.0
    """Subtracted once from the logit of every token in the answer (OpenAI)."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit once for each time that it is in the answer (OpenAI)."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Tokens, each once, and what is added to the logit of each (OpenAI)."""
    allowed_token_ids: tuple[int, ...] = ()
    """The tokens that may come; none are all."""
    bad_words: tuple[tuple[int, ...], ...] = ()
    """Tokens that do not come one after the other in the answer (vLLM)."""
    seed: int | None = None
    """Seed of the random numbers; None draws one. In fp32 on a CPU, the same seed, prompt and parameters give the same
    tokens whatever else is in the batch; in 16 bits and on a GPU, up to rounding."""


@dataclass(frozen=True)
class Stopping:
    """Conditions under which an answer ends."""

    max_new_tokens: int = 256
    min_new_tokens: int = 0
    """Length below which no end token is sampled and no stop string ends the answer."""
    stop: tuple[str, ...] = ()
    """Strings that end the answer; its text never contains them."""
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False


@dataclass(frozen=True)
class StructuredOutput:
    """A form that an answer has to have. No token comes that could not go on to it."""

    kind: Literal["json_schema", "regex", "choice", "grammar"]
    text: str = ""
    """A JSON Schema, a regular expression without look-around for the whole answer, or a grammar in Lark or GBNF."""
    choices: tuple[str, ...] = ()
    """Of which the answer is one."""
    asked_as: str = ""
    """The field that asks for it; "" is `structured_output` itself."""

    @property
    def field(self) -> str:
        """Its name in errors."""
        return self.asked_as or f"structured_output.{self.kind}"


@dataclass(frozen=True)
class Request:
    """A prompt to continue, and how."""

    prompt: tuple[int, ...]
    sampling: Sampling = Sampling()
    stopping: Stopping = Stopping()
    logprobs: int | None = None
    """Number of likeliest tokens to report with each chosen one; None reports nothing, 0 the chosen one alone."""
    prompt_logprobs: int | None = None
    """As `logprobs`, for each token of the prompt but the first. No page is found in the prefix cache then."""
    special_tokens: bool = False
    """Whether the answer's text has the texts of special tokens."""
    structured_output: StructuredOutput | None = None
    """None is any text. An answer that `max_new_tokens` ends is the beginning of one of that form."""
    cache_salt: str = ""
    """Requests share cached pages of keys and values only with those of the same salt."""
    deadline: float | None = None
    """`time.monotonic()` seconds at which the request ends with DeadlineExceeded; None is never."""


class FinishReason(Enum):
    """Reason for an answer's end."""

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
    """Place among all tokens; 1 is the likeliest."""
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens and their log-probabilities, best first."""


@dataclass(frozen=True, eq=False)
class PromptLogprobs:
    """The log-probabilities of a prompt's tokens but the first, packed, as there may be many."""

    tokens: NDArray[np.int64]
    """(n), the prompt's tokens from its second on."""
    logprobs: NDArray[np.float32]
    """(n), of each token after those before it; NaN where the logits are no finite numbers."""
    ranks: NDArray[np.int64]
    """(n), the place of each token among all; 1 is the likeliest."""
    top_tokens: NDArray[np.int64]
    """(n, k), the likeliest tokens at each place, best first."""
    top_logprobs: NDArray[np.float32]
    """(n, k), of these."""

    def __len__(self) -> int:
        return len(self.tokens)

    def __iter__(self) -> Iterator[TokenLogprob]:
        for token, logprob, rank, *top in zip(*(array.tolist() for array in self._arrays), strict=True):
            yield TokenLogprob(token, logprob, rank, tuple(zip(*top, strict=True)))

    def part(self, start: int, stop: int) -> PromptLogprobs:
        """Those of the places [start, stop)."""
        return PromptLogprobs(*(array[start:stop] for array in self._arrays))

    @classmethod
    def joined(cls, parts: Sequence[PromptLogprobs]) -> PromptLogprobs:
        """Those of parts that follow one another. There is at least one."""
        return cls(*map(np.concatenate, zip(*(part._arrays for part in parts), strict=True)))

    @property
    def _arrays(self) -> tuple[NDArray[Any], ...]:
        return self.tokens, self.logprobs, self.ranks, self.top_tokens, self.top_logprobs


@dataclass(frozen=True)
class Output:
    """The tokens that one step adds to an answer.

    `text` may lag behind `tokens`: it never ends in half a character or in a part of a stop string.
    """

    tokens: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: PromptLogprobs | None = None
    """Those of the prompt, with the first token of an answer whose request asks for them."""


@dataclass(frozen=True)
class Timings:
    """Seconds that a request spent in each phase."""

    queued: float
    """From submission to the first step that computes any of its tokens."""
    prefill: float
    """From that step to the first token of the answer."""
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
    """The stop string that ended the answer, if one did."""
    cached_tokens: int = 0
    """Tokens of the prompt whose keys and values were in the prefix cache."""


Event = Output | Finished | Exception
"""An item of a request's stream, which is any number of Outputs, then one Finished or one LorarepError."""
