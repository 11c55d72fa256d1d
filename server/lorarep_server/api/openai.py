"""OpenAI's HTTP API over the same way to the engine: models, completions, chat completions; beside it, the page.

A request becomes lorarep.v1's GenerateRequest and is answered, counted, refused and cancelled as that is. A field that
cannot be honoured is refused by its name; one that is null, or says what is done anyway, is none.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import ssl
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from grpc import StatusCode
from pydantic import ValidationError

from lorarep_runtime.errors import Cancelled, InvalidArgument, NotFound
from lorarep_runtime.request import Output
from lorarep_server.api.openai_messages import ChatRequest, CompletionRequest, GenerationRequest
from lorarep_server.api.status_page import FILES, StatusPage
from lorarep_server.auth import Role, TokenAuth
from lorarep_server.errors import RETRY_HINT, Status
from lorarep_server.loading.reconciler import Reconciler
from lorarep_server.requests.admission import Admission
from lorarep_server.requests.frontend import Frontend

log = logging.getLogger(__name__)

HTTP: Mapping[StatusCode, tuple[int, str, str | None]] = {
    StatusCode.INVALID_ARGUMENT: (400, "invalid_request_error", None),
    StatusCode.FAILED_PRECONDITION: (400, "invalid_request_error", None),
    StatusCode.UNAUTHENTICATED: (401, "invalid_request_error", "invalid_api_key"),
    StatusCode.PERMISSION_DENIED: (403, "permission_error", None),
    StatusCode.NOT_FOUND: (404, "invalid_request_error", "model_not_found"),
    StatusCode.ALREADY_EXISTS: (409, "invalid_request_error", None),
    StatusCode.RESOURCE_EXHAUSTED: (429, "rate_limit_error", None),
    StatusCode.CANCELLED: (499, "server_error", None),
    StatusCode.UNAVAILABLE: (503, "server_error", None),
    StatusCode.DEADLINE_EXCEEDED: (504, "server_error", None),
}
"""HTTP's status, and OpenAI's type and code of the error. Others are 500."""

FIELDS: Mapping[str, str] = {
    "adapter": "model",
    "adapters": "model",
    "repository": "model",
    "stack": "model",
    "prompt.chat": "messages",
    "min_new_tokens": "min_tokens",
}
"""What OpenAI calls the fields that messages of errors begin with."""

MAX_BODY = 16 << 20
"""Bytes, as of gRPC's messages."""
LAST_WRITE = 1.0
"""Seconds for an error to reach a caller that is being streamed to."""
OWNER = "lorarep"


class OpenAI:
    """The API, to be served on a port of its own. For the event loop's thread."""

    def __init__(
        self, answers: Frontend, desired: Reconciler, calls: Admission, access: TokenAuth | None, page: StatusPage
    ) -> None:
        self._answers = answers
        self._desired = desired
        self._calls = calls
        self._access = access
        self._page = page
        self._created = int(time.time())

    async def serve(self, address: str, tls: ssl.SSLContext | None, patience: float) -> tuple[web.AppRunner, int]:
        """Listens at HOST:PORT; what has to be cleaned up in the end, and the port.

        Args:
            patience: seconds for calls that are under way at the end.

        Raises:
            InvalidArgument: it cannot.
        """
        app = web.Application(middlewares=[self._checked], client_max_size=MAX_BODY)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/v1/models/{model:.+}", self._model)
        app.router.add_post("/v1/completions", self._completions)
        app.router.add_post("/v1/chat/completions", self._chat)
        for path in FILES:
            app.router.add_get(path, self._page.file)
        app.router.add_get("/status", self._status)
        logging.getLogger("aiohttp.server").addFilter(_is_ours)
        # A caller that leaves cancels its call.
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=patience, access_log=None)
        await runner.setup()
        host, _, port = address.rpartition(":")
        try:
            await web.TCPSite(runner, host.strip("[]") or None, int(port), ssl_context=tls).start()
        except (OSError, ValueError, OverflowError) as error:
            await runner.cleanup()
            raise InvalidArgument(f"cannot serve at {address!r}: {error}", field="openai_listen") from error
        return runner, int(runner.addresses[0][1])

    @web.middleware
    async def _checked(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """Nothing is told without a token, not even what there is not, but the page that asks for one."""
        if self._access is not None and request.path not in FILES:
            refusal = self._access.refusal(request.headers.getall("Authorization", []), Role.GENERATE)
            if refusal is not None:
                log.info("%r %s", request.path, refusal.code.name)
                return _refusal(refusal)
        try:
            return await handler(request)
        except web.RequestPayloadError as error:
            told = f"body: {error.args[0] if error.args else error}"
            return web.json_response(_error(told, "invalid_request_error"), status=400)
        except web.HTTPException as error:  # no such path or method, or too long a body
            told = f"{request.method} {request.path}: {error.reason}"
            return web.json_response(_error(told, "invalid_request_error"), status=error.status)

    async def _status(self, request: web.Request) -> web.StreamResponse:
        status = await self._page.status()
        if isinstance(status, Status):
            return _refusal(status)
        return web.json_response(status, headers={"Cache-Control": "no-store"})

    async def _models(self, request: web.Request) -> web.StreamResponse:
        async def work() -> web.StreamResponse:
            return web.json_response({"object": "list", "data": list((await self._all_models()).values())})

        return _answer(await self._calls.guard("GET /v1/models", work()))

    async def _model(self, request: web.Request) -> web.StreamResponse:
        async def work() -> web.StreamResponse:
            models, name = await self._all_models(), request.match_info["model"]
            if name not in models:
                raise NotFound(f"{name!r} is none of those served", field="model")
            return web.json_response(models[name])

        return _answer(await self._calls.guard("GET /v1/models/", work()))

    async def _all_models(self) -> dict[str, dict[str, Any]]:
        """The base, stacks, and adapters that requests need not wait for or soon will not, by name."""
        engine = self._answers.engine()
        base = engine.base.repository
        adapters = {name: entry.repository for name, entry in self._desired.all().items()}
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

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        return await self._generate(request, CompletionRequest)

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        return await self._generate(request, ChatRequest)

    async def _generate(self, request: web.Request, kind: type[GenerationRequest]) -> web.StreamResponse:
        body = await request.read()  # before it is a call under way, however slowly it comes
        stream = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
        fields = dict(FIELDS)

        async def work() -> web.StreamResponse:
            if request.content_type != "application/json":  # which no web page sends elsewhere unasked
                raise InvalidArgument(
                    f"is {request.content_type!r} and has to be application/json", field="content-type"
                )
            wanted = _parsed(kind, body)
            fields["max_new_tokens"] = fields["prompt and max_new_tokens"] = wanted.length()[0]
            fields["logprobs"] = wanted.logprobs_field
            generate = wanted.to_generate(**await self._answers.target(wanted.model))
            async with self._answers.answer(generate, request.headers, new_tokens=wanted.unset_tokens) as (
                admitted,
                events,
            ):
                answer = wanted.answer(admitted.tokenizer)
                if wanted.stream:
                    await stream.prepare(request)
                    for part in answer.begin():
                        await _send(stream, part)
                outputs: list[Output] = []
                finished = None
                while finished is None:
                    more, finished = await events.take()
                    if not wanted.stream:
                        outputs += more
                    elif more:
                        await _send(stream, answer.part(more))
                if wanted.stream:
                    for part in answer.end(finished):
                        await _send(stream, part)
                    await _write(stream, b"data: [DONE]\n\n")
                    return stream
            # In a thread: each log-probability has its token decoded.
            return web.json_response(await asyncio.to_thread(answer.whole, outputs, finished))

        result = await self._calls.guard(f"POST {request.path}", work())
        if not isinstance(result, Status) or not stream.prepared:
            return _answer(result, fields)
        try:
            async with asyncio.timeout(LAST_WRITE):
                await _send(stream, _body(result, fields))
        except (TimeoutError, Cancelled):  # it has left, or does not read
            if request.transport is not None:
                request.transport.abort()
        return stream


def _is_ours(record: logging.LogRecord) -> bool:
    """Not that bytes are no HTTP, or not what their encoding says, which would be in the log as they came."""
    return not (record.exc_info and isinstance(record.exc_info[1], HttpProcessingError | web.RequestPayloadError))


def _parsed(kind: type[GenerationRequest], body: bytes) -> GenerationRequest:
    try:
        return kind.model_validate_json(body)
    except ValidationError as invalid:
        error = invalid.errors(include_url=False, include_input=False)[0]
        # Beside fields and places in lists there are names of alternatives, such as "list[int]".
        path = [str(at) for at in error["loc"] if isinstance(at, int) or (at.isidentifier() and at != "str")]
        told = "is not supported" if error["type"] == "extra_forbidden" else error["msg"]
        raise InvalidArgument(told, field=".".join(path) or "body") from None


async def _send(stream: web.StreamResponse, event: Mapping[str, Any]) -> None:
    await _write(stream, b"data: %b\n\n" % json.dumps(event).encode())


async def _write(stream: web.StreamResponse, data: bytes) -> None:
    try:
        await stream.write(data)
    except ConnectionError as error:  # before aiohttp has cancelled the call
        raise Cancelled("the caller went away") from error


def _answer(result: web.StreamResponse | Status, fields: Mapping[str, str] = FIELDS) -> web.StreamResponse:
    return _refusal(result, fields) if isinstance(result, Status) else result


def _refusal(status: Status, fields: Mapping[str, str] = FIELDS) -> web.Response:
    headers = {}
    if milliseconds := dict(status.metadata).get(RETRY_HINT):
        headers = {"Retry-After": str(math.ceil(int(milliseconds) / 1000)), "Retry-After-Ms": milliseconds}
    if status.code is StatusCode.UNAUTHENTICATED:
        headers["WWW-Authenticate"] = "Bearer"
    code, *_ = HTTP.get(status.code, (500,))
    return web.json_response(_body(status, fields), status=code, headers=headers)


def _body(status: Status, fields: Mapping[str, str]) -> dict[str, Any]:
    """An error as OpenAI's; the field that its message begins with under the name that the caller knows."""
    _, kind, code = HTTP.get(status.code, (500, "server_error", None))
    told = status.named(fields)
    return _error(told.text, kind, told.field, code)


def _error(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
