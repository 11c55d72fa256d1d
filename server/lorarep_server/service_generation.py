"""lorarep.v1.GenerationService."""

# ruff: noqa: N802

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from lorarep.v1 import generation_pb2, generation_pb2_grpc

from lorarep_runtime.errors import Exhausted, Unavailable
from lorarep_runtime.request import Event, Finished, Output
from lorarep_server import messages
from lorarep_server.desired import DesiredAdapters
from lorarep_server.errors import code_of
from lorarep_server.loads import AdapterLoad, Loads
from lorarep_server.metrics import Metrics
from lorarep_server.stream import EventStream

if TYPE_CHECKING:
    from lorarep_runtime.adapters.pool import AdapterInfo
    from lorarep_runtime.engine import Engine
    from lorarep_runtime.text import Tokenizer


@dataclass(frozen=True)
class Admitted:
    """A request that the engine has taken."""

    id: int
    prompt_tokens: int
    adapters: Sequence[AdapterInfo]
    tokenizer: Tokenizer


class GenerationService(generation_pb2_grpc.GenerationServiceServicer):
    """Requests on their way into the engine, and answers on their way out."""

    def __init__(
        self,
        engine: Callable[[], Engine],
        loads: Loads,
        desired: DesiredAdapters,
        metrics: Metrics,
        *,
        max_unread: int,
        patience: float,
    ) -> None:
        self._engine = engine
        self._loads = loads
        self._desired = desired
        self._metrics = metrics
        self._max_unread = max_unread
        self._patience = patience

    async def Generate(self, request: generation_pb2.GenerateRequest, context: Any) -> generation_pb2.GenerateResponse:
        outputs: list[Output] = []
        async with self._answer(request, context) as (admitted, events):
            finished = None
            while finished is None:
                more, finished = await events.take()
                outputs += more
        # In a thread: each log-probability has its token decoded.
        whole = await asyncio.to_thread(messages.chunk, outputs, admitted.tokenizer)
        end = messages.generation_finished(finished)
        return generation_pb2.GenerateResponse(
            text=whole.text,
            token_ids=whole.token_ids,
            logprobs=whole.logprobs,
            finish_reason=end.finish_reason,
            usage=end.usage,
            timings=end.timings,
            adapters=[messages.adapter_revision(info) for info in admitted.adapters],
        )

    async def GenerateStream(self, request: generation_pb2.GenerateStreamRequest, context: Any) -> None:
        # Written with `write`, not yielded: a cancellation then ends this very coroutine, and with it the request.
        async with self._answer(request.request, context) as (admitted, events):
            revisions = [messages.adapter_revision(info) for info in admitted.adapters]
            started = generation_pb2.GenerationStarted(adapters=revisions, prompt_tokens=admitted.prompt_tokens)
            await context.write(generation_pb2.GenerateStreamResponse(started=started))
            finished = None
            while finished is None:
                outputs, finished = await events.take()
                if outputs:
                    chunk = messages.chunk(outputs, admitted.tokenizer)
                    await context.write(generation_pb2.GenerateStreamResponse(chunk=chunk))
            end = messages.generation_finished(finished)
            await context.write(generation_pb2.GenerateStreamResponse(finished=end))

    async def Tokenize(self, request: generation_pb2.TokenizeRequest, context: Any) -> generation_pb2.TokenizeResponse:
        engine = self._engine()
        adapters = messages.adapter_weights(request.adapters)
        await self._load_absent(engine, adapters)

        def tokens() -> tuple[int, ...]:
            lease = engine.adapters.lease(adapters)
            try:
                return messages.prompt_tokens(request.prompt, lease.tokenizer)
            finally:
                lease.release()

        return generation_pb2.TokenizeResponse(token_ids=await asyncio.to_thread(tokens))

    @asynccontextmanager
    async def _answer(
        self, request: generation_pb2.GenerateRequest, context: Any
    ) -> AsyncIterator[tuple[Admitted, EventStream]]:
        """A request and its events. If it has not ended by itself when the context does, it is cancelled."""
        engine = self._engine()
        remaining = context.time_remaining()
        deadline = None if remaining is None else time.monotonic() + remaining
        events = EventStream(self._max_unread, self._patience)
        try:
            await self._load_absent(engine, messages.adapter_weights(request.adapters))
            admission = asyncio.ensure_future(asyncio.to_thread(_admit, engine, request, deadline, events.put))
            try:
                # Shielded: what is being admitted while its caller leaves has to be cancelled once it is.
                yield await asyncio.shield(admission), events
            finally:
                events.close()
                if events.end is None:
                    admission.add_done_callback(partial(_cancel, engine))
        except (Exception, asyncio.CancelledError) as error:
            cause = events.too_slow or error
            if not isinstance(events.end, Finished):
                self._metrics.failed(code_of(cause))
            raise cause from None
        finally:
            if isinstance(events.end, Finished):
                self._metrics.finished(events.end)

    async def _load_absent(self, engine: Engine, adapters: Sequence[tuple[str, float]]) -> None:
        """Has adapters found that are not at hand and can be, and waits for that."""
        pool = engine.adapters
        for name, _ in adapters:
            if await asyncio.to_thread(pool.is_at_hand, name):
                continue
            if await asyncio.to_thread(pool.__contains__, name):
                await self._loads.bring(pool, name)
            elif self._desired.get(name) is not None:
                if error := self._desired.error(name):
                    raise Unavailable(f"adapter: {name!r} is not loaded, and is tried again: {error}")
                await self._loads.load(pool, self._desired.load(name))
            elif "/" in name:
                repository, _, revision = name.partition("@")
                try:
                    await self._loads.load(pool, AdapterLoad(name, repository, revision or None))
                except Exhausted:
                    await self._loads.bring(pool, name)  # it waits in the queue for room on the device


def _admit(
    engine: Engine,
    request: generation_pb2.GenerateRequest,
    deadline: float | None,
    on_event: Callable[[Event], None],
) -> Admitted:
    lease = engine.adapters.lease(messages.adapter_weights(request.adapters), messages.stack_name(request))
    try:
        prompt = messages.prompt_tokens(request.prompt, lease.tokenizer)
        wanted = messages.runtime_request(request, prompt, deadline, engine.max_tokens)
        request_id = engine.submit(wanted, lease, on_event)
    except BaseException:
        lease.release()
        raise
    return Admitted(request_id, len(prompt), lease.adapters, lease.tokenizer)


def _cancel(engine: Engine, admission: asyncio.Future[Admitted]) -> None:
    if not admission.cancelled() and admission.exception() is None:
        engine.cancel(admission.result().id)
