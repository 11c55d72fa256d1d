"""lorarep.v1.AdapterService."""

# ruff: noqa: N802

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from lorarep.v1 import adapters_pb2, adapters_pb2_grpc

from lorarep_runtime.errors import FailedPrecondition, NotFound
from lorarep_server.loading.adapters_file import DesiredAdapter
from lorarep_server.loading.load_queue import LoadQueue, LoadRequest, State
from lorarep_server.loading.reconciler import Reconciler
from lorarep_server.requests import messages

if TYPE_CHECKING:
    from lorarep_runtime.adapters.registry import AdapterInfo, AdapterRegistry
    from lorarep_runtime.engine.engine import Engine


class AdapterService(adapters_pb2_grpc.AdapterServiceServicer):
    """Names of adapters. Each method leaves the event loop: others may hold the pool's lock."""

    def __init__(self, engine: Callable[[], Engine], loads: LoadQueue, desired: Reconciler) -> None:
        self._engine = engine
        self._loads = loads
        self._desired = desired

    async def LoadAdapter(self, request: adapters_pb2.LoadAdapterRequest, context: Any) -> None:
        # Written with `write`, not yielded: a cancellation then ends this very coroutine, and with it the wait.
        async def report(state: State) -> None:
            await context.write(adapters_pb2.LoadAdapterResponse(progress=messages.load_progress(state)))

        pool = self._engine().adapters
        entry = self._desired.get(request.name)
        wanted = await asyncio.to_thread(_wanted, pool, request, entry)
        info = await self._loads.load(pool, wanted, report)
        if entry is not None:
            self._desired.has(entry, info)
        await context.write(adapters_pb2.LoadAdapterResponse(adapter=self._message(info)))

    async def UnloadAdapter(
        self, request: adapters_pb2.UnloadAdapterRequest, context: Any
    ) -> adapters_pb2.UnloadAdapterResponse:
        if self._desired.get(request.name) is not None:
            raise FailedPrecondition(f"{request.name!r} is the adapters file's: take it out there", field="name")
        await asyncio.to_thread(self._engine().adapters.unload, request.name)
        return adapters_pb2.UnloadAdapterResponse()

    async def GetAdapter(
        self, request: adapters_pb2.GetAdapterRequest, context: Any
    ) -> adapters_pb2.GetAdapterResponse:
        try:
            adapter = self._message(await asyncio.to_thread(self._engine().adapters.get, request.name))
        except NotFound:
            entry = self._desired.all().get(request.name)
            if entry is None:
                raise
            adapter = messages.absent_adapter(entry, self._desired.error(request.name))
        return adapters_pb2.GetAdapterResponse(adapter=adapter)

    async def ListAdapters(
        self, request: adapters_pb2.ListAdaptersRequest, context: Any
    ) -> adapters_pb2.ListAdaptersResponse:
        adapters = {
            name: messages.absent_adapter(entry, self._desired.error(name))
            for name, entry in self._desired.all().items()
        }
        for info in await asyncio.to_thread(self._engine().adapters.list):
            adapters[info.name] = self._message(info)
        return adapters_pb2.ListAdaptersResponse(adapters=[adapters[name] for name in sorted(adapters)])

    def _message(self, info: AdapterInfo) -> adapters_pb2.Adapter:
        desired = self._desired.get(info.name) is not None
        return messages.adapter(info, error=self._desired.error(info.name), desired=desired)


def _wanted(
    pool: AdapterRegistry, request: adapters_pb2.LoadAdapterRequest, entry: DesiredAdapter | None
) -> LoadRequest:
    """What the call asks for. Of an entry of the adapters file it may be had now, or anew, and nothing else."""
    before: DesiredAdapter | AdapterInfo | None = entry
    if before is None:
        with suppress(NotFound):
            before = pool.get(request.name)
    wanted = LoadRequest(
        request.name,
        request.repository,
        request.revision if request.HasField("revision") else None,
        request.stack if request.HasField("stack") else None,
        trusted=entry is not None,
        pinned=request.pinned if request.HasField("pinned") else before is not None and before.pinned,
        priority=request.priority if request.HasField("priority") else before.priority if before is not None else 0,
    )
    if entry is not None and wanted != entry.load:
        different = (
            field.name for field in fields(wanted) if getattr(wanted, field.name) != getattr(entry.load, field.name)
        )
        raise FailedPrecondition(
            f"the adapters file has another for {entry.name!r}, which has to be changed there", field=next(different)
        )
    return replace(wanted, replace=request.replace)
