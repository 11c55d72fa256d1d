"""Requests on their way into the engine and the events of their answers, whichever protocol they came by."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from lorarep.v1 import generation_pb2

from lorarep_runtime.errors import Exhausted, Unavailable
from lorarep_runtime.request import Event, Finished, Stopping
from lorarep_server.errors import code_of
from lorarep_server.loading.load_queue import LoadQueue, LoadRequest
from lorarep_server.loading.reconciler import Reconciler
from lorarep_server.requests import messages
from lorarep_server.requests.event_stream import EventStream
from lorarep_server.telemetry.metrics import Metrics
from lorarep_server.telemetry.tracing import Traced, Traces

if TYPE_CHECKING:
    from lorarep_runtime.adapters.registry import AdapterInfo
    from lorarep_runtime.engine.engine import Engine
    from lorarep_runtime.text.tokenizer import Tokenizer

T = TypeVar("T")


@dataclass(frozen=True)
class Admitted:
    """A request that the engine has taken."""

    id: int
    prompt: Sequence[int]
    submitted: int
    """`time.monotonic_ns()`."""
    adapters: Sequence[AdapterInfo]
    tokenizer: Tokenizer


class Frontend:
    """The one way to the engine: has adapters loaded, admits, counts, and cancels what nobody waits for any more."""

    def __init__(
        self,
        engine: Callable[[], Engine],
        loads: LoadQueue,
        desired: Reconciler,
        metrics: Metrics,
        traces: Traces,
        *,
        max_unread: int,
        patience: float,
    ) -> None:
        self.engine = engine
        """Raises Unavailable until it is loaded."""
        self._loads = loads
        self._desired = desired
        self._metrics = metrics
        self._traces = traces
        self._max_unread = max_unread
        self._patience = patience

    @asynccontextmanager
    async def answer(
        self,
        request: generation_pb2.GenerateRequest,
        metadata: Mapping[str, str],
        seconds: float | None = None,
        new_tokens: int = Stopping.max_new_tokens,
        *,
        longest_prompt: int | None = None,
        time_limit: float | None = None,
    ) -> AsyncIterator[tuple[Admitted, EventStream]]:
        """A request and its events. If it has not ended by itself when the context does, it is cancelled.

        Args:
            metadata: the call's, or its headers.
            seconds: until its deadline.
            new_tokens: most tokens of the answer if the request does not say, or what the prompt leaves.
            longest_prompt: tokens to which a text is cut, as `Tokenizer.encode` does.
            time_limit: seconds until a deadline too, but from when its adapters are at hand.
        """
        engine = self.engine()
        deadline = None if seconds is None else time.monotonic() + seconds
        events = EventStream(self._max_unread, self._patience)
        names = ",".join(ref.name for ref in request.adapters)
        traced = Traced(metadata, names or request.stack or engine.base.repository)
        try:
            await self._load_absent(engine, messages.adapter_weights(request.adapters))
            if time_limit is not None:
                deadline = min(time.monotonic() + time_limit, math.inf if deadline is None else deadline)
            work = asyncio.to_thread(admit, engine, request, deadline, events.put, new_tokens, longest_prompt)
            admission = asyncio.ensure_future(work)
            try:
                # Shielded: what is being admitted while its caller leaves has to be cancelled once it is.
                admitted = await asyncio.shield(admission)
                traced.submitted, traced.prompt_tokens = admitted.submitted, len(admitted.prompt)
                yield admitted, events
            finally:
                events.close()
                if events.end is None:
                    admission.add_done_callback(partial(_cancel, engine))
        except (Exception, asyncio.CancelledError) as error:
            cause = events.too_slow or error
            if not isinstance(events.end, Finished):
                self._metrics.failed(code_of(cause))
                self._traces.end(traced, cause)
            raise cause from None
        finally:
            if isinstance(events.end, Finished):
                self._metrics.finished(events.end)
                self._traces.end(traced, events.end)

    async def target(self, model: str) -> dict[str, Any]:
        """A request's adapters or stack for a name: the base, an adapter, a stack, or a repository, in this order."""
        engine = self.engine()
        if model == engine.base.repository:
            return {}
        has_name = self._desired.get(model) is not None or await asyncio.to_thread(engine.adapters.__contains__, model)
        if not has_name and model in engine.stacks:
            return {"stack": model}
        return {"adapters": [generation_pb2.AdapterRef(name=model)]}

    async def with_tokenizer(self, adapters: Iterable[generation_pb2.AdapterRef], work: Callable[[Tokenizer], T]) -> T:
        """What `work` makes, in a thread, with the tokenizer of requests with these adapters."""
        engine, weights = self.engine(), messages.adapter_weights(adapters)
        await self._load_absent(engine, weights)

        def leased() -> T:
            lease = engine.adapters.lease(weights)
            try:
                return work(lease.tokenizer)
            finally:
                lease.release()

        return await asyncio.to_thread(leased)

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
                    raise Unavailable(f"{name!r} is not loaded, and is tried again: {error}", field="adapter")
                await self._loads.load(pool, self._desired.load(name))
            elif "/" in name:
                repository, _, revision = name.partition("@")
                try:
                    await self._loads.load(pool, LoadRequest(name, repository, revision or None))
                except Exhausted:
                    await self._loads.bring(pool, name)  # it waits in the queue for room on the device


def of_call(context: Any) -> tuple[dict[str, str], float | None]:
    """Metadata of a gRPC call, and seconds until its deadline."""
    return dict(context.invocation_metadata()), context.time_remaining()


def admit(
    engine: Engine,
    request: generation_pb2.GenerateRequest,
    deadline: float | None,
    on_event: Callable[[Event], None],
    new_tokens: int = Stopping.max_new_tokens,
    longest_prompt: int | None = None,
) -> Admitted:
    """Has the engine take a request; blocks. Raises as `AdapterRegistry.lease`, `Engine.submit` and the tokenizer."""
    lease = engine.adapters.lease(messages.adapter_weights(request.adapters), messages.stack_name(request))
    try:
        prompt = messages.prompt_tokens(request.prompt, lease.tokenizer, longest_prompt)
        longest = engine.longest(len(lease.stack))
        wanted = messages.runtime_request(request, prompt, deadline, longest, new_tokens)
        submitted = time.monotonic_ns()
        request_id = engine.submit(wanted, lease, on_event)
    except BaseException:
        lease.release()
        raise
    return Admitted(request_id, prompt, submitted, lease.adapters, lease.tokenizer)


def _cancel(engine: Engine, admission: asyncio.Future[Admitted]) -> None:
    if not admission.cancelled() and admission.exception() is None:
        engine.cancel(admission.result().id)
