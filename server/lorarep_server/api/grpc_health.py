"""grpc.health.v1: the statuses of names, which the server's life and its progress decide."""

# ruff: noqa: N802

from __future__ import annotations

from typing import Any

from grpc_health.v1 import health, health_pb2


class HealthService(health.aio.HealthServicer):  # type: ignore[name-defined]
    """The library's service, with `List`, which the library leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self._listed: dict[str, health_pb2.HealthCheckResponse.ServingStatus.ValueType] = {}

    async def set(self, service: str, status: health_pb2.HealthCheckResponse.ServingStatus.ValueType) -> None:
        """Sets the status of a name, and tells those that watch it."""
        self._listed[service] = status
        await super().set(service, status)

    def is_serving(self, service: str) -> bool:
        """Whether a name's status is SERVING."""
        return self._listed.get(service) == health_pb2.HealthCheckResponse.SERVING

    async def List(self, request: health_pb2.HealthListRequest, context: Any) -> health_pb2.HealthListResponse:
        statuses = {
            name: health_pb2.HealthCheckResponse(status=status) for name, status in sorted(self._listed.items())
        }
        return health_pb2.HealthListResponse(statuses=statuses)
