"""Builders of OpenAI's JSON responses from the engine's outputs: whole, or as the chunks of a stream."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from lorarep_runtime.request import Finished, FinishReason, Output, TokenLogprob
from lorarep_runtime.text.detokenizer import REPLACEMENT
from lorarep_server.api.openai_requests import GenerationRequest

if TYPE_CHECKING:
    from lorarep_runtime.text.tokenizer import Tokenizer

FINISH_REASONS: Mapping[FinishReason, str] = {
    FinishReason.LENGTH: "length",
    FinishReason.END_TOKEN: "stop",
    FinishReason.STOP_TOKEN: "stop",
    FinishReason.STOP_STRING: "stop",
}


NEVER = -9999.0


@dataclass(frozen=True)
class Identity:
    """What all choices and chunks of a response have in common."""

    number: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))


class GenerationResponse(ABC):
    """Builds one choice of the response to a request, and the parts that all its choices share.

    Args:
        request: its request.
        tokenizer: of the choice.
        identity: of the response.
        index: of the choice.
    """

    prefix: ClassVar[str]
    """Prefix of the response's id."""
    kind: ClassVar[str]
    """The `object` field of a whole response."""
    chunk_kind: ClassVar[str]
    """The `object` field of a chunk."""

    def __init__(self, request: GenerationRequest, tokenizer: Tokenizer, identity: Identity, index: int = 0) -> None:
        self._id = f"{self.prefix}-{identity.number}"
        self._created = identity.created
        self._index = index
        self._request = request
        self._tokenizer = tokenizer
        self._has_logprobs = request.to_logprobs() is not None

    def choice(self, outputs: Sequence[Output], finished: Finished) -> dict[str, Any]:
        """The whole choice of a request that is not streamed."""
        return self._choice(outputs, FINISH_REASONS[finished.reason])

    def whole(self, choices: list[dict[str, Any]], ends: Sequence[Finished]) -> dict[str, Any]:
        """The whole response of a request that is not streamed, from all its choices and their ends."""
        return self._body(self.kind, choices, usage=_usage(ends))

    def begin(self) -> Iterator[dict[str, Any]]:
        """The chunks that come right before those of the first token."""
        yield from ()

    def part(self, outputs: Sequence[Output]) -> dict[str, Any]:
        """The chunk of the tokens that one or more steps added."""
        return self._chunk([self._delta(self._choice(outputs, None))])

    def end(self, finished: Finished) -> dict[str, Any]:
        """The chunk after the choice's last token: the finish reason."""
        return self._chunk([self._delta(self._choice([], FINISH_REASONS[finished.reason]))])

    def usage(self, ends: Sequence[Finished]) -> Iterator[dict[str, Any]]:
        """The last chunk, after all choices: the usage, if the request asks for it."""
        if self._wants_usage:
            yield self._body(self.chunk_kind, [], usage=_usage(ends))

    @property
    def _wants_usage(self) -> bool:
        return self._request.stream_options is not None and self._request.stream_options.include_usage

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        # A request for usage adds the field to every chunk; it is null in all but the last.
        return self._body(self.chunk_kind, choices, **({"usage": None} if self._wants_usage else {}))

    def _body(self, kind: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        model = self._request.model
        return {"id": self._id, "object": kind, "created": self._created, "model": model, "choices": choices, **more}

    def _delta(self, choice: dict[str, Any]) -> dict[str, Any]:
        """The form that a choice has in a chunk."""
        return choice

    @abstractmethod
    def _choice(self, outputs: Sequence[Output], reason: str | None) -> dict[str, Any]: ...


class CompletionResponse(GenerationResponse):
    """Builds the response of /v1/completions."""

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    _shown = 0
    """Characters of the text so far."""

    def _choice(self, outputs: Sequence[Output], reason: str | None) -> dict[str, Any]:
        text = "".join(output.text for output in outputs)
        logprobs = self._logprobs(outputs) if outputs and self._has_logprobs else None
        return {"index": self._index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, outputs: Sequence[Output]) -> dict[str, Any]:
        text_of = self._tokenizer.token_text
        found: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for output in outputs:
            for place in output.logprobs:
                text = text_of(place.token)
                found["tokens"].append(text)
                found["token_logprobs"].append(_finite(place.logprob))
                # Tokens of the same text share a key. The chosen token comes first, then the most likely one.
                top = {text_of(token): _finite(logprob) for token, logprob in reversed(place.top)}
                found["top_logprobs"].append({**top, text: _finite(place.logprob)})
                # A token that only completes a character has the offset of that character.
                found["text_offset"].append(self._shown)
            self._shown += len(output.text)
        return found


class ChatResponse(GenerationResponse):
    """Builds the response of /v1/chat/completions."""

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def begin(self) -> Iterator[dict[str, Any]]:
        delta = {"role": "assistant", "content": ""}
        yield self._chunk([{"index": self._index, "delta": delta, "logprobs": None, "finish_reason": None}])

    def _choice(self, outputs: Sequence[Output], reason: str | None) -> dict[str, Any]:
        message = {"role": "assistant", "content": "".join(output.text for output in outputs)}
        logprobs = None
        if outputs and self._has_logprobs:
            places = [place for output in outputs for place in output.logprobs]
            logprobs = {"content": [self._place(place) for place in places]}
        return {"index": self._index, "message": message, "logprobs": logprobs, "finish_reason": reason}

    def _delta(self, choice: dict[str, Any]) -> dict[str, Any]:
        content = choice.pop("message")["content"]
        return {**choice, "delta": {"content": content} if choice["finish_reason"] is None else {}}

    def _place(self, place: TokenLogprob) -> dict[str, Any]:
        top = [self._token(token, logprob) for token, logprob in place.top]
        return {**self._token(place.token, place.logprob), "top_logprobs": top}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._tokenizer.token_text(token)
        # The bytes of a token that is part of a character are unknown.
        return {
            "token": text,
            "logprob": _finite(logprob),
            "bytes": None if REPLACEMENT in text else list(text.encode()),
        }


def _finite(logprob: float) -> float:
    """A log-probability in JSON, which has no infinity: OpenAI's -9999 is a token that never comes."""
    return max(logprob, NEVER)


def _usage(ends: Sequence[Finished]) -> dict[str, Any]:
    prompt, completion = sum(end.prompt_tokens for end in ends), sum(end.completion_tokens for end in ends)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(end.cached_tokens for end in ends)},
    }
