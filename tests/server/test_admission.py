"""A server's end waits for its last call, and for no longer."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
from lorarep_server.errors import Status
from lorarep_server.requests.admission import Admission

UNUSED: Any = None


def test_the_end_waits_for_the_last_call_and_no_longer() -> None:
    async def calls() -> None:
        admission = Admission(2, UNUSED, UNUSED)
        assert await admission.finished(10)
        may_end = [asyncio.Event() for _ in range(2)]
        running = [asyncio.create_task(admission.guard("Generate", event.wait())) for event in may_end]
        await asyncio.sleep(0)
        admission.close()
        refused = await admission.guard("Generate", asyncio.Event().wait())
        assert isinstance(refused, Status)
        assert refused.code is grpc.StatusCode.UNAVAILABLE
        for event, call in zip(may_end, running, strict=True):
            assert not await admission.finished(0.01)
            event.set()
            await call
        assert await admission.finished(10)

    asyncio.run(calls())
