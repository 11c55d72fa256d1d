"""OpenAI's JSON requests, and their translation into lorarep.v1's."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Annotated, Any, ClassVar, Literal

from lorarep.v1 import generation_pb2
from pydantic import Field, field_validator, model_validator

from lorarep_runtime.errors import InvalidArgument, first_line
from lorarep_server.api.openai_fields import (
    MOST_CHOICES,
    MOST_DEPTH,
    Content,
    Int64,
    Listed,
    Message,
    Name,
    Nothing,
    StreamOptions,
    Token,
    UInt32,
    WeightedAdapter,
)
from lorarep_server.api.openai_forms import Formed, NamedTool, Tool, ToolCall

SAMPLING = set(generation_pb2.Sampling.DESCRIPTOR.fields_by_name)
"""Sampling fields that have the same name in OpenAI's API and in lorarep.v1."""


class GenerationRequest(Formed, ABC):
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
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] = 1
    logit_bias: Annotated[dict[Token, float], Field(max_length=1024)] = {}
    # These do not change the answer.
    store: bool = False
    metadata: dict[str, Any] = {}
    service_tier: str = "auto"
    user: str = ""
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
    allowed_token_ids: Annotated[Listed[UInt32], Field(max_length=1024)] = []
    bad_words: Annotated[Listed[str], Field(max_length=1024)] = []
    use_beam_search: Literal[False] = False
    early_stopping: Literal[False] = False
    length_penalty: float = 1.0
    """Has no effect: it is for beam search alone."""
    spaces_between_special_tokens: bool = True
    """Has no effect, as in vLLM with tokenizers of the library `tokenizers`."""
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    prompt_logprobs: UInt32 | None = None
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False
    priority: Literal[0] = 0
    request_id: str = ""
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    """Requests share cached pages of prompts only with those of the same salt."""
    # lorarep's own
    adapters: Listed[WeightedAdapter] = []
    """Adapters of which an answer is computed together, where `model` names the base or a stack."""

    @field_validator("seed")
    @classmethod
    def _natural(cls, seed: int | None) -> int | None:
        """A seed of the runtime for each of OpenAI's; -1 is none, as in vLLM."""
        return None if seed in (None, -1) else seed % (1 << 63)

    @field_validator("top_k")
    @classmethod
    def _keep_all(cls, top_k: int) -> int:
        return max(top_k, 0)

    @field_validator("stop")
    @classmethod
    def _nothing_stops(cls, stop: str | list[str]) -> str | list[str]:
        return stop or []

    @model_validator(mode="after")
    def _of_a_stream(self) -> GenerationRequest:
        options = self.stream_options
        if options is not None and not self.stream and (options.include_usage or options.continuous_usage_stats):
            raise InvalidArgument("is for stream alone", field="stream_options")
        if self.stream and self.prompt_logprobs is not None:
            raise InvalidArgument("is not for stream, as in vLLM", field="prompt_logprobs")
        return self

    def length(self) -> tuple[str, int | None]:
        """Name and value of the field that limits the answer's tokens."""
        return "max_tokens", self.max_tokens

    @property
    def choices(self) -> int:
        """Number of answers to compute to each prompt."""
        return self.n

    @property
    def longest_prompt(self) -> int | None:
        """Most tokens of a text, which is cut then; None is not cut."""
        return None

    @property
    def calls_tools(self) -> bool:
        """Whether an answer may call tools."""
        return False

    def to_generate(
        self, prompt: generation_pb2.Prompt, choice: int = 0, **target: Any
    ) -> generation_pb2.GenerateRequest:
        """The request of one answer to one of its prompts in lorarep.v1's terms.

        Args:
            prompt: one of `to_prompts`.
            choice: number of the answer among those to this prompt. The first one alone has what is of the prompt.
            target: the adapters or the stack, as fields of GenerateRequest.
        """
        sampling, form = self.model_dump(include=SAMPLING), self.to_form()
        if self.top_p == 0:  # of the likeliest tokens, those that are needed to have any probability
            sampling |= {"top_p": None, "top_k": 1}
        if self.seed is not None:
            sampling["seed"] = (self.seed + choice) % (1 << 63)  # as in vLLM
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
            prompt_logprobs=self.to_prompt_logprobs() if choice == 0 else None,
            special_tokens=not self.skip_special_tokens or self.calls_tools,
            structured_output=None if form is None else form[1],
            cache_salt=self.cache_salt or "",
            **target,
        )

    @abstractmethod
    def to_prompts(self) -> list[generation_pb2.Prompt]:
        """The prompts of the request, one for each choice. Raises InvalidArgument if one is malformed."""

    @abstractmethod
    def to_logprobs(self) -> int | None:
        """Number of log-probabilities at each position; None if none are needed."""

    @property
    @abstractmethod
    def shown_logprobs(self) -> int | None:
        """Number of log-probabilities at each position that the caller wants to see; None if none."""

    def to_prompt_logprobs(self) -> int | None:
        """Number of log-probabilities at each position of the prompt; None if none are needed."""
        return self.prompt_logprobs


class CompletionRequest(GenerationRequest):
    """The JSON body of a request to /v1/completions."""

    unset_tokens = 16  # OpenAI's default

    prompt: str | Listed[int] | Listed[str] | Listed[Listed[int]]
    logprobs: UInt32 | None = None
    best_of: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    echo: bool = False
    suffix: Literal[""] = ""
    truncate_prompt_tokens: Annotated[int, Field(ge=1, lt=1 << 32)] | None = None
    """Most tokens of each prompt, which keeps its last ones."""
    add_special_tokens: bool = True
    """Whether the tokenizer adds its special tokens to a text, such as one for the beginning."""

    @model_validator(mode="after")
    def _best_of_all(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of < self.n:
            raise InvalidArgument(f"is less than the {self.n} of n", field="best_of")
        if self.stream and self.choices > self.n:
            raise InvalidArgument("is not for stream: the best are known at the end", field="best_of")
        return self

    @property
    def choices(self) -> int:
        return self.best_of or self.n

    @property
    def is_echo_alone(self) -> bool:
        """Whether the prompt is all that the answer has. A token is computed behind it and dropped."""
        return self.echo and self.max_tokens == 0

    def length(self) -> tuple[str, int | None]:
        return "max_tokens", 1 if self.is_echo_alone else self.max_tokens

    def to_prompts(self) -> list[generation_pb2.Prompt]:
        if isinstance(self.prompt, list) and self.prompt and not isinstance(self.prompt[0], int):
            return [self._prompt(one) for one in self.prompt]  # type: ignore[arg-type]
        return [self._prompt(self.prompt)]  # type: ignore[arg-type]

    def _prompt(self, prompt: str | list[int]) -> generation_pb2.Prompt:
        if isinstance(prompt, str):
            return generation_pb2.Prompt(text=prompt, omits_special_tokens=not self.add_special_tokens)
        if not all(isinstance(token, int) and 0 <= token < 1 << 32 for token in prompt):
            raise InvalidArgument("not all of it are tokens", field="prompt")
        kept = prompt[-self.truncate_prompt_tokens :] if self.truncate_prompt_tokens else prompt
        return generation_pb2.Prompt(token_ids=generation_pb2.TokenIds(ids=kept))

    @property
    def longest_prompt(self) -> int | None:
        return self.truncate_prompt_tokens

    def to_logprobs(self) -> int | None:
        # The best are those whose tokens are the likeliest.
        return 0 if self.logprobs is None and self.choices > self.n else self.logprobs

    @property
    def shown_logprobs(self) -> int | None:
        return self.logprobs

    def to_prompt_logprobs(self) -> int | None:
        wanted = [self.prompt_logprobs, self.logprobs if self.echo else None]
        return max((count for count in wanted if count is not None), default=None)


class ChatMessage(Message):
    """One message of a conversation."""

    role: str
    content: Content
    """An assistant's may be null, or missing, as in answers that called tools."""
    name: Name = ""
    tool_calls: Annotated[Listed[ToolCall], Field(max_length=1024)] = []
    tool_call_id: Name = ""
    refusal: Literal[""] = ""
    annotations: Nothing = []

    @model_validator(mode="before")
    @classmethod
    def _without_content(cls, given: Any) -> Any:
        is_empty = isinstance(given, dict) and given.get("role") == "assistant" and given.get("content") is None
        return {**given, "content": ""} if is_empty else given


class ChatRequest(GenerationRequest):
    """The JSON body of a request to /v1/chat/completions."""

    unset_tokens = (1 << 32) - 1  # as many as the prompt leaves
    prompt_field = "messages"
    logprobs_field = "top_logprobs"

    messages: Annotated[Listed[ChatMessage], Field(max_length=1 << 14)]
    max_completion_tokens: UInt32 | None = None
    logprobs: bool = False
    top_logprobs: UInt32 | None = None
    tools: Annotated[Listed[Tool], Field(max_length=128)] = []
    tool_choice: Literal["none", "auto", "required"] | NamedTool = "auto"
    functions: Nothing = []
    function_call: Literal["none", "auto"] = "none"
    parallel_tool_calls: bool = True
    """Whether an answer may call several tools. A model that need not call any may ignore it."""
    modalities: Listed[Literal["text"]] = ["text"]
    verbosity: Literal["medium"] = "medium"
    # vLLM's own fields
    chat_template_kwargs: dict[Name, Any] = {}
    reasoning_effort: Name | None = None
    """OpenAI's own; a variable of the chat template, as in vLLM."""
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    include_reasoning: Literal[True] = True
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
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise InvalidArgument("is max_completion_tokens by another name", field="max_tokens")
        if self.top_logprobs and not self.logprobs:
            raise InvalidArgument("is for logprobs alone", field="top_logprobs")
        return self

    def length(self) -> tuple[str, int | None]:
        if self.max_completion_tokens is not None:
            return "max_completion_tokens", self.max_completion_tokens
        return super().length()

    @property
    def calls_tools(self) -> bool:
        return bool(self.tools) and self.tool_choice != "none"

    def to_prompts(self) -> list[generation_pb2.Prompt]:
        messages = [
            generation_pb2.ChatMessage(
                role=message.role,
                name=message.name,
                # Parts are joined as vLLM joins them.
                content=message.content
                if isinstance(message.content, str)
                else "\n".join(part.text for part in message.content),
                tool_calls=[call.to_call() for call in message.tool_calls],
                tool_call_id=message.tool_call_id,
            )
            for message in self.messages
        ]
        asks = self.add_generation_prompt
        chat = generation_pb2.Chat(
            messages=messages,
            add_generation_prompt=None if asks and not self.continue_final_message else asks,
            continue_final_message=self.continue_final_message,
            tools=[tool.to_tool() for tool in self.tools],
            single_tool_call=not self.parallel_tool_calls,
        )
        if isinstance(self.tool_choice, NamedTool):
            chat.tool_name = self.tool_choice.function.name
        if self.tool_choice != "auto":
            is_none = self.tool_choice == "none"
            chat.tool_choice = generation_pb2.TOOL_CHOICE_NONE if is_none else generation_pb2.TOOL_CHOICE_REQUIRED
        effort = {} if self.reasoning_effort is None else {"reasoning_effort": self.reasoning_effort}
        try:
            chat.template_arguments.update(effort | self.chat_template_kwargs)
        except (ValueError, OverflowError, RecursionError) as error:
            raise InvalidArgument(first_line(error), field="chat_template_kwargs") from error
        return [generation_pb2.Prompt(chat=chat)]

    def to_logprobs(self) -> int | None:
        return self.top_logprobs or 0 if self.logprobs else None

    @property
    def shown_logprobs(self) -> int | None:
        return self.to_logprobs()
