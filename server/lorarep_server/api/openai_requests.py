"""Between OpenAI's JSON and lorarep's own types. What is not a field here is refused."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar

from lorarep.v1 import generation_pb2
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from lorarep_runtime.errors import InvalidArgument
from lorarep_runtime.request import Finished, FinishReason, Output, TokenLogprob
from lorarep_runtime.text.detokenizer import REPLACEMENT

if TYPE_CHECKING:
    from lorarep_runtime.text.tokenizer import Tokenizer

UInt32 = Annotated[int, Field(ge=0, lt=1 << 32)]
UInt64 = Annotated[int, Field(ge=0, lt=1 << 64)]
T = TypeVar("T")
Listed = Annotated[list[T], Field(fail_fast=True)]
"""Of whose items the first wrong one is told: telling of a million takes seconds, in which nobody is served."""

SAMPLING = set(generation_pb2.Sampling.DESCRIPTOR.fields_by_name)
"""Fields that both sides name alike."""
FINISH_REASONS: Mapping[FinishReason, str] = {
    FinishReason.LENGTH: "length",
    FinishReason.END_TOKEN: "stop",
    FinishReason.STOP_TOKEN: "stop",
    FinishReason.STOP_STRING: "stop",
}


class Message(BaseModel):
    """A part of a request: JSON's own types, no unknown fields, null as if it were not there."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        return {k: v for k, v in given.items() if v is not None} if isinstance(given, dict) else given


class StreamOptions(Message):
    """Of `stream`."""

    include_usage: bool = False


class GenerationRequest(Message, ABC):
    """What both kinds of completions know. Fields of one possible value are what is done anyway."""

    unset_tokens: ClassVar[int]
    """Most tokens of the answer if the request does not say, or what the prompt leaves."""
    logprobs_field: ClassVar[str] = "logprobs"
    """What says how many log-probabilities are wanted."""

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: UInt32 | None = None
    stop: str | Listed[str] = []
    temperature: float = 1.0
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: UInt64 | None = None
    n: Literal[1] = 1
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] = {}
    store: Literal[False] = False
    metadata: Annotated[dict[str, Any], Field(max_length=0)] = {}
    service_tier: Literal["auto", "default"] = "auto"
    user: str = ""
    """Whom the request is for, which changes nothing in the answer."""
    # vLLM's
    top_k: Annotated[int, Field(ge=-1, lt=1 << 32)] = 0
    """0 and -1 keep all."""
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: UInt32 | None = None
    ignore_eos: bool = False
    stop_token_ids: Listed[UInt32] = []

    @field_validator("top_k")
    @classmethod
    def _all(cls, top_k: int) -> int:
        return max(top_k, 0)

    @model_validator(mode="after")
    def _streams(self) -> GenerationRequest:
        if self.stream_options is not None and not self.stream:
            raise InvalidArgument("is for stream alone", field="stream_options")
        return self

    def length(self) -> tuple[str, int | None]:
        """What limits the answer's tokens: the field's name and value."""
        return "max_tokens", self.max_tokens

    def to_generate(self, **target: Any) -> generation_pb2.GenerateRequest:
        """The request for the engine's server; `target` is its adapters or stack."""
        return generation_pb2.GenerateRequest(
            prompt=self.to_prompt(),
            sampling=generation_pb2.Sampling(**self.model_dump(include=SAMPLING)),
            stopping=generation_pb2.Stopping(
                max_new_tokens=self.length()[1],
                min_new_tokens=self.min_tokens,
                stop=[self.stop] if isinstance(self.stop, str) else self.stop,
                stop_token_ids=self.stop_token_ids,
                ignore_eos=self.ignore_eos,
            ),
            logprobs=self.to_logprobs(),
            **target,
        )

    @abstractmethod
    def to_prompt(self) -> generation_pb2.Prompt:
        """Raises InvalidArgument."""

    @abstractmethod
    def to_logprobs(self) -> int | None:
        """Of how many tokens at each place."""

    @abstractmethod
    def answer(self, tokenizer: Tokenizer) -> Answer:
        """What its answer is put into."""


class CompletionRequest(GenerationRequest):
    """Of /v1/completions."""

    unset_tokens = 16  # OpenAI's

    prompt: str | Listed[int] | Listed[str] | Listed[Listed[int]]
    logprobs: UInt32 | None = None
    best_of: Literal[1] = 1
    echo: Literal[False] = False
    suffix: Literal[""] = ""

    def to_prompt(self) -> generation_pb2.Prompt:
        prompt = self.prompt
        if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
            if len(prompt) > 1:
                raise InvalidArgument(f"{len(prompt)} prompts; one is possible", field="prompt")
            prompt = prompt[0]
        if isinstance(prompt, str):
            return generation_pb2.Prompt(text=prompt)
        if not all(isinstance(token, int) and 0 <= token < 1 << 32 for token in prompt):
            raise InvalidArgument("not all of it are tokens", field="prompt")
        return generation_pb2.Prompt(token_ids=generation_pb2.TokenIds(ids=prompt))  # type: ignore[arg-type]

    def to_logprobs(self) -> int | None:
        return self.logprobs

    def answer(self, tokenizer: Tokenizer) -> Answer:
        return CompletionAnswer(self, tokenizer)


class TextPart(Message):
    """A part of a chat message's content."""

    type: Literal["text"]
    text: str


class ChatMessage(Message):
    """One message of a conversation."""

    role: str
    content: str | Listed[TextPart]


class ResponseFormat(Message):
    """Free text, the only one."""

    type: Literal["text"]


class ChatRequest(GenerationRequest):
    """Of /v1/chat/completions."""

    unset_tokens = (1 << 32) - 1  # all that the prompt leaves
    logprobs_field = "top_logprobs"

    messages: Listed[ChatMessage]
    max_completion_tokens: UInt32 | None = None
    logprobs: bool = False
    top_logprobs: UInt32 | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Any], Field(max_length=0)] = []
    tool_choice: Literal["none", "auto"] = "none"
    parallel_tool_calls: bool = True
    """Of which there are none."""
    modalities: Listed[Literal["text"]] = ["text"]

    @model_validator(mode="after")
    def _says_once(self) -> ChatRequest:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise InvalidArgument("is max_completion_tokens by another name", field="max_tokens")
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidArgument("is for logprobs alone", field="top_logprobs")
        return self

    def length(self) -> tuple[str, int | None]:
        if self.max_completion_tokens is not None:
            return "max_completion_tokens", self.max_completion_tokens
        return super().length()

    def to_prompt(self) -> generation_pb2.Prompt:
        messages = [
            generation_pb2.ChatMessage(
                role=message.role,
                # Parts are joined as vLLM joins them.
                content=message.content
                if isinstance(message.content, str)
                else "\n".join(part.text for part in message.content),
            )
            for message in self.messages
        ]
        return generation_pb2.Prompt(chat=generation_pb2.Chat(messages=messages))

    def to_logprobs(self) -> int | None:
        return self.top_logprobs or 0 if self.logprobs else None

    def answer(self, tokenizer: Tokenizer) -> Answer:
        return ChatAnswer(self, tokenizer)


class Answer(ABC):
    """One request's answer, whole or as chunks."""

    prefix: ClassVar[str]
    kind: ClassVar[str]
    chunk_kind: ClassVar[str]

    def __init__(self, request: GenerationRequest, tokenizer: Tokenizer) -> None:
        self._id = f"{self.prefix}-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._request = request
        self._tokenizer = tokenizer
        self._has_logprobs = request.to_logprobs() is not None

    def whole(self, outputs: Sequence[Output], finished: Finished) -> dict[str, Any]:
        """All of it."""
        choice = self._choice(outputs, FINISH_REASONS[finished.reason])
        return self._body(self.kind, [choice], usage=_usage(finished))

    def begin(self) -> Iterator[dict[str, Any]]:
        """The first chunks."""
        yield from ()

    def part(self, outputs: Sequence[Output]) -> dict[str, Any]:
        """The chunk of what several steps added."""
        return self._chunk([self._delta(self._choice(outputs, None))])

    def end(self, finished: Finished) -> Iterator[dict[str, Any]]:
        """The last chunks."""
        yield self._chunk([self._delta(self._choice([], FINISH_REASONS[finished.reason]))])
        if self._wants_usage:
            yield self._body(self.chunk_kind, [], usage=_usage(finished))

    @property
    def _wants_usage(self) -> bool:
        return self._request.stream_options is not None and self._request.stream_options.include_usage

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        # Once usage is asked for, chunks have the field: null but in the last.
        return self._body(self.chunk_kind, choices, **({"usage": None} if self._wants_usage else {}))

    def _body(self, kind: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        model = self._request.model
        return {"id": self._id, "object": kind, "created": self._created, "model": model, "choices": choices, **more}

    def _delta(self, choice: dict[str, Any]) -> dict[str, Any]:
        """A choice as it is in a chunk."""
        return choice

    @abstractmethod
    def _choice(self, outputs: Sequence[Output], reason: str | None) -> dict[str, Any]: ...


class CompletionAnswer(Answer):
    """Of /v1/completions."""

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    _shown = 0
    """Characters of the text so far."""

    def _choice(self, outputs: Sequence[Output], reason: str | None) -> dict[str, Any]:
        text = "".join(output.text for output in outputs)
        logprobs = self._logprobs(outputs) if outputs and self._has_logprobs else None
        return {"index": 0, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, outputs: Sequence[Output]) -> dict[str, Any]:
        text_of = self._tokenizer.token_text
        found: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for output in outputs:
            for place in output.logprobs:
                text = text_of(place.token)
                found["tokens"].append(text)
                found["token_logprobs"].append(place.logprob)
                # Tokens of one text share a key: the likeliest has it, and the chosen one before all.
                top = {text_of(token): logprob for token, logprob in reversed(place.top)}
                found["top_logprobs"].append({**top, text: place.logprob})
                # Where the text that is not shown yet begins: its own, or what it completes.
                found["text_offset"].append(self._shown)
            self._shown += len(output.text)
        return found


class ChatAnswer(Answer):
    """Of /v1/chat/completions."""

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def begin(self) -> Iterator[dict[str, Any]]:
        delta = {"role": "assistant", "content": ""}
        yield self._chunk([{"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}])

    def _choice(self, outputs: Sequence[Output], reason: str | None) -> dict[str, Any]:
        message = {"role": "assistant", "content": "".join(output.text for output in outputs)}
        logprobs = None
        if outputs and self._has_logprobs:
            places = [place for output in outputs for place in output.logprobs]
            logprobs = {"content": [self._place(place) for place in places]}
        return {"index": 0, "message": message, "logprobs": logprobs, "finish_reason": reason}

    def _delta(self, choice: dict[str, Any]) -> dict[str, Any]:
        content = choice.pop("message")["content"]
        return {**choice, "delta": {"content": content} if choice["finish_reason"] is None else {}}

    def _place(self, place: TokenLogprob) -> dict[str, Any]:
        top = [self._token(token, logprob) for token, logprob in place.top]
        return {**self._token(place.token, place.logprob), "top_logprobs": top}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._tokenizer.token_text(token)
        # Of a part of a character nobody knows them.
        return {"token": text, "logprob": logprob, "bytes": None if REPLACEMENT in text else list(text.encode())}


def _usage(finished: Finished) -> dict[str, int]:
    prompt, answer = finished.prompt_tokens, finished.completion_tokens
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}
