"""lorarep on a Ray cluster: replicas that each serve the base, and a router that sends requests to their adapters.

Each replica is a Ray actor with a `lorarep serve` of its own, on loopback. Ray Serve's model multiplexing knows which
replicas have answered for an adapter, and prefers them (https://docs.ray.io, "Model multiplexing"). Callers need not
know of that: the router takes the adapter from `model` in the bodies of OpenAI's API.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import closing, suppress
from typing import Any

import aiohttp
import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from ray import serve
from ray.exceptions import RayError
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

ADAPTERS_OF_A_REPLICA = 256
"""Adapters for which a replica is preferred, the latest ones. `--adapter-bytes` says how many are in memory."""
MOST_BYTES = 16 << 20
"""Most bytes of a body, as the server's own limit."""
MOST_REQUESTS = 4096
"""Most requests of a replica at a time: its server queues and refuses, not Ray."""
OF_A_CONNECTION = frozenset(
    {"connection", "content-encoding", "content-length", "date", "host", "keep-alive", "origin", "server"}
    | {"transfer-encoding", "upgrade"}
)
"""Headers that each side of a proxy says for itself."""
SERVER = (
    "from lorarep_runtime.device.process import end_with_parent; end_with_parent(); "
    "from lorarep_server.cli.commands import main; main()"
)
"""`lorarep`, which ends with the actor, however that ends."""


@serve.deployment(max_ongoing_requests=MOST_REQUESTS, graceful_shutdown_timeout_s=75, health_check_timeout_s=30)
class Replica:
    """One server of the base.

    Args:
        arguments: of `lorarep serve`, without addresses.
    """

    async def __init__(self, arguments: Sequence[str]) -> None:
        self._name = serve.get_replica_context().replica_id.unique_id
        openai, health = _free_ports(2)
        self._health, self._url = f"127.0.0.1:{health}", f"http://127.0.0.1:{openai}"
        addresses = ["--listen=127.0.0.1:0", "--metrics-listen=127.0.0.1:0"]
        addresses += [f"--health-listen={self._health}", f"--openai-listen=127.0.0.1:{openai}"]
        command = [sys.executable, "-c", SERVER, "serve", *addresses, *arguments]
        self._server = await asyncio.create_subprocess_exec(*command, stdin=asyncio.subprocess.PIPE)
        self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(), connector=aiohttp.TCPConnector(limit=0))
        self._channel = grpc.aio.insecure_channel(self._health)
        while not await self._is_ready():
            if self._server.returncode is not None:
                raise RuntimeError(f"lorarep ended with status {self._server.returncode}; its log says why")
            await asyncio.sleep(0.2)
        self._watch = asyncio.create_task(self._end_with_server())

    async def _end_with_server(self) -> None:
        """Ray learns at once that an actor has ended, and replaces it; of a server it would learn by health checks."""
        await self._server.wait()
        os._exit(1)

    async def _is_ready(self) -> bool:
        request = health_pb2.HealthCheckRequest(service="readiness")
        with suppress(grpc.aio.AioRpcError):
            answer = await health_pb2_grpc.HealthStub(self._channel).Check(request, timeout=10)
            return answer.status == health_pb2.HealthCheckResponse.SERVING
        return False

    async def check_health(self) -> None:
        """Ray replaces a replica for which this fails several times: its server may stand still."""
        if not await self._is_ready():
            raise RuntimeError("lorarep is not ready; its log says why")

    @serve.multiplexed(max_num_models_per_replica=ADAPTERS_OF_A_REPLICA)
    async def adapter(self, name: str) -> str:
        """Has Ray prefer this replica for an adapter from now on."""
        return name

    async def forward(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes
    ) -> AsyncGenerator[tuple[int, dict[str, str]] | bytes, None]:
        """Asks the server. Yields its status and headers, then its answer in pieces as they come."""
        async with self._session.request(method, self._url + path, headers=headers, data=body) as answer:
            name = serve.get_multiplexed_model_id()
            if name and answer.status < 400:
                await self.adapter(name)
            yield answer.status, {**_end_to_end(answer.headers), "x-replica": self._name}
            async for piece in answer.content.iter_any():
                yield piece

    async def __del__(self) -> None:
        self._watch.cancel()
        self._server.terminate()  # streams finish within --grace-seconds
        await self._server.wait()
        await self._session.close()
        await self._channel.close()


@serve.deployment(max_ongoing_requests=MOST_REQUESTS, ray_actor_options={"num_cpus": 0})
class Router:
    """Sends each request to a replica, if possible to one that has its adapter."""

    def __init__(self, replicas: DeploymentHandle) -> None:
        self._replicas = replicas.forward

    async def __call__(self, request: Request) -> Response:
        body = bytearray()
        async for piece in request.stream():
            body += piece
            if len(body) > MOST_BYTES:
                error = {"message": f"over the limit of {MOST_BYTES} bytes", "type": "invalid_request_error"}
                return JSONResponse({"error": error}, 413)
        name = await asyncio.to_thread(_adapter_of, bytes(body))
        path = request.url.path + (f"?{request.url.query}" if request.url.query else "")
        pieces = self._replicas.options(stream=True, multiplexed_model_id=name).remote(
            request.method, path, _end_to_end(request.headers), bytes(body)
        )
        try:
            status, headers = await anext(pieces)
        except RayError:
            error = {"message": "the replica has ended; another one answers", "type": "server_error"}
            return JSONResponse({"error": error}, 503, {"retry-after": "1"})
        return StreamingResponse(_until_left(pieces), status, headers)


async def _until_left(pieces: Any) -> AsyncGenerator[bytes, None]:
    """The pieces of an answer. A caller that leaves cancels the request."""
    try:
        async for piece in pieces:
            yield piece
    finally:
        pieces.cancel()


def _adapter_of(body: bytes) -> str:
    """The adapter that a request is for; "" for those that any replica answers alike."""
    with suppress(ValueError, RecursionError):
        asked = json.loads(body)
        if isinstance(asked, dict) and isinstance(name := asked.get("model"), str) and name != "base":
            return name[:256]
    return ""


def _end_to_end(headers: Mapping[str, str]) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items() if name.lower() not in OF_A_CONNECTION}


def _free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody has. A server that finds one taken after all ends, and Ray starts another."""
    with closing(socket.socket()) as one, closing(socket.socket()) as other:
        ports = []
        for listener in (one, other)[:count]:
            listener.bind(("127.0.0.1", 0))
            ports.append(listener.getsockname()[1])
        return ports


def app(given: Mapping[str, Any]) -> serve.Application:
    """The application, as `serve.yaml` asks for it.

    Args:
        given: `arguments` of `lorarep serve`, the number of `replicas`, and `num_cpus` and `num_gpus` of each.
    """
    options = {name: given[name] for name in ("num_cpus", "num_gpus") if name in given}
    replica = Replica.options(num_replicas=given.get("replicas", 1), ray_actor_options=options)
    return Router.bind(replica.bind(list(given["arguments"])))
