"""OpenAI's HTTP API: models, completions and chat completions. The status page is served on the same port.

A request becomes lorarep.v1's GenerateRequest, and is served, counted, refused and cancelled like one. An unsupported
field is refused by its name, unless it is null or asks for the default behaviour.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from lorarep.v1 import generation_pb2
from pydantic import ValidationError

from lorarep_runtime.errors import Cancelled, DeadlineExceeded, InvalidArgument, NotFound, TooLong
from lorarep_runtime.request import Finished, Output
from lorarep_server.api.openai_errors import FIELDS, bad_request, error_body, error_response, json_response, to_json
from lorarep_server.api.openai_requests import ChatRequest, CompletionRequest, GenerationRequest
from lorarep_server.api.openai_responses import ChatResponse, CompletionResponse, GenerationResponse, Identity
from lorarep_server.api.status_page import FILES, StatusPage
from lorarep_server.auth import Role, TokenAuth
from lorarep_server.config import MAX_MESSAGE
from lorarep_server.errors import Status
from lorarep_server.hosts import HostCheck
from lorarep_server.loading.reconciler import Reconciler
from lorarep_server.requests.admission import LONG_MESSAGE, Admission
from lorarep_server.requests.event_stream import EventStream
from lorarep_server.requests.frontend import Frontend
from lorarep_server.requests.message_bounds import most_bytes

log = logging.getLogger(__name__)

BODY_SECONDS = 60.0
"""Seconds for a body to arrive."""
LAST_WRITE = 1.0
"""Seconds for an error to reach the caller of a stream."""
LIST = re.compile(rb'"prompt"\s*:\s*\[\s*["\[]')
"""How a list of prompts begins. A list of numbers is one prompt."""
OWNER = "lorarep"


class OpenAI:
    """The handlers of the API. They run in the event loop's thread."""

    def __init__(
        self,
        frontend: Frontend,
        reconciler: Reconciler,
        admission: Admission,
        token_auth: TokenAuth | None,
        hosts: HostCheck | None,
        page: StatusPage,
    ) -> None:
        self._frontend = frontend
        self._reconciler = reconciler
        self._admission = admission
        self._token_auth = token_auth
        self._hosts = hosts
        self._page = page
        self._created = int(time.time())

    def application(self) -> web.Application:
        """An application with all routes of the API and of the status page."""
        app = web.Application(middlewares=[self._checked], client_max_size=MAX_MESSAGE)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/v1/models/{model:.+}", self._model)
        app.router.add_post("/v1/completions", self._completions)
        app.router.add_post("/v1/chat/completions", self._chat)
        for path in FILES:
            app.router.add_get(path, self._page.file)
        app.router.add_get("/status", self._status)
        return app

    @web.middleware
    async def _checked(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """Refuses requests of other web pages, and without a valid token, even for unknown paths.

        The status page's own files need no token.
        """
        if self._hosts is not None and (other := self._hosts.refusal(request)) is not None:
            log.info("%r %s", request.path, other.code.name)
            return error_response(other)
        if self._token_auth is not None and request.path not in FILES:
            refusal = self._token_auth.refusal(request.headers.getall("Authorization", []), Role.GENERATE)
            if refusal is not None:
                log.info("%r %s", request.path, refusal.code.name)
                return error_response(refusal)
        try:
            return await handler(request)
        except web.HTTPException as error:  # an unknown path or method
            return bad_request(f"{request.method} {request.path}: {error.reason}", error.status)

    async def _status(self, request: web.Request) -> web.StreamResponse:
        status = await self._page.status()
        if isinstance(status, Status):
            return error_response(status)
        return json_response(status, headers={"Cache-Control": "no-store"})

    async def _models(self, request: web.Request) -> web.StreamResponse:
        async def work() -> web.StreamResponse:
            return json_response({"object": "list", "data": list((await self._all_models()).values())})

        return _response(await self._admission.guard("GET /v1/models", work()))

    async def _model(self, request: web.Request) -> web.StreamResponse:
        async def work() -> web.StreamResponse:
            models, name = await self._all_models(), request.match_info["model"]
            if name not in models:
                raise NotFound(f"{name!r} is none of those served", field="model")
            return json_response(models[name])

        return _response(await self._admission.guard("GET /v1/models/", work()))

    async def _all_models(self) -> dict[str, dict[str, Any]]:
        """The base, the stacks, and the adapters that are loaded or in the adapters file, by name."""
        engine = self._frontend.engine()
        base = engine.base.repository
        adapters = {name: entry.repository for name, entry in self._reconciler.all().items()}
        adapters |= {info.name: info.repository for info in await asyncio.to_thread(engine.adapters.list)}
        roots = {base: base, **dict.fromkeys(sorted(engine.stacks), base), **dict(sorted(adapters.items()))}
        return {
            name: {
                "id": name,
                "object": "model",
                "created": self._created,
                "owned_by": OWNER,
                "root": root,
                "parent": None if name == base else base,
            }
            for name, root in roots.items()
        }

    async def _parsed(self, kind: type[GenerationRequest], request: web.Request) -> GenerationRequest:
        """The request in a body of JSON; a long one is parsed in a thread."""
        body = await _body(request, most_bytes(self._frontend.engine().max_tokens))
        return await asyncio.to_thread(_parsed, kind, body) if len(body) > LONG_MESSAGE else _parsed(kind, body)

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        return await self._generate(request, CompletionRequest, CompletionResponse)

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        return await self._generate(request, ChatRequest, ChatResponse)

    def _to_generates(
        self, parsed: GenerationRequest, target: Mapping[str, Any]
    ) -> list[generation_pb2.GenerateRequest]:
        """A request in lorarep.v1's terms for each prompt. Raises InvalidArgument if there are too many."""
        prompts, most = parsed.to_prompts(), self._frontend.engine().config.scheduler.max_prompts
        if len(prompts) > most:
            raise InvalidArgument(f"{len(prompts)} prompts are over the limit of {most}", field="prompt")
        return [parsed.to_generate(prompt, **target) for prompt in prompts]

    async def _generate(
        self, request: web.Request, kind: type[GenerationRequest], builder: type[GenerationResponse]
    ) -> web.StreamResponse:
        stream = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
        fields = dict(FIELDS)

        async def work() -> web.StreamResponse:
            if request.content_type != "application/json":  # which no web page sends elsewhere without permission
                raise InvalidArgument(
                    f"is {request.content_type!r} and has to be application/json", field="content-type"
                )
            parsed = await self._parsed(kind, request)
            fields["max_new_tokens"] = fields["prompt and max_new_tokens"] = parsed.length()[0]
            fields["prompt"] = parsed.prompt_field
            fields["logprobs"] = parsed.logprobs_field
            target = await self._frontend.target(parsed.model)
            generates = await asyncio.to_thread(self._to_generates, parsed, target)
            identity, all_admitted = Identity(), asyncio.Barrier(len(generates))

            async def answer(index: int, generate: generation_pb2.GenerateRequest) -> _Answer:
                async with self._frontend.generate(generate, request.headers, new_tokens=parsed.unset_tokens) as (
                    admitted,
                    events,
                ):
                    response = builder(parsed, admitted.tokenizer, identity, index)
                    if not parsed.stream:
                        return await _collect(response, events)
                    # Until all are admitted the response may be an error.
                    if await all_admitted.wait() == 0:
                        await stream.prepare(request)
                    await all_admitted.wait()
                    return await _stream(stream, response, events)

            answers = await _together([answer(index, generate) for index, generate in enumerate(generates)])
            response, ends = answers[0].response, [each.end for each in answers]
            if not parsed.stream:
                return json_response(response.whole([each.choice for each in answers], ends))
            for chunk in response.usage(ends):
                await _send(stream, chunk)
            await _write(stream, b"data: [DONE]\n\n")
            return stream

        result = await self._admission.guard(f"POST {request.path}", work(), for_answer=True)
        if not isinstance(result, Status) or not stream.prepared:
            return _response(result, fields)
        try:
            async with asyncio.timeout(LAST_WRITE):
                await _send(stream, error_body(result, fields))
        except (TimeoutError, Cancelled):  # the caller has left, or does not read
            if request.transport is not None:
                request.transport.abort()
        return stream


async def _body(request: web.Request, most: int) -> bytes:
    """The body of a request.

    Raises:
        InvalidArgument: it is broken, or has a list of prompts and is longer than `most` bytes.
        TooLong: it is longer than that with one prompt.
        DeadlineExceeded: it does not end in time.
    """
    length = request.content_length or 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            body = await (request.content.readany() if length > most else request.read())
    except TimeoutError as error:
        raise DeadlineExceeded(f"has not arrived within {BODY_SECONDS:g} seconds", field="body") from error
    except web.RequestPayloadError as error:
        raise InvalidArgument(str(error.args[0] if error.args else error), field="body") from error
    except web.HTTPRequestEntityTooLarge as error:
        raise InvalidArgument(f"is over the limit of {MAX_MESSAGE} bytes", field="body") from error
    length = max(length, len(body))
    if length > most and LIST.search(body, 0, most):
        raise InvalidArgument(
            f"{length} bytes are over the limit of {most} for all prompts of a list together", field="prompt"
        )
    if length > most:
        raise TooLong(f"{length} bytes are over the limit of {most}", field="body")
    return body


def _parsed(kind: type[GenerationRequest], body: bytes) -> GenerationRequest:
    """The request in a body of JSON. Raises InvalidArgument, which names the path of the first wrong field."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as invalid:
        error = invalid.errors(include_url=False, include_input=False)[0]
        # Pydantic's path also has names of alternatives, such as "list[int]".
        path = [str(at) for at in error["loc"] if isinstance(at, int) or (at.isidentifier() and at != "str")]
        message = error["msg"]
        if error["type"] == "extra_forbidden" or (error["type"] == "too_long" and not error["ctx"]["max_length"]):
            message = "is not supported"
        raise InvalidArgument(message, field=".".join(path) or "body") from None


@dataclass(frozen=True)
class _Answer:
    """The answer to one prompt."""

    response: GenerationResponse
    end: Finished
    choice: dict[str, Any] = field(default_factory=dict)
    """The whole choice, where the request is not streamed."""


async def _together(answers: Sequence[Coroutine[Any, Any, _Answer]]) -> list[_Answer]:
    """The answers to all prompts of a request, in order. The first error ends the others, and is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(answer) for answer in answers]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


async def _collect(response: GenerationResponse, events: EventStream) -> _Answer:
    """The whole answer to a prompt."""
    outputs: list[Output] = []
    finished = None
    while finished is None:
        more, finished = await events.take()
        outputs += more
    events.close()  # all is read: the time that the choice takes is not the caller's
    # In a thread: each log-probability has its token decoded.
    return _Answer(response, finished, await asyncio.to_thread(response.choice, outputs, finished))


async def _stream(stream: web.StreamResponse, response: GenerationResponse, events: EventStream) -> _Answer:
    """Sends a choice's chunks as server-sent events until its request has finished.

    The first comes with the first token: clients measure the time until then.
    """
    has_begun, finished = False, None
    while finished is None:
        outputs, finished = await events.take()
        if not has_begun:
            for chunk in response.begin():
                await _send(stream, chunk)
        has_begun = True
        if outputs:
            await _send(stream, response.part(outputs))
    await _send(stream, response.end(finished))
    return _Answer(response, finished)


async def _send(stream: web.StreamResponse, event: Mapping[str, Any]) -> None:
    await _write(stream, b"data: %b\n\n" % to_json(event).encode())


async def _write(stream: web.StreamResponse, data: bytes) -> None:
    try:
        await stream.write(data)
    except ConnectionError as error:  # before aiohttp has cancelled the call
        raise Cancelled("the caller went away") from error


def _response(result: web.StreamResponse | Status, fields: Mapping[str, str] = FIELDS) -> web.StreamResponse:
    return error_response(result, fields) if isinstance(result, Status) else result
