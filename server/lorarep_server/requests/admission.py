"""Admission of calls: a limit, the translation of errors to statuses, one log line a call, and an orderly end.

Calls for answers are counted as requests, those too that are refused before they are one.

Health and reflection pass no admission.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

import grpc
from google.protobuf.message import DecodeError

from lorarep_runtime.errors import Exhausted, InvalidArgument, Unavailable
from lorarep_server.errors import Status, status_of
from lorarep_server.requests.message_bounds import MessageBounds, has_prompts
from lorarep_server.telemetry.metrics import Metrics

log = logging.getLogger(__name__)

T = TypeVar("T")

OWN_SERVICES = ("/lorarep.v1.", "/fmaas.")
FOR_ANSWERS = ("Generate", "GenerateStream")
"""Methods of both protocols whose calls are requests."""
LONG_MESSAGE = 64 << 10
"""Bytes of a request over which it is parsed in a thread."""


class Admission(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """The running calls of lorarep's and fmaas' services. Health and reflection are answered until the end."""

    def __init__(self, max_calls: int, bounds: Callable[[], MessageBounds], metrics: Metrics) -> None:
        """
        Args:
            max_calls: most concurrent calls; further calls are refused.
            bounds: gives the bounds of requests that have prompts.
            metrics: count calls for answers that fail before they are requests.
        """
        self._max_calls = max_calls
        self._bounds = bounds
        self._metrics = metrics
        self._tasks: set[asyncio.Task[Any]] = set()
        self._none_left = asyncio.Event()
        self._none_left.set()
        self._closed = self._ending = False

    def close(self) -> None:
        """Refuses new calls from now on. Running calls continue."""
        self._closed = True

    async def finished(self, grace: float) -> bool:
        """Waits until no call is running; False if some still are after `grace` seconds."""
        try:
            async with asyncio.timeout(grace):
                await self._none_left.wait()
        except TimeoutError:
            return False
        return True

    def end(self) -> None:
        """Ends all running calls with UNAVAILABLE."""
        self._ending = True
        for task in self._tasks:
            task.cancel()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or not method.startswith(OWN_SERVICES):
            return handler
        streams = handler.response_streaming
        for_answer = method.rpartition("/")[2] in FOR_ANSWERS
        inner = handler.unary_stream if streams else handler.unary_unary

        async def handle(data: bytes, context: Any) -> Any:
            if has_prompts(method):
                self._bounds().check(method, data)
            try:
                if len(data) > LONG_MESSAGE:
                    request = await asyncio.to_thread(handler.request_deserializer, data)
                else:
                    request = handler.request_deserializer(data)
            except DecodeError as error:
                raise InvalidArgument("the request is not a message of its type") from error
            return await inner(request, context)

        async def guarded(data: bytes, context: Any) -> Any:
            name = method.removeprefix("/lorarep.v1.").removeprefix("/")
            result = await self.guard(name, handle(data, context), for_answer=for_answer)
            if isinstance(result, Status):
                await context.abort(result.code, result.text, result.metadata)
            return result

        wrap: Any = grpc.unary_stream_rpc_method_handler if streams else grpc.unary_unary_rpc_method_handler
        # Requests arrive as bytes and are parsed above: gRPC's own parser would report malformed ones as UNKNOWN.
        return wrap(guarded, None, handler.response_serializer)

    async def guard(self, method: str, work: Coroutine[Any, Any, T], *, for_answer: bool = False) -> T | Status:
        """Runs a call's work in the current task, if it is admitted, and logs its outcome.

        Args:
            method: the name of the call in the log.
            for_answer: whether the call is a request, which is counted.

        Returns:
            The result of the work, or the status of its error.
        """
        started, code = time.monotonic(), "OK"
        task = asyncio.current_task()
        assert task is not None
        if for_answer:
            self._metrics.begin_call()
        try:
            self._admit(task)
            return await work
        except (KeyboardInterrupt, SystemExit, GeneratorExit):
            raise
        except BaseException as error:  # libraries in Rust panic with what is no Exception
            work.close()  # work that was not admitted has not started
            if isinstance(error, asyncio.CancelledError) and self._ending:
                status = status_of(Unavailable("the server has shut down"))
            else:
                status = status_of(error)
            code = status.code.name
            if for_answer:
                self._metrics.refused(status.code)
            return status
        finally:
            log.info("%s %s %.0f ms", method, code, 1000 * (time.monotonic() - started))
            self._leave(task)

    def _admit(self, task: asyncio.Task[Any]) -> None:
        if self._closed:
            raise Unavailable("the server is shutting down")
        if len(self._tasks) >= self._max_calls:
            raise Exhausted(f"{self._max_calls} calls are under way already", field="max_calls", retry_after=1.0)
        self._tasks.add(task)
        self._none_left.clear()

    def _leave(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not self._tasks:
            self._none_left.set()
