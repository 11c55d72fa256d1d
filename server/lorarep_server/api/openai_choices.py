"""The answers of one HTTP request: computed together, and collected or streamed."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from lorarep.v1 import generation_pb2

from lorarep_runtime.errors import Cancelled
from lorarep_runtime.request import Finished, Output, PromptLogprobs
from lorarep_server.api.openai_errors import to_json
from lorarep_server.api.openai_requests import GenerationRequest
from lorarep_server.api.openai_responses import GenerationResponse
from lorarep_server.requests.event_stream import EventStream

Response = GenerationResponse[Any]
Taken = tuple[list[Output], Finished | None]
"""What `EventStream.take` gives."""


@dataclass
class SharedPrompt:
    """What the answers to one prompt share: the first one computes it, and the others find its pages in the cache."""

    is_computed: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the other answers may begin."""
    tokens: generation_pb2.Prompt = field(default_factory=generation_pb2.Prompt)
    """Its tokens, so that a text is not tokenized again for each answer; once it is computed."""
    logprobs: PromptLogprobs | None = None


@dataclass(frozen=True)
class Answer:
    """One answer to a prompt."""

    response: Response
    end: Finished
    choice: dict[str, Any] = field(default_factory=dict)
    """The whole choice, where the request is not streamed."""
    likelihood: float = 0.0
    """The mean log-probability of its tokens, where they are known."""


async def together(answers: Sequence[Coroutine[Any, Any, Answer]]) -> list[Answer]:
    """All answers of a request, in order. The first error ends the others, and is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(answer) for answer in answers]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


async def take_first(events: EventStream, shared: SharedPrompt, prompt: Sequence[int]) -> Taken:
    """The first events of an answer, whose prompt is computed then for the other answers to it.

    Args:
        prompt: its tokens.
    """
    outputs, finished = await events.take()
    tokens = generation_pb2.TokenIds(ids=prompt)
    shared.tokens = generation_pb2.Prompt(token_ids=tokens)
    for output in outputs:
        shared.logprobs = shared.logprobs or output.prompt_logprobs
    shared.is_computed.set()
    return outputs, finished


async def collect(response: Response, events: EventStream, first: Taken = ([], None)) -> Answer:
    """A whole answer.

    Args:
        first: what has been taken from its events already.
    """
    outputs, finished = first
    while finished is None:
        more, finished = await events.take()
        outputs += more
    events.close()  # all is read: the time that the choice takes is not the caller's
    _note_prompt(response, outputs)
    # In a thread: each log-probability has its token decoded.
    choice = await asyncio.to_thread(response.choice, outputs, finished)
    logprobs = [place.logprob for output in outputs for place in output.logprobs]
    return Answer(response, finished, choice, sum(logprobs) / max(len(logprobs), 1))


async def stream_choice(
    stream: web.StreamResponse, response: Response, events: EventStream, first: Taken = ([], None)
) -> Answer:
    """Sends a choice's chunks as server-sent events until its request has finished.

    The first comes with the first token: clients measure the time until then.

    Args:
        first: what has been taken from its events already.
    """
    has_begun = False
    outputs, finished = first
    while True:
        if outputs and not has_begun:
            _note_prompt(response, outputs)
            if response.echoes:  # a prompt may be long
                await write(stream, await asyncio.to_thread(lambda: b"".join(map(_event, response.begin()))))
            else:
                for chunk in response.begin():
                    await send(stream, chunk)
            has_begun = True
        if outputs:
            await send(stream, response.part(outputs))
        if finished is not None:
            break
        outputs, finished = await events.take()
    await send(stream, response.end(finished))
    return Answer(response, finished)


def best(request: GenerationRequest, answers: Sequence[Answer]) -> Iterator[dict[str, Any]]:
    """The choices to show: of the answers to each prompt the n likeliest, or all in their order."""
    index = 0
    for start in range(0, len(answers), request.choices):
        some = answers[start : start + request.choices]
        if request.choices > request.n:
            some = sorted(some, key=lambda answer: -answer.likelihood)[: request.n]
        for answer in some:
            yield {**answer.choice, "index": index}
            index += 1


def _note_prompt(response: Response, outputs: Sequence[Output]) -> None:
    for output in outputs[:1]:
        response.prompt_logprobs = response.prompt_logprobs or output.prompt_logprobs


async def send(stream: web.StreamResponse, event: Mapping[str, Any]) -> None:
    """Sends a server-sent event."""
    await write(stream, _event(event))


def _event(event: Mapping[str, Any]) -> bytes:
    return b"data: %b\n\n" % to_json(event).encode()


async def write(stream: web.StreamResponse, data: bytes) -> None:
    """Sends bytes. Raises Cancelled if the caller went away."""
    try:
        await stream.write(data)
    except ConnectionError as error:  # before aiohttp has cancelled the call
        raise Cancelled("the caller went away") from error
