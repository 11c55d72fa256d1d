"""lorarep.v1.AdapterService."""

# ruff: noqa: N802

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lorarep.v1 import adapters_pb2, adapters_pb2_grpc

from lorarep_runtime.errors import NotFound
from lorarep_server import messages
from lorarep_server.loads import AdapterLoad, Loads, State

if TYPE_CHECKING:
    from lorarep_runtime.adapters.pool import AdapterPool
    from lorarep_runtime.engine import Engine


class AdapterService(adapters_pb2_grpc.AdapterServiceServicer):
    """Names of adapters. Each method leaves the event loop: others may hold the pool's lock."""

    def __init__(self, engine: Callable[[], Engine], loads: Loads) -> None:
        self._engine = engine
        self._loads = loads

    async def LoadAdapter(self, request: adapters_pb2.LoadAdapterRequest, context: Any) -> None:
        # Written with `write`, not yielded: a cancellation then ends this very coroutine, and with it the wait.
        async def report(state: State) -> None:
            await context.write(adapters_pb2.LoadAdapterResponse(progress=messages.load_progress(state)))

        pool = self._engine().adapters
        wanted = await asyncio.to_thread(_wanted, pool, request)
        info = await self._loads.load(pool, wanted, report)
        await context.write(adapters_pb2.LoadAdapterResponse(adapter=messages.adapter(info)))

    async def UnloadAdapter(
        self, request: adapters_pb2.UnloadAdapterRequest, context: Any
    ) -> adapters_pb2.UnloadAdapterResponse:
        await asyncio.to_thread(self._engine().adapters.unload, request.name)
        return adapters_pb2.UnloadAdapterResponse()

    async def GetAdapter(
        self, request: adapters_pb2.GetAdapterRequest, context: Any
    ) -> adapters_pb2.GetAdapterResponse:
        info = await asyncio.to_thread(self._engine().adapters.get, request.name)
        return adapters_pb2.GetAdapterResponse(adapter=messages.adapter(info))

    async def ListAdapters(
        self, request: adapters_pb2.ListAdaptersRequest, context: Any
    ) -> adapters_pb2.ListAdaptersResponse:
        infos = await asyncio.to_thread(self._engine().adapters.list)
        return adapters_pb2.ListAdaptersResponse(adapters=[messages.adapter(info) for info in infos])


def _wanted(pool: AdapterPool, request: adapters_pb2.LoadAdapterRequest) -> AdapterLoad:
    pinned, priority = False, 0
    try:
        loaded = pool.get(request.name)
        pinned, priority = loaded.pinned, loaded.priority
    except NotFound:
        pass
    return AdapterLoad(
        request.name,
        request.repository,
        request.revision if request.HasField("revision") else None,
        request.stack if request.HasField("stack") else None,
        pinned=request.pinned if request.HasField("pinned") else pinned,
        priority=request.priority if request.HasField("priority") else priority,
        replace=request.replace,
    )
