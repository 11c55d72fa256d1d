"""Translation between lorarep.v1's messages and the runtime's own types."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, MutableMapping, MutableSequence, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from google.protobuf import json_format
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from lorarep.v1 import adapters_pb2, generation_pb2

from lorarep_runtime.errors import InvalidArgument, TooLong
from lorarep_runtime.request import (
    Finished,
    FinishReason,
    Output,
    PromptLogprobs,
    Request,
    Sampling,
    Stopping,
    StructuredOutput,
    TokenLogprob,
)
from lorarep_server.requests import tools
from lorarep_server.requests.message_bounds import most_bytes

if TYPE_CHECKING:
    from lorarep_runtime.adapters.revision import AdapterInfo
    from lorarep_runtime.text.tokenizer import Tokenizer
    from lorarep_server.loading.adapters_file import DesiredAdapter
    from lorarep_server.loading.load_queue import LoadState

FINISH_REASONS: Mapping[FinishReason, generation_pb2.FinishReason.ValueType] = {
    FinishReason.LENGTH: generation_pb2.FINISH_REASON_LENGTH,
    FinishReason.END_TOKEN: generation_pb2.FINISH_REASON_END_TOKEN,
    FinishReason.STOP_TOKEN: generation_pb2.FINISH_REASON_STOP_TOKEN,
    FinishReason.STOP_STRING: generation_pb2.FINISH_REASON_STOP_STRING,
}

KINDS: Mapping[str, adapters_pb2.AdapterKind.ValueType] = {
    "lora": adapters_pb2.ADAPTER_KIND_LORA,
    "dora": adapters_pb2.ADAPTER_KIND_DORA,
}


TIERS: Mapping[str, adapters_pb2.AdapterTier.ValueType] = {
    "device": adapters_pb2.ADAPTER_TIER_DEVICE,
    "host": adapters_pb2.ADAPTER_TIER_HOST,
    "disk": adapters_pb2.ADAPTER_TIER_DISK,
}

STAGES: Mapping[str, adapters_pb2.LoadStage.ValueType] = {
    "waiting": adapters_pb2.LOAD_STAGE_WAITING,
    "download": adapters_pb2.LOAD_STAGE_DOWNLOADING,
    "check": adapters_pb2.LOAD_STAGE_CHECKING,
    "compile": adapters_pb2.LOAD_STAGE_COMPILING,
}


MAX_ARGUMENT_BYTES = 16 << 10
"""Most bytes of the arguments of a chat template."""
MAX_BAD_WORDS = 1024
MAX_BAD_CHARACTERS = 1024
PLACES_OF_A_PART = 1024
"""Most tokens of a prompt whose log-probabilities are in one message of a stream."""
UNSET = "one of text, token_ids and chat has to be set"


def prompt_tokens(
    prompt: generation_pb2.Prompt, tokenizer: Tokenizer, max_tokens: int, longest: int | None = None
) -> tuple[int, ...]:
    """The tokens of a prompt. A text has at most `longest` of them; longer texts are cut as in `Tokenizer.encode`.

    Args:
        max_tokens: most tokens of a prompt. What has more for certain is refused before it is tokenized, unless it is
            cut.

    Raises:
        InvalidArgument: the prompt is unset or too long, or the tokenizer cannot encode it.
    """
    match prompt.WhichOneof("content"):
        case "text":
            if longest is None:
                check_characters(len(prompt.text), tokenizer, max_tokens, "prompt")
            return tuple(tokenizer.encode(prompt.text, longest, adds_special_tokens=not prompt.omits_special_tokens))
        case "token_ids":
            return token_ids(prompt, max_tokens)
        case "chat":
            if not prompt.chat.messages:
                raise InvalidArgument("has no messages", field="prompt.chat")
            # What the template leaves out does not count.
            most, arguments = most_characters(tokenizer, max_tokens), template_arguments(prompt.chat)
            chat, continues = prompt.chat, prompt.chat.continue_final_message
            asks = chat.add_generation_prompt if chat.HasField("add_generation_prompt") else not continues
            told = [_message(message) for message in chat.messages]
            return tuple(
                tokenizer.chat(
                    told, most, arguments, asks_for_answer=asks, continues_last=continues, tools=tools.told_tools(chat)
                )
            )
        case _:
            raise InvalidArgument(UNSET, field="prompt")


def _message(message: generation_pb2.ChatMessage) -> dict[str, Any]:
    """A message of a conversation as templates have it."""
    named = {"name": message.name} if message.name else {}
    return {"role": message.role, "content": message.content, **named, **tools.told_calls(message)}


def template_arguments(chat: generation_pb2.Chat) -> dict[str, Any]:
    """The further variables of a conversation's template. Raises InvalidArgument if they are too long."""
    if (size := chat.template_arguments.ByteSize()) > MAX_ARGUMENT_BYTES:
        raise InvalidArgument(
            f"{size} bytes are over the limit of {MAX_ARGUMENT_BYTES}", field="prompt.chat.template_arguments"
        )
    try:
        return {name: _json(value) for name, value in json_format.MessageToDict(chat.template_arguments).items()}
    except (ValueError, json_format.Error) as error:  # infinite numbers
        raise InvalidArgument(str(error), field="prompt.chat.template_arguments") from error


def _json(value: Any) -> Any:
    """A value of a Struct, with whole numbers as such: templates would write 1.0 for 1."""
    if isinstance(value, list):
        return [_json(item) for item in value]
    if isinstance(value, dict):
        return {name: _json(item) for name, item in value.items()}
    return int(value) if isinstance(value, float) and value.is_integer() else value


def any_prompt(prompt: generation_pb2.Prompt, max_tokens: int) -> tuple[int, ...]:
    """The tokens of a prompt if it needs no tokenizer, else one token in their place.

    Raises:
        InvalidArgument: the prompt is unset, or has more than `max_tokens` tokens.
    """
    match prompt.WhichOneof("content"):
        case "token_ids":
            return token_ids(prompt, max_tokens)
        case None:
            raise InvalidArgument(UNSET, field="prompt")
        case "chat":
            template_arguments(prompt.chat)
            tools.told_tools(prompt.chat)
    return (0,)


def token_ids(prompt: generation_pb2.Prompt, max_tokens: int) -> tuple[int, ...]:
    """The tokens of a prompt of tokens. Raises InvalidArgument if they are more than `max_tokens`."""
    if (count := len(prompt.token_ids.ids)) > max_tokens:
        raise TooLong(f"{count} tokens are over the limit of {max_tokens}", field="prompt")
    return tuple(prompt.token_ids.ids)


def check_characters(characters: int, tokenizer: Tokenizer, max_tokens: int, field: str) -> None:
    """Refuses a text that has more than `max_tokens` for certain, by arithmetic: to tokenize it would take seconds.

    Raises:
        TooLong: with the field's name.
    """
    if characters > (most := most_characters(tokenizer, max_tokens)):
        raise TooLong(f"{characters} characters are over the limit of {most} for {max_tokens} tokens", field=field)


def most_characters(tokenizer: Tokenizer, max_tokens: int) -> int:
    """The most characters of a text that is tokenized: more than `max_tokens` can have, or than a request may send."""
    own, sent = tokenizer.most_characters(max_tokens), most_bytes(max_tokens)
    return sent if own is None else min(own, sent)


def adapter_weights(adapters: Iterable[generation_pb2.AdapterRef]) -> list[tuple[str, float]]:
    """The names and weights of a request's adapters; an unset weight is 1."""
    return [(ref.name, ref.weight if ref.HasField("weight") else 1.0) for ref in adapters]


def stack_name(request: generation_pb2.GenerateRequest) -> str | None:
    """The named stack of a request; None if it is unset."""
    return request.stack if request.HasField("stack") else None


def structured_output(
    request: generation_pb2.GenerateRequest, tokenizer: Tokenizer | None = None, parser: str | None = None
) -> StructuredOutput | None:
    """The form of a request's answer: what it asks for, or the calls that it requires.

    Args:
        tokenizer: of the request; without one, calls are not looked at.
        parser: the format of calls that the operator names.

    Raises:
        InvalidArgument: it has no form, or both.
        FailedPrecondition: the model's format of calls is not known.
    """
    form = _form(request.structured_output) if request.HasField("structured_output") else None
    chat = request.prompt.chat
    if tokenizer is None or not (told := tools.told_tools(chat)):
        return form
    calls = tools.required_calls(chat, told, tools.tool_format(tokenizer, parser), tokenizer)
    if form is not None and calls is not None:
        raise InvalidArgument("cannot be together with a required call of a tool", field="structured_output")
    return form or calls


def _form(asked: generation_pb2.StructuredOutput) -> StructuredOutput:
    match asked.WhichOneof("form"):
        case "json_schema":
            return StructuredOutput("json_schema", asked.json_schema)
        case "json_object":
            return StructuredOutput("json_schema", '{"type": "object"}')
        case "regex":
            return StructuredOutput("regex", asked.regex)
        case "choice":
            return StructuredOutput("choice", choices=tuple(asked.choice.choices))
        case "grammar":
            return StructuredOutput("grammar", asked.grammar)
    raise InvalidArgument("has no form", field="structured_output")


def bad_words(sampling: generation_pb2.Sampling, tokenizer: Tokenizer | None = None) -> tuple[tuple[int, ...], ...]:
    """The tokens of a request's bad words, as vLLM makes them; none without a tokenizer.

    Raises:
        InvalidArgument: they are too many, or one is too long or empty.
    """
    if (count := len(sampling.bad_words)) > MAX_BAD_WORDS:
        raise InvalidArgument(f"{count} are over the limit of {MAX_BAD_WORDS}", field="bad_words")
    words: list[tuple[int, ...]] = []
    for text in sampling.bad_words:
        if not 0 < len(text) <= MAX_BAD_CHARACTERS:
            raise InvalidArgument(
                f"one of {len(text)} characters; 1 to {MAX_BAD_CHARACTERS} are possible", field="bad_words"
            )
        if tokenizer is not None:
            plain, spaced = (
                tuple(tokenizer.encode(space + text.lstrip(), adds_special_tokens=False)) for space in ("", " ")
            )
            words.append(plain)
            if len(spaced) == len(plain) and spaced[:1] != plain[:1]:
                words.append(spaced)
    return tuple(words)


def runtime_request(
    request: generation_pb2.GenerateRequest,
    prompt: tuple[int, ...],
    deadline: float | None,
    max_tokens: int,
    new_tokens: int = Stopping.max_new_tokens,
    form: StructuredOutput | None = None,
    words: tuple[tuple[int, ...], ...] = (),
) -> Request:
    """The runtime's form of a request. Unset fields have the runtime's defaults.

    Args:
        prompt: the tokens of the prompt.
        deadline: time by `time.monotonic()`.
        max_tokens: most tokens of prompt and answer together.
        new_tokens: most tokens of the answer where the request sets no limit; the prompt may leave fewer.
        form: by `structured_output`.
        words: by `bad_words`.
    """
    stopping = Stopping(**_given(request.stopping))
    if not request.stopping.HasField("max_new_tokens"):
        left = max(1, max_tokens - len(prompt))
        stopping = replace(stopping, max_new_tokens=min(new_tokens, left))
    return Request(
        prompt=prompt,
        sampling=Sampling(**{**_given(request.sampling), "bad_words": words}),
        stopping=stopping,
        logprobs=request.logprobs if request.HasField("logprobs") else None,
        prompt_logprobs=request.prompt_logprobs if request.HasField("prompt_logprobs") else None,
        special_tokens=request.special_tokens,
        structured_output=form,
        cache_salt=request.cache_salt,
        deadline=deadline,
    )


def _given(message: Message) -> dict[str, Any]:
    """The fields of a message that are set; the runtime's dataclasses have the same names."""
    return {field.name: _value(value) for field, value in message.ListFields()}


def _value(value: Any) -> Any:
    """A field's value; a map is pairs."""
    if isinstance(value, MutableMapping):
        return tuple(value.items())
    return tuple(value) if isinstance(value, MutableSequence) else value


def chunk(outputs: Sequence[Output], tokenizer: Tokenizer) -> generation_pb2.GenerationChunk:
    """The message of the tokens that one or more steps added to an answer."""
    return generation_pb2.GenerationChunk(
        text="".join(output.text for output in outputs),
        token_ids=[token for output in outputs for token in output.tokens],
        logprobs=[token_logprob(place, tokenizer) for output in outputs for place in output.logprobs],
    )


def token_logprob(place: TokenLogprob, tokenizer: Tokenizer) -> generation_pb2.TokenLogprob:
    """The message of a token's log-probability."""
    text_of = tokenizer.token_text
    return generation_pb2.TokenLogprob(
        token_id=place.token,
        logprob=place.logprob,
        text=text_of(place.token),
        top=[
            generation_pb2.TopLogprob(token_id=token, logprob=logprob, text=text_of(token))
            for token, logprob in place.top
        ],
    )


def prompt_parts(outputs: Sequence[Output]) -> Iterator[PromptLogprobs]:
    """The log-probabilities of a prompt, in parts that fit into a message each, where outputs have them."""
    for output in outputs:
        if (scored := output.prompt_logprobs) is not None:
            yield from (scored.part(at, at + PLACES_OF_A_PART) for at in range(0, len(scored), PLACES_OF_A_PART))


def generation_finished(finished: Finished) -> generation_pb2.GenerationFinished:
    """The last message of a stream: finish reason, usage and timings."""
    times = finished.timings
    return generation_pb2.GenerationFinished(
        finish_reason=FINISH_REASONS[finished.reason],
        usage=generation_pb2.Usage(
            prompt_tokens=finished.prompt_tokens,
            completion_tokens=finished.completion_tokens,
            cached_tokens=finished.cached_tokens,
        ),
        timings=generation_pb2.Timings(
            queued=_duration(times.queued), prefill=_duration(times.prefill), decode=_duration(times.decode)
        ),
    )


def _duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromNanoseconds(round(1e9 * seconds))
    return duration


def adapter_revision(info: AdapterInfo) -> generation_pb2.AdapterRevision:
    """The exact revision of an adapter that a request used."""
    return generation_pb2.AdapterRevision(
        name=info.name, repository=info.repository, commit=info.commit, digest=info.digest
    )


def adapter(info: AdapterInfo, *, error: str = "", desired: bool = False) -> adapters_pb2.Adapter:
    """The message of a loaded adapter.

    Args:
        error: why its last load failed, if it did.
        desired: whether it is an entry of the adapters file.
    """
    return adapters_pb2.Adapter(
        name=info.name,
        repository=info.repository,
        commit=info.commit,
        digest=info.digest,
        kind=KINDS[info.kind],
        layers=info.stack,
        rank=info.rank,
        parameters=info.parameters,
        bytes=info.bytes,
        references=info.references,
        tier=TIERS[info.tier],
        pinned=info.pinned,
        priority=info.priority,
        state=adapters_pb2.ADAPTER_STATE_LOADED,
        error=error,
        desired=desired,
    )


def absent_adapter(entry: DesiredAdapter, error: str) -> adapters_pb2.Adapter:
    """The message of an entry of the adapters file that is not loaded: it is loading, or failed with `error`."""
    return adapters_pb2.Adapter(
        name=entry.name,
        repository=entry.repository,
        pinned=entry.pinned,
        priority=entry.priority,
        state=adapters_pb2.ADAPTER_STATE_FAILED if error else adapters_pb2.ADAPTER_STATE_LOADING,
        error=error,
        desired=True,
    )


def load_progress(state: LoadState) -> adapters_pb2.LoadProgress:
    """The message that reports the progress of a load."""
    return adapters_pb2.LoadProgress(stage=STAGES[state.stage], done=state.done, total=state.total)
