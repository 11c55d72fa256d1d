"""lorarep.v1.AdapterService: adapters are loaded, unloaded and listed."""

# ruff: noqa: N802

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from lorarep.v1 import adapters_pb2, adapters_pb2_grpc

from lorarep_runtime.errors import FailedPrecondition, NotFound
from lorarep_server.loading.adapters_file import DesiredAdapter
from lorarep_server.loading.load_queue import LoadQueue, LoadRequest, LoadState, Report
from lorarep_server.loading.reconciler import Reconciler
from lorarep_server.requests import messages

if TYPE_CHECKING:
    from lorarep_runtime.adapters.revision import AdapterInfo
    from lorarep_runtime.engine.engine import Engine


class AdapterService(adapters_pb2_grpc.AdapterServiceServicer):
    """The RPCs of adapters. They use the registry in threads, since another thread may hold its lock."""

    def __init__(self, engine: Callable[[], Engine], load_queue: LoadQueue, reconciler: Reconciler) -> None:
        self._engine = engine
        self._load_queue = load_queue
        self._reconciler = reconciler

    async def LoadAdapter(self, request: adapters_pb2.LoadAdapterRequest, context: Any) -> None:
        # Messages are written, not yielded: a cancellation then ends this coroutine, and with it the wait.
        async def report(state: LoadState) -> None:
            await context.write(adapters_pb2.LoadAdapterResponse(progress=messages.load_progress(state)))

        info = await self.load(request, report)
        await context.write(adapters_pb2.LoadAdapterResponse(adapter=self._message(info)))

    async def load(self, request: adapters_pb2.LoadAdapterRequest, report: Report | None = None) -> AdapterInfo:
        """Loads an adapter for a caller, for any protocol. Raises LorarepError, as `LoadQueue.load`."""
        registry = self._engine().adapters
        entry = self._reconciler.get(request.name)
        info = await self._load_queue.load(registry, _load_request(request, entry), report)
        if entry is not None:
            self._reconciler.set_loaded(entry, info)
        return info

    async def UnloadAdapter(
        self, request: adapters_pb2.UnloadAdapterRequest, context: Any
    ) -> adapters_pb2.UnloadAdapterResponse:
        await self.unload(request.name)
        return adapters_pb2.UnloadAdapterResponse()

    async def unload(self, name: str) -> None:
        """Takes a name away for a caller, for any protocol.

        Raises:
            FailedPrecondition: it is the adapters file's.
            NotFound: no adapter has it.
        """
        if self._reconciler.get(name) is not None:
            raise FailedPrecondition(f"{name!r} is the adapters file's: take it out there", field="name")
        await asyncio.to_thread(self._engine().adapters.unload, name)

    async def has(self, name: str) -> bool:
        """Whether an adapter has a name."""
        return await asyncio.to_thread(self._engine().adapters.__contains__, name)

    async def GetAdapter(
        self, request: adapters_pb2.GetAdapterRequest, context: Any
    ) -> adapters_pb2.GetAdapterResponse:
        try:
            adapter = self._message(await asyncio.to_thread(self._engine().adapters.get, request.name))
        except NotFound:
            entry = self._reconciler.all().get(request.name)
            if entry is None:
                raise
            adapter = messages.absent_adapter(entry, self._reconciler.error(request.name))
        return adapters_pb2.GetAdapterResponse(adapter=adapter)

    async def ListAdapters(
        self, request: adapters_pb2.ListAdaptersRequest, context: Any
    ) -> adapters_pb2.ListAdaptersResponse:
        adapters = {
            name: messages.absent_adapter(entry, self._reconciler.error(name))
            for name, entry in self._reconciler.all().items()
        }
        for info in await asyncio.to_thread(self._engine().adapters.list):
            adapters[info.name] = self._message(info)
        return adapters_pb2.ListAdaptersResponse(adapters=[adapters[name] for name in sorted(adapters)])

    def _message(self, info: AdapterInfo) -> adapters_pb2.Adapter:
        desired = self._reconciler.get(info.name) is not None
        return messages.adapter(info, error=self._reconciler.error(info.name), desired=desired)


def _load_request(request: adapters_pb2.LoadAdapterRequest, entry: DesiredAdapter | None) -> LoadRequest:
    """The load that a call asks for. What it does not say about pin and priority stays as it is.

    An entry of the adapters file can be loaded at once or again, but only as the file describes it.
    """
    load_request = LoadRequest(
        request.name,
        request.repository,
        request.revision if request.HasField("revision") else None,
        request.stack if request.HasField("stack") else None,
        trusted=entry is not None,
        pinned=request.pinned if request.HasField("pinned") else None if entry is None else entry.pinned,
        priority=request.priority if request.HasField("priority") else None if entry is None else entry.priority,
    )
    if entry is not None and load_request != entry.load_request:
        different = (
            field.name
            for field in fields(load_request)
            if getattr(load_request, field.name) != getattr(entry.load_request, field.name)
        )
        raise FailedPrecondition(
            f"the adapters file has another for {entry.name!r}, which has to be changed there", field=next(different)
        )
    return replace(load_request, replace=request.replace)
