"""Builders of OpenAI's JSON responses from the engine's outputs: whole, or as the chunks of a stream."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from lorarep_runtime.request import Finished, FinishReason, Output, PromptLogprobs, TokenLogprob
from lorarep_runtime.text.detokenizer import REPLACEMENT, TextStream
from lorarep_server.api.openai_other_calls import tool_call_parser
from lorarep_server.api.openai_requests import ChatRequest, CompletionRequest, GenerationRequest
from lorarep_server.api.openai_tool_calls import ToolCallParser
from lorarep_server.requests.tools import tool_format

if TYPE_CHECKING:
    from lorarep_runtime.text.tokenizer import Tokenizer

R = TypeVar("R", bound=GenerationRequest)

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


class GenerationResponse(ABC, Generic[R]):
    """Builds one choice of the response to a request, and the parts that all its choices share.

    Args:
        request: its request.
        tokenizer: of the choice.
        identity: of the response.
        index: of the choice.
        prompt: tokens of the choice's prompt.
        prompt_text: the prompt as the request has it; "" where that is no text.
    """

    prefix: ClassVar[str]
    """Prefix of the response's id."""
    kind: ClassVar[str]
    """The `object` field of a whole response."""
    chunk_kind: ClassVar[str]
    """The `object` field of a chunk."""

    def __init__(
        self,
        request: R,
        tokenizer: Tokenizer,
        identity: Identity,
        index: int = 0,
        prompt: Sequence[int] = (),
        prompt_text: str = "",
    ) -> None:
        self._id = f"{self.prefix}-{identity.number}"
        self._created = identity.created
        self._index = index
        self._request = request
        self._tokenizer = tokenizer
        self._prompt = prompt
        self._prompt_text = prompt_text
        self.prompt_logprobs: PromptLogprobs | None = None
        """Those of the prompt, once they are known; None where they are not wanted."""
        self._count, self._last = 0, -1
        """Number of tokens of the choice so far, and the last one."""
        self._text_of = cache(self._token_text)

    def choice(self, outputs: Sequence[Output], finished: Finished) -> dict[str, Any]:
        """The whole choice of a request that is not streamed."""
        self._take(outputs)
        return self._choice(outputs, FINISH_REASONS[finished.reason], self._ending(finished))

    def whole(self, choices: list[dict[str, Any]], ends: Sequence[Finished]) -> dict[str, Any]:
        """The whole response of a request that is not streamed.

        Args:
            choices: those to show, by `choice`.
            ends: of all answers that were computed, prompt by prompt.
        """
        return self._body(self.kind, choices, usage=self._usage(ends))

    def parse_calls(self, parser: str | None) -> None:
        """Has calls of tools found in the text, if there are any to call.

        Args:
            parser: their format, as the operator names it; None is what the chat template tells.
        """

    def begin(self) -> Iterator[dict[str, Any]]:
        """The chunks that come right before those of the first token."""
        yield from ()

    def part(self, outputs: Sequence[Output]) -> dict[str, Any]:
        """The chunk of the tokens that one or more steps added."""
        self._take(outputs)
        return self._chunk([self._delta(self._choice(outputs, None))])

    def end(self, finished: Finished) -> dict[str, Any]:
        """The chunk after the choice's last token: the finish reason."""
        return self._chunk([self._delta(self._choice([], FINISH_REASONS[finished.reason], self._ending(finished)))])

    def usage(self, ends: Sequence[Finished]) -> Iterator[dict[str, Any]]:
        """The last chunk, after all choices: the usage, if the request asks for it."""
        if self._wants_usage:
            yield self._body(self.chunk_kind, [], usage=self._usage(ends))

    def _take(self, outputs: Sequence[Output]) -> None:
        for output in outputs:
            self._count += len(output.tokens)
            self._last = output.tokens[-1]

    def _ending(self, finished: Finished) -> str:
        """What stopped the answer, where the request wants that in its text."""
        if not self._request.include_stop_str_in_output or finished.reason is FinishReason.LENGTH:
            return ""
        if finished.reason is FinishReason.STOP_STRING:
            return finished.stop
        is_hidden = self._request.skip_special_tokens and self._last in self._tokenizer.special_texts
        return "" if is_hidden else self._tokenizer.token_text(self._last)

    @property
    def echoes(self) -> bool:
        """Whether the choice begins with its prompt."""
        return False

    @property
    def _wants_usage(self) -> bool:
        return self._request.stream_options is not None and self._request.stream_options.include_usage

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        if not self._wants_usage:
            return self._body(self.chunk_kind, choices)
        # A request for usage adds the field to every chunk; it is null in all but the last.
        options, usage = self._request.stream_options, None
        if options is not None and options.continuous_usage_stats:
            usage = _usage(len(self._prompt), self._count)
        return self._body(self.chunk_kind, choices, usage=usage)

    def _body(self, kind: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        model = self._request.model
        return {"id": self._id, "object": kind, "created": self._created, "model": model, "choices": choices, **more}

    def _usage(self, ends: Sequence[Finished]) -> dict[str, Any]:
        """The usage of all answers; a prompt counts once, however many answers there are to it."""
        prompts = ends[:: self._request.choices]
        usage = _usage(sum(end.prompt_tokens for end in prompts), sum(end.completion_tokens for end in ends))
        return {**usage, "prompt_tokens_details": {"cached_tokens": sum(end.cached_tokens for end in prompts)}}

    def _delta(self, choice: dict[str, Any]) -> dict[str, Any]:
        """The form that a choice has in a chunk."""
        return choice

    @abstractmethod
    def _choice(self, outputs: Sequence[Output], reason: str | None, ending: str = "") -> dict[str, Any]: ...

    def _token_ids(self, outputs: Sequence[Output]) -> dict[str, Any]:
        """The field with the tokens of some outputs, if the request asks for it."""
        if not self._request.return_token_ids:
            return {}
        return {"token_ids": [token for output in outputs for token in output.tokens]}

    def _of_prompt(self) -> dict[str, Any]:
        """The fields of vLLM that are about the prompt, if the request asks for them."""
        asked = self._request
        fields: dict[str, Any] = {}
        if asked.return_token_ids:
            fields["prompt_token_ids"] = list(self._prompt)
        if asked.prompt_logprobs is not None:
            scored, top = self.prompt_logprobs or (), asked.prompt_logprobs
            fields["prompt_logprobs"] = [None, *(self._ranked(place, top) for place in scored)]
        return fields

    def _ranked(self, place: TokenLogprob, top: int) -> dict[str, Any]:
        """A place as vLLM has it: the prompt's own token and the likeliest ones, by their ids."""
        ranked = [(place.token, place.logprob, place.rank)]
        ranked += [(token, logprob, rank) for rank, (token, logprob) in enumerate(place.top[:top], 1)]
        return {
            str(token): {"logprob": _finite(logprob), "rank": rank, "decoded_token": self._text_of(token)}
            for token, logprob, rank in ranked
        }

    def _token_text(self, token: int) -> str:
        """The text by which log-probabilities name a token."""
        if self._request.return_tokens_as_token_ids:
            return f"token_id:{token}"
        return self._tokenizer.token_text(token)


class CompletionResponse(GenerationResponse[CompletionRequest]):
    """Builds the response of /v1/completions."""

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    _shown = 0
    """Characters of the text so far."""

    def choice(self, outputs: Sequence[Output], finished: Finished) -> dict[str, Any]:
        echo = self._echo() if self._request.echo else {"text": "", "logprobs": None}
        if self._request.is_echo_alone:
            return {"index": self._index, **echo, "finish_reason": "length", **self._of_prompt()}
        whole = super().choice(outputs, finished)
        if (prompt := echo["logprobs"]) is not None and whole["logprobs"] is not None:
            whole["logprobs"] = {name: prompt[name] + values for name, values in whole["logprobs"].items()}
        return {**whole, "text": echo["text"] + whole["text"], **self._of_prompt()}

    def begin(self) -> Iterator[dict[str, Any]]:
        if self._request.echo or self._request.return_token_ids:
            echo = self._echo() if self._request.echo else {"text": "", "logprobs": None}
            of_prompt = {**self._token_ids([]), **self._of_prompt()}
            yield self._chunk([{"index": self._index, **echo, "finish_reason": None, **of_prompt}])

    def part(self, outputs: Sequence[Output]) -> dict[str, Any]:
        return super().part([] if self._request.is_echo_alone else outputs)

    @property
    def echoes(self) -> bool:
        return self._request.echo

    def _usage(self, ends: Sequence[Finished]) -> dict[str, Any]:
        usage = super()._usage(ends)
        if self._request.is_echo_alone:
            usage |= {"completion_tokens": 0, "total_tokens": usage["prompt_tokens"]}
        return usage

    def _choice(self, outputs: Sequence[Output], reason: str | None, ending: str = "") -> dict[str, Any]:
        text = "".join(output.text for output in outputs) + ending
        logprobs = None
        if outputs and (top := self._request.shown_logprobs) is not None:
            logprobs = _no_logprobs()
            for output in outputs:
                for place in output.logprobs:
                    self._add(logprobs, place, top)
                self._shown += len(output.text)
        return {
            "index": self._index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": reason,
            **self._token_ids(outputs),
        }

    def _echo(self) -> dict[str, Any]:
        """The text of the prompt, which a choice begins with, and its log-probabilities if they are wanted."""
        stream = TextStream(self._tokenizer, special_tokens=not self._request.skip_special_tokens)
        pieces = [stream.feed(token)[0] for token in self._prompt]
        text = self._prompt_text or "".join(pieces)
        logprobs = None
        if (top := self._request.shown_logprobs) is not None:
            logprobs = _no_logprobs()
            for token, piece, place in zip(self._prompt, pieces, [None, *(self.prompt_logprobs or ())], strict=False):
                if place is None:
                    _append(logprobs, self._text_of(token), None, None, self._shown)
                else:
                    self._add(logprobs, place, top)
                self._shown += len(piece)
        self._shown = len(text)
        return {"text": text, "logprobs": logprobs}

    def _add(self, logprobs: dict[str, list[Any]], place: TokenLogprob, top: int) -> None:
        text = self._text_of(place.token)
        # Tokens of the same text share a key, which has the likeliest one's: clients look whether that was chosen.
        likeliest = {self._text_of(token): _finite(logprob) for token, logprob in reversed(place.top[:top])}
        # A token that only completes a character has the offset of that character.
        own = _finite(place.logprob)
        _append(logprobs, text, own, {text: own, **likeliest}, self._shown)


def _no_logprobs() -> dict[str, list[Any]]:
    return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}


def _append(logprobs: dict[str, list[Any]], *place: Any) -> None:
    """Adds a token's text, log-probability, likeliest tokens and offset."""
    for values, value in zip(logprobs.values(), place, strict=True):
        values.append(value)


class ChatResponse(GenerationResponse[ChatRequest]):
    """Builds the response of /v1/chat/completions."""

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    _calls: ToolCallParser | None = None

    def parse_calls(self, parser: str | None) -> None:
        if self._request.calls_tools:
            parameters = {tool.function.name: tool.function.parameters for tool in self._request.tools}
            self._calls = tool_call_parser(tool_format(self._tokenizer, parser), parameters)

    def choice(self, outputs: Sequence[Output], finished: Finished) -> dict[str, Any]:
        whole = super().choice(outputs, finished)
        message = whole["message"]
        for call in message.get("tool_calls", ()):
            del call["index"]
        if "tool_calls" in message and not message["content"]:
            message["content"] = None
        return whole

    def whole(self, choices: list[dict[str, Any]], ends: Sequence[Finished]) -> dict[str, Any]:
        return {**super().whole(choices, ends), **self._of_prompt()}

    def begin(self) -> Iterator[dict[str, Any]]:
        delta = {"role": "assistant", "content": ""}
        chunk = self._chunk([{"index": self._index, "delta": delta, "logprobs": None, "finish_reason": None}])
        yield {**chunk, **self._of_prompt()}

    def _choice(self, outputs: Sequence[Output], reason: str | None, ending: str = "") -> dict[str, Any]:
        message: dict[str, Any] = {
            "role": "assistant",
            "content": "".join(output.text for output in outputs) + ending,
        }
        if self._calls is not None:
            message |= self._calls.message(message["content"], is_last=reason is not None)
            reason = "tool_calls" if reason == "stop" and self._calls.count else reason
        logprobs = None
        if outputs and self._request.shown_logprobs is not None:
            places = [place for output in outputs for place in output.logprobs]
            logprobs = {"content": [self._place(place) for place in places]}
        return {
            "index": self._index,
            "message": message,
            "logprobs": logprobs,
            "finish_reason": reason,
            **self._token_ids(outputs),
        }

    def _delta(self, choice: dict[str, Any]) -> dict[str, Any]:
        message = choice.pop("message")
        delta = {"tool_calls": message["tool_calls"]} if "tool_calls" in message else {}
        if message["content"] or (choice["finish_reason"] is None and not delta):
            delta["content"] = message["content"]
        return {**choice, "delta": delta}

    def _place(self, place: TokenLogprob) -> dict[str, Any]:
        top = [self._token(token, logprob) for token, logprob in place.top]
        return {**self._token(place.token, place.logprob), "top_logprobs": top}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._tokenizer.token_text(token)
        # The bytes of a token that is part of a character are unknown.
        return {
            "token": self._text_of(token),
            "logprob": _finite(logprob),
            "bytes": None if REPLACEMENT in text else list(text.encode()),
        }


def _finite(logprob: float) -> float:
    """A log-probability in JSON, which has no infinity: OpenAI's -9999 is a token that never comes."""
    return max(logprob, NEVER)


def _usage(prompt: int, completion: int) -> dict[str, Any]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
