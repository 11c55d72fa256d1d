"""fmaas.GenerationService, which vllm-tgis-adapter serves, over the same way to the engine.

A request becomes lorarep.v1's GenerateRequest and is answered, counted, refused and cancelled as that is. A field that
cannot be honoured is refused by its name, but for `model_id`, which is there for routers and read by no server.
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
from lorarep_server.requests.frontend import Frontend, of_call


class FmaasService(generation_pb2_grpc.GenerationServiceServicer):
    """Answers as fmaas' messages."""

    def __init__(self, answers: Frontend) -> None:
        self._answers = answers

    async def Generate(self, request: pb.BatchedGenerationRequest, context: Any) -> pb.BatchedGenerationResponse:
        with _own_names():
            most = self._answers.engine().config.scheduler.max_queued
            if len(request.requests) > most:
                raise InvalidArgument(f"{len(request.requests)} are over the limit of {most}", field="requests")
            answers: list[list[pb.GenerationResponse]] = [[] for _ in request.requests]

            async def answer(text: str, parts: list[pb.GenerationResponse]) -> None:
                async def keep(part: pb.GenerationResponse) -> None:
                    parts.append(part)

                await self._answer(request, text, context, keep)

            try:
                async with asyncio.TaskGroup() as tasks:
                    for wanted, parts in zip(request.requests, answers, strict=True):
                        tasks.create_task(answer(wanted.text, parts))
            except ExceptionGroup as errors:  # the first has ended the others
                raise errors.exceptions[0] from None
        return pb.BatchedGenerationResponse(responses=map(fmaas_messages.whole, answers))

    async def GenerateStream(self, request: pb.SingleGenerationRequest, context: Any) -> None:
        with _own_names():
            await self._answer(request, request.request.text, context, context.write)

    async def _answer(
        self,
        request: pb.BatchedGenerationRequest | pb.SingleGenerationRequest,
        text: str,
        context: Any,
        send: Callable[[pb.GenerationResponse], Awaitable[None]],
    ) -> None:
        """Sends one text's answer."""
        params, limit = request.params, self._answers.engine().max_tokens
        fmaas_messages.check(params, limit)
        generate = fmaas_messages.to_generate(params, text, **await self._target(request))
        stopping, answer = params.stopping, None
        try:
            async with self._answers.answer(
                generate,
                *of_call(context),
                stopping.max_new_tokens or limit,
                longest_prompt=params.truncate_input_tokens or None,
                time_limit=stopping.time_limit_millis / 1000 or None,
            ) as (admitted, events):
                answer = fmaas_messages.Answer(params, admitted.tokenizer)
                await send(answer.begin(generate, admitted.prompt))
                finished = None
                while finished is None:
                    outputs, finished = await events.take()
                    await send(answer.part(outputs, finished))
        except DeadlineExceeded:
            if answer is None or not stopping.time_limit_millis or context.time_remaining() == 0:
                raise
            await send(answer.time_is_up())

    async def Tokenize(self, request: pb.BatchedTokenizeRequest, context: Any) -> pb.BatchedTokenizeResponse:
        with _own_names():
            target = await self._target(request)
            work = partial(fmaas_messages.tokenized, request)
            return await self._answers.with_tokenizer(target.get("adapters", ()), work)

    async def ModelInfo(self, request: pb.ModelInfoRequest, context: Any) -> pb.ModelInfoResponse:
        most = self._answers.engine().max_tokens
        return pb.ModelInfoResponse(
            model_kind=pb.ModelInfoResponse.DECODER_ONLY, max_sequence_length=most, max_new_tokens=most
        )

    async def _target(
        self, request: pb.BatchedGenerationRequest | pb.SingleGenerationRequest | pb.BatchedTokenizeRequest
    ) -> dict[str, Any]:
        name = request.adapter_id or request.prefix_id
        return await self._answers.target(name) if name else {}


@contextmanager
def _own_names() -> Iterator[None]:
    """Errors name fields as fmaas does."""
    try:
        yield
    except LorarepError as error:
        own = copy(error)  # others may wait for the same load
        if error.field is not None:
            own.field = fmaas_messages.FIELDS.get(error.field, error.field)
        raise own from error
