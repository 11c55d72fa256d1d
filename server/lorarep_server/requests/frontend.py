"""The frontend: requests of every protocol enter the engine here, and their events leave it here."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from lorarep.v1 import generation_pb2

from lorarep_runtime.errors import Exhausted, Unavailable
from lorarep_runtime.failpoints import failpoint
from lorarep_runtime.request import Event, Finished, Stopping
from lorarep_server.errors import code_of
from lorarep_server.loading.load_queue import LoadQueue, LoadRequest
from lorarep_server.loading.reconciler import Reconciler
from lorarep_server.requests import messages
from lorarep_server.requests.event_stream import EventStream
from lorarep_server.requests.workers import AdmissionThreads, ended
from lorarep_server.telemetry.metrics import Metrics
from lorarep_server.telemetry.tracing import TracedRequest, Traces

if TYPE_CHECKING:
    from lorarep_runtime.adapters.registry import AdapterRegistry
    from lorarep_runtime.adapters.revision import AdapterInfo
    from lorarep_runtime.engine.engine import Engine
    from lorarep_runtime.text.tokenizer import Tokenizer

T = TypeVar("T")


@dataclass(frozen=True)
class Admitted:
    """A request that the engine has accepted."""

    id: int
    prompt: Sequence[int]
    submitted: int
    """Time of submission, by `time.monotonic_ns()`."""
    adapters: Sequence[AdapterInfo]
    tokenizer: Tokenizer


class Frontend:
    """The only way to the engine: it loads absent adapters, submits, counts, and cancels abandoned requests."""

    def __init__(
        self,
        engine: Callable[[], Engine],
        load_queue: LoadQueue,
        reconciler: Reconciler,
        metrics: Metrics,
        traces: Traces,
        *,
        max_unread: int,
        patience: float,
        tool_call_parser: str | None = None,
    ) -> None:
        """
        Args:
            engine: gives the engine, or raises Unavailable until it is loaded.
            load_queue: loads adapters that requests name.
            reconciler: knows the adapters file.
            max_unread, patience: limits of slow readers, as in `EventStream`.
            tool_call_parser: the format of calls of tools, one of `FORMATS`; None is what the chat template tells.
        """
        self.engine = engine
        """Gives the engine. Raises Unavailable until it is loaded."""
        self._load_queue = load_queue
        self._reconciler = reconciler
        self._metrics = metrics
        self._traces = traces
        self._threads = AdmissionThreads()
        self._max_unread = max_unread
        self._patience = patience
        self.tool_call_parser = tool_call_parser

    @asynccontextmanager
    async def generate(
        self,
        request: generation_pb2.GenerateRequest,
        metadata: Mapping[str, str],
        seconds: float | None = None,
        new_tokens: int = Stopping.max_new_tokens,
        *,
        longest_prompt: int | None = None,
        time_limit: float | None = None,
    ) -> AsyncIterator[tuple[Admitted, EventStream]]:
        """A context of one request and its events. A request that has not ended when the context does is cancelled.

        Args:
            metadata: the metadata or the headers of the call.
            seconds: time until the request's deadline.
            new_tokens: most tokens of the answer where the request sets no limit; the prompt may leave fewer.
            longest_prompt: most tokens of a text; longer texts are cut as in `Tokenizer.encode`.
            time_limit: seconds until another deadline, counted from the time when the adapters are resident.

        Raises:
            LorarepError: the request is refused, or ended with this error.
        """
        engine = self.engine()
        engine.adapters.check_count(len(request.adapters))
        deadline = None if seconds is None else time.monotonic() + seconds
        events = EventStream(self._max_unread, self._patience)
        names = ",".join(ref.name for ref in request.adapters)
        traced = TracedRequest(metadata, names or request.stack or engine.base.repository)
        try:
            # 1. Load absent adapters: for a request that would be refused in any case, none.
            if request.adapters:
                await self._threads.run(check, engine, request, new_tokens)
                await self._load_absent(engine, messages.adapter_weights(request.adapters))
            if time_limit is not None:
                deadline = min(time.monotonic() + time_limit, math.inf if deadline is None else deadline)
            # 2. Submit the request in a thread, since tokenization takes a while.
            submission = await self._threads.begin(
                submit, engine, request, deadline, events.put, new_tokens, longest_prompt, self.tool_call_parser
            )
            try:
                # A request that is submitted while its caller leaves has to be cancelled afterwards.
                admitted = await ended(submission)
                traced.submitted, traced.prompt_tokens = admitted.submitted, len(admitted.prompt)
                # 3. The caller reads the events.
                yield admitted, events
            finally:
                # 4. Cancel the request if it has not ended.
                events.close()
                if events.end is None:
                    submission.add_done_callback(partial(_cancel, engine))
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

    def admission_turns(self) -> int:
        """Counts the work of admission's threads that has begun or ended."""
        return self._threads.turns

    async def pass_admission(self) -> None:
        """Goes the way of a request through the threads of admission, and does nothing there."""
        await self._threads.run(int)

    async def target(self, model: str) -> dict[str, Any]:
        """The adapters or the stack of a model's name, as fields of GenerateRequest.

        A name stands for the base, an adapter, a stack, or a repository, in this order.
        """
        engine = self.engine()
        if model == engine.base.repository:
            return {}
        is_adapter = self._reconciler.get(model) is not None or await asyncio.to_thread(
            engine.adapters.__contains__, model
        )
        if not is_adapter and model in engine.stacks:
            return {"stack": model}
        return {"adapters": [generation_pb2.AdapterRef(name=model)]}

    async def with_tokenizer(self, adapters: Sequence[generation_pb2.AdapterRef], work: Callable[[Tokenizer], T]) -> T:
        """Runs `work` in a thread with the tokenizer of requests with these adapters, and returns its result.

        No adapter is brought to the device for it.
        """
        registry = self.engine().adapters
        registry.check_count(len(adapters))
        weights = messages.adapter_weights(adapters)
        registry.check_lease(weights)
        for name, _ in weights:
            absent = self._reconciler.get(name) is not None and not await asyncio.to_thread(registry.__contains__, name)
            if absent:
                await self._load_entry(registry, name)
        if all([await asyncio.to_thread(registry.can_lease_at_once, name) for name, _ in weights]):
            return await self._threads.run(lambda: work(registry.tokenizer(weights)))
        return await self._threads.run(work, await self._load_queue.tokenizer(registry, weights))

    async def _load_absent(self, engine: Engine, adapters: Sequence[tuple[str, float]]) -> None:
        """Loads those adapters of a request that are not resident and may be loaded. Waits for the loads."""
        registry = engine.adapters
        for name, _ in adapters:
            if await asyncio.to_thread(registry.can_lease_at_once, name):
                continue
            if await asyncio.to_thread(registry.__contains__, name):
                await self._load_queue.bring(registry, name)
            elif self._reconciler.get(name) is not None:
                await self._load_entry(registry, name)
            elif "/" in name:
                repository, _, revision = name.partition("@")
                try:
                    await self._load_queue.load(registry, LoadRequest(name, repository, revision or None))
                except Exhausted:
                    await self._load_queue.bring(registry, name)  # the request waits in the queue for device memory

    async def _load_entry(self, registry: AdapterRegistry, name: str) -> None:
        """Waits for the load of an entry of the adapters file. Raises Unavailable if its last load failed."""
        if error := self._reconciler.error(name):
            raise Unavailable(f"{name!r} is not loaded, and is tried again: {error}", field="adapter")
        await self._load_queue.load(registry, self._reconciler.load_request(name))


def call_context(context: Any) -> tuple[dict[str, str], float | None]:
    """The metadata of a gRPC call, and the seconds until its deadline; None if it has none."""
    return dict(context.invocation_metadata()), context.time_remaining()


def check(engine: Engine, request: generation_pb2.GenerateRequest, new_tokens: int = Stopping.max_new_tokens) -> None:
    """Refuses a request that `submit` would refuse whatever its adapters are. Nothing is loaded or tokenized for it.

    Raises:
        LorarepError: as `AdapterRegistry.check_lease` and `Engine.check`.
    """
    engine.adapters.check_lease(messages.adapter_weights(request.adapters), messages.stack_name(request))
    prompt = messages.any_prompt(request.prompt, engine.max_tokens)
    form, words = messages.structured_output(request), messages.bad_words(request.sampling)
    engine.check(messages.runtime_request(request, prompt, None, engine.max_tokens, new_tokens, form, words))


def submit(
    engine: Engine,
    request: generation_pb2.GenerateRequest,
    deadline: float | None,
    on_event: Callable[[Event], None],
    new_tokens: int = Stopping.max_new_tokens,
    longest_prompt: int | None = None,
    tool_call_parser: str | None = None,
) -> Admitted:
    """Tokenizes a request and submits it to the engine. Blocks.

    Raises:
        LorarepError: as `AdapterRegistry.lease`, the tokenizer and `Engine.submit`.
    """
    failpoint("admission")
    lease = engine.adapters.lease(messages.adapter_weights(request.adapters), messages.stack_name(request))
    try:
        prompt = messages.prompt_tokens(request.prompt, lease.tokenizer, engine.max_tokens, longest_prompt)
        longest = engine.longest(len(lease.stack))
        form = messages.structured_output(request, lease.tokenizer, tool_call_parser)
        words = messages.bad_words(request.sampling, lease.tokenizer)
        runtime_request = messages.runtime_request(request, prompt, deadline, longest, new_tokens, form, words)
        submitted = time.monotonic_ns()
        request_id = engine.submit(runtime_request, lease, on_event)
    except BaseException:
        lease.release()
        raise
    return Admitted(request_id, prompt, submitted, lease.adapters, lease.tokenizer)


def _cancel(engine: Engine, submission: asyncio.Future[Admitted]) -> None:
    if not submission.cancelled() and submission.exception() is None:
        engine.cancel(submission.result().id)
