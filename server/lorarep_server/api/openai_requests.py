"""OpenAI's JSON requests, and their translation into lorarep.v1's. Unknown fields are refused."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from lorarep.v1 import generation_pb2
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator, model_validator
from pydantic_core import PydanticCustomError

from lorarep_runtime.errors import InvalidArgument, first_line, shown

UInt32 = Annotated[int, Field(ge=0, lt=1 << 32)]
Int64 = Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)]
Name = Annotated[str, Field(max_length=256)]
Nothing = Annotated[list[Any], Field(max_length=0)]
"""An empty list."""
MOST_DEPTH = 16
"""Most objects and lists in each other: protobuf, whose messages are three for each, takes 100 messages."""
T = TypeVar("T")
Listed = Annotated[list[T], Field(fail_fast=True, max_length=1 << 20)]
"""A list that is checked up to its first wrong item: reports of a million items would block the server for seconds."""

SAMPLING = set(generation_pb2.Sampling.DESCRIPTOR.fields_by_name)
"""Sampling fields that have the same name in OpenAI's API and in lorarep.v1."""


class Message(BaseModel):
    """A JSON object of a request: types are not converted, unknown fields are refused, and null means unset."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        return {k: v for k, v in given.items() if v is not None} if isinstance(given, dict) else given


class StreamOptions(Message):
    """The options of a streamed response."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False
    continuous_usage_stats: Literal[False] = False


class GenerationRequest(Message, ABC):
    """The fields of both kinds of completions. A field with a single allowed value states the default behaviour."""

    unset_tokens: ClassVar[int]
    """Most tokens of the answer where the request sets no limit; the prompt may leave fewer."""
    prompt_field: ClassVar[str] = "prompt"
    """Name of the field that has the prompt."""
    logprobs_field: ClassVar[str] = "logprobs"
    """Name of the field that sets the number of log-probabilities."""

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: UInt32 | None = None
    stop: str | Listed[str] = []
    temperature: float = 1.0
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: Int64 | None = None
    n: Literal[1] = 1
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] = {}
    store: Literal[False] = False
    metadata: Annotated[dict[str, Any], Field(max_length=0)] = {}
    service_tier: Literal["auto", "default"] = "auto"
    user: str = ""
    """The user that the request is for. It does not change the answer."""
    safety_identifier: str = ""
    prompt_cache_key: str = ""
    # vLLM's own fields
    top_k: Annotated[int, Field(ge=-1, lt=1 << 32)] = 0
    """Both 0 and -1 keep all tokens."""
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: UInt32 | None = None
    ignore_eos: bool = False
    stop_token_ids: Annotated[Listed[UInt32], Field(max_length=1024)] = []
    bad_words: Nothing = []
    use_beam_search: Literal[False] = False
    skip_special_tokens: Literal[True] = True
    include_stop_str_in_output: Literal[False] = False
    return_token_ids: Literal[False] = False
    return_tokens_as_token_ids: Literal[False] = False
    priority: Literal[0] = 0
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    """Requests share cached pages of prompts only with those of the same salt."""

    @field_validator("seed")
    @classmethod
    def _natural(cls, seed: int | None) -> int | None:
        """A seed of the runtime for each of OpenAI's; -1 is none, as in vLLM."""
        return None if seed in (None, -1) else seed % (1 << 63)

    @field_validator("top_k")
    @classmethod
    def _keep_all(cls, top_k: int) -> int:
        return max(top_k, 0)

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> GenerationRequest:
        if self.stream_options is not None and not self.stream:
            raise InvalidArgument("is for stream alone", field="stream_options")
        return self

    def length(self) -> tuple[str, int | None]:
        """Name and value of the field that limits the answer's tokens."""
        return "max_tokens", self.max_tokens

    def to_generate(self, prompt: generation_pb2.Prompt, **target: Any) -> generation_pb2.GenerateRequest:
        """The request of one of its prompts in lorarep.v1's terms.

        Args:
            prompt: one of `to_prompts`.
            target: the adapters or the stack, as fields of GenerateRequest.
        """
        sampling = self.model_dump(include=SAMPLING)
        if self.top_p == 0:  # of the likeliest tokens, those that are needed to have any probability
            sampling |= {"top_p": None, "top_k": 1}
        return generation_pb2.GenerateRequest(
            prompt=prompt,
            sampling=generation_pb2.Sampling(**sampling),
            stopping=generation_pb2.Stopping(
                max_new_tokens=self.length()[1],
                min_new_tokens=self.min_tokens,
                stop=[self.stop] if isinstance(self.stop, str) else self.stop,
                stop_token_ids=self.stop_token_ids,
                ignore_eos=self.ignore_eos,
            ),
            logprobs=self.to_logprobs(),
            cache_salt=self.cache_salt or "",
            **target,
        )

    @abstractmethod
    def to_prompts(self) -> list[generation_pb2.Prompt]:
        """The prompts of the request, one for each choice. Raises InvalidArgument if one is malformed."""

    @abstractmethod
    def to_logprobs(self) -> int | None:
        """Number of log-probabilities at each position; None if none are requested."""


class CompletionRequest(GenerationRequest):
    """The JSON body of a request to /v1/completions."""

    unset_tokens = 16  # OpenAI's default

    prompt: str | Listed[int] | Listed[str] | Listed[Listed[int]]
    logprobs: UInt32 | None = None
    best_of: Literal[1] = 1
    echo: Literal[False] = False
    suffix: Literal[""] = ""
    add_special_tokens: Literal[True] = True

    def to_prompts(self) -> list[generation_pb2.Prompt]:
        if isinstance(self.prompt, list) and self.prompt and not isinstance(self.prompt[0], int):
            return [_prompt(one) for one in self.prompt]  # type: ignore[arg-type]
        return [_prompt(self.prompt)]  # type: ignore[arg-type]

    def to_logprobs(self) -> int | None:
        return self.logprobs


def _prompt(prompt: str | list[int]) -> generation_pb2.Prompt:
    if isinstance(prompt, str):
        return generation_pb2.Prompt(text=prompt)
    if not all(isinstance(token, int) and 0 <= token < 1 << 32 for token in prompt):
        raise InvalidArgument("not all of it are tokens", field="prompt")
    return generation_pb2.Prompt(token_ids=generation_pb2.TokenIds(ids=prompt))


class TextPart(Message):
    """A text part of a chat message's content."""

    type: Literal["text"]
    text: str

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, given: Any) -> Any:
        kind = given.get("type") if isinstance(given, dict) else None
        if isinstance(kind, str) and kind != "text":
            raise PydanticCustomError("part", "a part of type {kind}: only text is supported", {"kind": shown(kind)})
        return given


def _content_kind(content: Any) -> str:
    return "its parts" if isinstance(content, list) else "its text"


Content = Annotated[
    Annotated[str, Tag("its text")] | Annotated[Listed[TextPart], Tag("its parts")], Discriminator(_content_kind)
]
"""The content of a chat message. Told apart by its type, so that an error is about the kind that it is."""


class ChatMessage(Message):
    """One message of a conversation."""

    role: str
    content: Content
    """An assistant's may be null, or missing, as in answers that called tools."""
    name: Name = ""
    tool_calls: Nothing = []
    annotations: Nothing = []

    @model_validator(mode="before")
    @classmethod
    def _without_content(cls, given: Any) -> Any:
        is_empty = isinstance(given, dict) and given.get("role") == "assistant" and given.get("content") is None
        return {**given, "content": ""} if is_empty else given


class ResponseFormat(Message):
    """The format of the response. Free text is the only one."""

    type: Literal["text"]


class ChatRequest(GenerationRequest):
    """The JSON body of a request to /v1/chat/completions."""

    unset_tokens = (1 << 32) - 1  # as many as the prompt leaves
    prompt_field = "messages"
    logprobs_field = "top_logprobs"

    messages: Annotated[Listed[ChatMessage], Field(max_length=1 << 14)]
    max_completion_tokens: UInt32 | None = None
    logprobs: bool = False
    top_logprobs: UInt32 | None = None
    response_format: ResponseFormat | None = None
    tools: Nothing = []
    tool_choice: Literal["none", "auto"] = "none"
    functions: Nothing = []
    function_call: Literal["none", "auto"] = "none"
    parallel_tool_calls: bool = True
    """Has no effect: there are no tools."""
    modalities: Listed[Literal["text"]] = ["text"]
    verbosity: Literal["medium"] = "medium"
    # vLLM's own fields
    chat_template_kwargs: dict[Name, Any] = {}
    add_generation_prompt: Literal[True] = True
    continue_final_message: Literal[False] = False
    add_special_tokens: Literal[False] = False
    documents: Nothing = []
    echo: Literal[False] = False

    @field_validator("chat_template_kwargs")
    @classmethod
    def _not_too_deep(cls, given: dict[str, Any]) -> dict[str, Any]:
        level: list[Any] = [given]
        for _ in range(MOST_DEPTH):
            insides = (each.values() if isinstance(each, dict) else each for each in level)
            level = [value for inside in insides for value in inside if isinstance(value, dict | list)]
        if level:
            raise InvalidArgument(f"is nested more than {MOST_DEPTH} deep", field="chat_template_kwargs")
        return given

    @model_validator(mode="after")
    def _without_contradiction(self) -> ChatRequest:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise InvalidArgument("is max_completion_tokens by another name", field="max_tokens")
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidArgument("is for logprobs alone", field="top_logprobs")
        return self

    def length(self) -> tuple[str, int | None]:
        if self.max_completion_tokens is not None:
            return "max_completion_tokens", self.max_completion_tokens
        return super().length()

    def to_prompts(self) -> list[generation_pb2.Prompt]:
        messages = [
            generation_pb2.ChatMessage(
                role=message.role,
                name=message.name,
                # Parts are joined as vLLM joins them.
                content=message.content
                if isinstance(message.content, str)
                else "\n".join(part.text for part in message.content),
            )
            for message in self.messages
        ]
        chat = generation_pb2.Chat(messages=messages)
        try:
            chat.template_arguments.update(self.chat_template_kwargs)
        except (ValueError, OverflowError, RecursionError) as error:
            raise InvalidArgument(first_line(error), field="chat_template_kwargs") from error
        return [generation_pb2.Prompt(chat=chat)]

    def to_logprobs(self) -> int | None:
        return self.top_logprobs or 0 if self.logprobs else None
