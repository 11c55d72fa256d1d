"""fmaas.GenerationService, the API of vllm-tgis-adapter.

A request becomes lorarep.v1's GenerateRequest, and is served, counted, refused and cancelled like one. An unsupported
field is refused by its name. `model_id` is ignored: it is meant for routers.
"""

# ruff: noqa: N802

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from copy import copy
from functools import partial
from typing import Any

from fmaas import generation_pb2 as pb
from fmaas import generation_pb2_grpc

from lorarep_runtime.errors import DeadlineExceeded, InvalidArgument, LorarepError
from lorarep_server.api import fmaas_messages
from lorarep_server.requests.frontend import Frontend, call_context
from lorarep_server.requests.message_bounds import ScoredPrompts


class FmaasService(generation_pb2_grpc.GenerationServiceServicer):
    """The RPCs of fmaas, over the frontend."""

    def __init__(self, frontend: Frontend) -> None:
        self._frontend = frontend

    async def Generate(self, request: pb.BatchedGenerationRequest, context: Any) -> pb.BatchedGenerationResponse:
        with _fmaas_field_names():
            count, most = len(request.requests), self._frontend.engine().config.scheduler.max_prompts
            if count > most:
                raise InvalidArgument(f"{count} are over the limit of {most}", field="requests")
            responses: list[list[pb.GenerationResponse]] = [[] for _ in request.requests]
            scored = ScoredPrompts()

            async def generate(text: str, parts: list[pb.GenerationResponse]) -> None:
                async def keep(part: pb.GenerationResponse) -> None:
                    parts.append(part)

                await self._generate(request, text, context, keep, scored)

            try:
                async with asyncio.TaskGroup() as tasks:
                    for one, parts in zip(request.requests, responses, strict=True):
                        tasks.create_task(generate(one.text, parts))
            except ExceptionGroup as errors:  # the first has ended the others
                raise errors.exceptions[0] from None
        return pb.BatchedGenerationResponse(responses=map(fmaas_messages.merged, responses))

    async def GenerateStream(self, request: pb.SingleGenerationRequest, context: Any) -> None:
        with _fmaas_field_names():
            await self._generate(request, request.request.text, context, context.write, ScoredPrompts())

    async def _generate(
        self,
        request: pb.BatchedGenerationRequest | pb.SingleGenerationRequest,
        text: str,
        context: Any,
        send: Callable[[pb.GenerationResponse], Awaitable[None]],
        scored: ScoredPrompts,
    ) -> None:
        """Sends the messages of one text's response. All prompts of the call are added to `scored`."""
        params, limit = request.params, self._frontend.engine().max_tokens
        fmaas_messages.check(params, limit)
        generate = fmaas_messages.to_generate(params, text, **await self._target(request))
        stopping, response = params.stopping, None
        begin: Callable[..., pb.GenerationResponse] | None = None
        try:
            async with self._frontend.generate(
                generate,
                *call_context(context),
                stopping.max_new_tokens or limit,
                longest_prompt=params.truncate_input_tokens or None,
                time_limit=stopping.time_limit_millis / 1000 or None,
            ) as (admitted, events):
                response = fmaas_messages.ResponseBuilder(params, admitted.tokenizer)
                if generate.HasField("prompt_logprobs"):
                    scored.add(len(admitted.prompt), generate.prompt_logprobs)
                    begin = partial(response.begin, generate, admitted.prompt)  # they come with the first token
                else:
                    await send(response.begin(generate, admitted.prompt))
                finished = None
                while finished is None:
                    outputs, finished = await events.take()
                    if begin is not None:
                        await send(await asyncio.to_thread(begin, outputs))
                        begin = None
                    await send(response.part(outputs, finished))
        except DeadlineExceeded as late:
            if response is None or not stopping.time_limit_millis or context.time_remaining() == 0:
                raise
            if begin is not None:
                await send(begin())
            await send(response.time_is_up(late.text))

    async def Tokenize(self, request: pb.BatchedTokenizeRequest, context: Any) -> pb.BatchedTokenizeResponse:
        with _fmaas_field_names():
            target = await self._target(request)
            work = partial(fmaas_messages.tokenized, request, max_tokens=self._frontend.engine().max_tokens)
            return await self._frontend.with_tokenizer(target.get("adapters", ()), work)

    async def ModelInfo(self, request: pb.ModelInfoRequest, context: Any) -> pb.ModelInfoResponse:
        most = self._frontend.engine().max_tokens
        return pb.ModelInfoResponse(
            model_kind=pb.ModelInfoResponse.DECODER_ONLY, max_sequence_length=most, max_new_tokens=most
        )

    async def _target(
        self, request: pb.BatchedGenerationRequest | pb.SingleGenerationRequest | pb.BatchedTokenizeRequest
    ) -> dict[str, Any]:
        name = request.adapter_id or request.prefix_id
        return await self._frontend.target(name) if name else {}


@contextmanager
def _fmaas_field_names() -> Iterator[None]:
    """Renames the fields of errors to fmaas' own names."""
    try:
        yield
    except LorarepError as error:
        own = copy(error)  # the error of a shared load is raised to other callers too
        if error.field is not None:
            own.field = fmaas_messages.FIELDS.get(error.field, error.field)
        raise own from error
