"""OpenAI's HTTP API: models, completions and chat completions. The status page is served on the same port.

Each answer becomes lorarep.v1's GenerateRequest, and is served, counted, refused and cancelled like one. An unsupported
field is refused by its name, unless it asks for nothing.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from aiohttp import web
from lorarep.v1 import generation_pb2

from lorarep_runtime.errors import Cancelled, InvalidArgument, NotFound
from lorarep_server.api.openai_bodies import Bodies
from lorarep_server.api.openai_choices import (
    Answer,
    SharedPrompt,
    Taken,
    best,
    collect,
    send,
    stream_choice,
    take_first,
    together,
    write,
)
from lorarep_server.api.openai_errors import FIELDS, bad_request, error_body, error_response, json_response, to_json
from lorarep_server.api.openai_requests import ChatRequest, CompletionRequest, GenerationRequest
from lorarep_server.api.openai_responses import ChatResponse, CompletionResponse, GenerationResponse, Identity
from lorarep_server.api.status_page import FILES, StatusPage
from lorarep_server.api.vllm_routes import VllmRoutes
from lorarep_server.auth import HTTP_ROLES, Role, TokenAuth
from lorarep_server.config import MAX_MESSAGE
from lorarep_server.errors import Status
from lorarep_server.hosts import HostCheck
from lorarep_server.loading.reconciler import Reconciler
from lorarep_server.requests.admission import Admission
from lorarep_server.requests.frontend import Frontend
from lorarep_server.requests.message_bounds import ScoredPrompts

log = logging.getLogger(__name__)

LAST_WRITE = 1.0
"""Seconds for an error to reach the caller of a stream."""
BASE_STACK = "base"
"""The name of the base's own order of layers, which is no reason for adapters to have that order."""
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
        bodies: Bodies,
        others: VllmRoutes,
    ) -> None:
        self._frontend = frontend
        self._reconciler = reconciler
        self._admission = admission
        self._token_auth = token_auth
        self._hosts = hosts
        self._page = page
        self._bodies = bodies
        self._others = others
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
        self._others.add_to(app)
        return app

    @web.middleware
    async def _checked(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """Refuses requests of other web pages, and without a valid token, even for unknown paths.

        The status page's own files and the probes need no token.
        """
        if self._hosts is not None and (other := self._hosts.refusal(request)) is not None:
            log.info("%r %s", request.path, other.code.name)
            return error_response(other)
        if self._token_auth is not None and request.path not in FILES:
            needed = HTTP_ROLES.get(request.path, Role.GENERATE)
            refusal = self._token_auth.refusal(request.headers.getall("Authorization", []), needed)
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
                "max_model_len": engine.max_tokens,
            }
            for name, root in roots.items()
        }

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        return await self._generate(request, CompletionRequest, CompletionResponse)

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        return await self._generate(request, ChatRequest, ChatResponse)

    async def _target(self, parsed: GenerationRequest) -> dict[str, Any]:
        """The adapters and the stack of a request, as fields of GenerateRequest."""
        target = await self._frontend.target(parsed.model)
        if not parsed.adapters:
            return target
        if "adapters" in target:
            raise InvalidArgument(f"{parsed.model!r} is no base and no stack; adapters has the others", field="model")
        named = [generation_pb2.AdapterRef(name=one.name, weight=one.weight) for one in parsed.adapters]
        return {"adapters": named} if parsed.model == BASE_STACK else {"adapters": named, **target}

    def _to_generates(
        self, parsed: GenerationRequest, target: Mapping[str, Any]
    ) -> list[generation_pb2.GenerateRequest]:
        """A request in lorarep.v1's terms for the first answer to each prompt.

        Raises:
            InvalidArgument: there are too many prompts or answers.
        """
        prompts, most = parsed.to_prompts(), self._frontend.engine().config.scheduler.max_prompts
        if len(prompts) > most:
            raise InvalidArgument(f"{len(prompts)} prompts are over the limit of {most}", field="prompt")
        if (count := len(prompts) * parsed.choices) > most:
            raise InvalidArgument(
                f"{count} answers are over the limit of {most}", field="n" if parsed.choices == parsed.n else "best_of"
            )
        return [parsed.to_generate(prompt, **target) for prompt in prompts]

    async def _generate(
        self, request: web.Request, kind: type[GenerationRequest], builder: type[GenerationResponse[Any]]
    ) -> web.StreamResponse:
        stream = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
        fields = dict(FIELDS)

        async def work() -> web.StreamResponse:
            parsed = await self._bodies.read(kind, request)
            fields["max_new_tokens"] = fields["prompt and max_new_tokens"] = parsed.length()[0]
            fields["prompt"] = parsed.prompt_field
            fields["logprobs"] = parsed.logprobs_field
            if parsed.prompt_logprobs is None:
                fields["prompt_logprobs"] = parsed.logprobs_field  # those of an echo
            fields.update(parsed.form_fields())
            if parsed.adapters:
                fields["adapter"] = fields["adapters"] = fields["repository"] = "adapters"
            target = await self._target(parsed)
            generates = await asyncio.to_thread(self._to_generates, parsed, target)
            identity, all_admitted = Identity(), asyncio.Barrier(len(generates) * parsed.choices)
            scored, prompts = ScoredPrompts(), [SharedPrompt() for _ in generates]

            async def answer(index: int) -> Answer:
                number, choice = divmod(index, parsed.choices)
                generate, shared = generates[number], prompts[number]
                if choice:
                    await shared.is_computed.wait()
                    generate = parsed.to_generate(shared.tokens, choice, **target)
                async with self._frontend.generate(
                    generate, request.headers, new_tokens=parsed.unset_tokens, longest_prompt=parsed.longest_prompt
                ) as (admitted, events):
                    text = generates[number].prompt.text
                    response = builder(parsed, admitted.tokenizer, identity, index, admitted.prompt, text)
                    first: Taken = [], None
                    if not choice:
                        scored.add(len(admitted.prompt), parsed.to_prompt_logprobs(), parsed.n)
                        if parsed.choices > 1:
                            first = await take_first(events, shared, admitted.prompt)
                    response.prompt_logprobs = shared.logprobs
                    response.parse_calls(self._frontend.tool_call_parser)
                    if not parsed.stream:
                        return await collect(response, events, first)
                    # Until all are admitted the response may be an error.
                    if await all_admitted.wait() == 0:
                        await stream.prepare(request)
                    await all_admitted.wait()
                    return await stream_choice(stream, response, events, first)

            answers = await together([answer(index) for index in range(len(generates) * parsed.choices)])
            response, ends = answers[0].response, [each.end for each in answers]
            if not parsed.stream:
                whole = response.whole(list(best(parsed, answers)), ends)
                # In a thread: log-probabilities of prompts are megabytes.
                return web.json_response(text=await asyncio.to_thread(to_json, whole))
            for chunk in response.usage(ends):
                await send(stream, chunk)
            await write(stream, b"data: [DONE]\n\n")
            return stream

        result = await self._admission.guard(f"POST {request.path}", work(), for_answer=True)
        if not isinstance(result, Status) or not stream.prepared:
            return _response(result, fields)
        try:
            async with asyncio.timeout(LAST_WRITE):
                await send(stream, error_body(result, fields))
        except (TimeoutError, Cancelled):  # the caller has left, or does not read
            if request.transport is not None:
                request.transport.abort()
        return stream


def _response(result: web.StreamResponse | Status, fields: Mapping[str, str] = FIELDS) -> web.StreamResponse:
    return error_response(result, fields) if isinstance(result, Status) else result
