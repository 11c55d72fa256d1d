"""lorarep.v1.AdapterService."""

# ruff: noqa: N802

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from lorarep.v1 import adapters_pb2, adapters_pb2_grpc

from lorarep_server import messages
from lorarep_server.loads import Loads

if TYPE_CHECKING:
    from lorarep_runtime.engine import Engine


class AdapterService(adapters_pb2_grpc.AdapterServiceServicer):
    """Names of adapters. Each method leaves the event loop: others may hold the pool's lock."""

    def __init__(self, engine: Callable[[], Engine], loads: Loads) -> None:
        self._engine = engine
        self._loads = loads

    async def LoadAdapter(
        self, request: adapters_pb2.LoadAdapterRequest, context: Any
    ) -> adapters_pb2.LoadAdapterResponse:
        revision = request.revision if request.HasField("revision") else None
        stack = request.stack if request.HasField("stack") else None
        load = partial(self._engine().adapters.load, request.name, request.repository, revision, stack=stack)
        info = await self._loads.run((request.name, request.repository, revision, stack), load)
        return adapters_pb2.LoadAdapterResponse(adapter=messages.adapter(info))

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
