"""The server's life: the port opens, the base loads, calls are answered, SIGTERM or a failure ends it.

Liveness says that the process works, readiness that it takes new calls; "" that the base is served.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIServer

import grpc
from aiohttp.web import AppRunner
from fmaas import generation_pb2 as fmaas_pb2
from fmaas import generation_pb2_grpc as fmaas_pb2_grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2
from lorarep.v1 import (
    adapters_pb2,
    adapters_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
)
from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector, start_http_server

from lorarep_runtime.errors import InvalidArgument, Unavailable
from lorarep_server.api.grpc_adapters import AdapterService
from lorarep_server.api.grpc_fmaas import FmaasService
from lorarep_server.api.grpc_generation import GenerationService
from lorarep_server.api.grpc_model import ModelService
from lorarep_server.api.openai import OpenAI
from lorarep_server.api.status_page import StatusPage
from lorarep_server.auth import TokenAuth, check_exposure, check_roles
from lorarep_server.config import ServerConfig
from lorarep_server.connections import close_connections
from lorarep_server.loading.load_queue import LoadQueue, LoadRequest
from lorarep_server.loading.reconciler import Reconciler
from lorarep_server.requests.admission import Admission
from lorarep_server.requests.frontend import Frontend
from lorarep_server.telemetry.metrics import EngineCollector, Metrics
from lorarep_server.telemetry.tracing import Traces
from lorarep_server.tls import TlsFiles

if TYPE_CHECKING:
    from lorarep_runtime.engine.engine import Engine
    from lorarep_runtime.progress import Progress

log = logging.getLogger(__name__)

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
READINESS = ("readiness", "fmaas.GenerationService")
"""Names of one service of health; vllm-tgis-adapter's probes ask for the second."""

FIRST_ATTEMPTS = 60.0
"""Seconds for which readiness waits for the adapters file's adapters to be loaded or to fail."""
FAILURE_GRACE = 1.0
"""Seconds for calls to hear of a failure."""
FAILURE_POLL = 0.5
"""Seconds between looks at the engine's health."""
LAST_WRITES = 1.0
"""Seconds for statuses that are on their way to callers, and for the step under way."""

GRPC_OPTIONS = (
    ("grpc.so_reuseport", 0),  # a second server on the port is an error, not a sharer of its calls
    ("grpc.max_receive_message_length", 16 << 20),
    ("grpc.max_send_message_length", 64 << 20),
    ("grpc.max_concurrent_streams", 1024),
    # A caller that has vanished is noticed within a minute and a half; one that pings more often is cut off.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.http2.max_ping_strikes", 3),
)


class App:
    """One server from start to end. To be made and run in the same event loop."""

    def __init__(
        self, config: ServerConfig, load_engine: Callable[[], Engine], progress: Progress | None = None
    ) -> None:
        self._config = config
        self._load_engine = load_engine
        self._progress = progress
        self._loaded: Engine | None = None
        self._stop = asyncio.Event()
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)
        self._metrics = Metrics(self._registry)
        self._traces = Traces(config.traces_endpoint)
        self._loads = LoadQueue(self._metrics)
        self._desired = Reconciler(config.adapters_file, self._loads)
        self._calls = Admission(config.max_calls)
        self._answers = Frontend(
            self.engine,
            self._loads,
            self._desired,
            self._metrics,
            self._traces,
            max_unread=config.max_unread,
            patience=config.max_unread_seconds,
        )
        self._registry.register(EngineCollector(self.engine, self._desired.states))
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]
        self.ready = asyncio.Event()
        """Set once new calls are taken."""
        self.port = self.metrics_port = self.health_port = self.openai_port = 0
        """Bound ports, once the server listens; those of health alone and of OpenAI's API if there are any."""

    def engine(self) -> Engine:
        """Raises Unavailable until it is loaded."""
        if self._loaded is None:
            raise Unavailable("the server is starting")
        return self._loaded

    def stop(self) -> None:
        """Tells the server to end. For signal handlers, in the event loop's thread."""
        self._stop.set()

    async def run(self) -> int:
        """Serves until told to end; the exit status of the process.

        Raises:
            LorarepError: the server cannot be started.
        """
        for service in ("", *READINESS):
            await self._health.set(service, NOT_SERVING)
        await self._health.set("liveness", SERVING)
        check_exposure(self._config)
        access = None if self._config.token_file is None else TokenAuth(self._config.token_file)
        servers = [self._build(access), *self._build_health()]
        http = self._serve_metrics()
        openai = await self._serve_openai(access)
        for server in servers:
            await server.start()
        log.info("listening on port %d, metrics on port %d", self.port, self.metrics_port)
        if self.health_port:
            log.info("health alone on port %d", self.health_port)
        if self.openai_port:
            log.info("OpenAI's API on port %d", self.openai_port)
        try:
            failed = False
            if await self._unless_stopped(self._start()):
                failed = await self._unless_stopped(self._failure())
            await self._end(failed)
            return 1 if failed else 0
        finally:
            close_connections({self.port, self.health_port} - {0})
            for server in servers:
                await server.stop(LAST_WRITES)
            if openai is not None:
                await openai.cleanup()
            http.shutdown()
            http.server_close()
            await asyncio.to_thread(self._traces.close)

    async def _unless_stopped(self, work: Coroutine[Any, Any, None]) -> bool:
        """Waits for the work; False if the server is told to end before it is done."""
        task, stopped = asyncio.create_task(work), asyncio.create_task(self._stop.wait())
        await asyncio.wait((task, stopped), return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if not task.done():
            task.cancel()
            return False
        task.result()
        return True

    async def _start(self) -> None:
        # Not the event loop's own threads: those are waited for at its end, and a load can take minutes.
        thread = ThreadPoolExecutor(1, thread_name_prefix="lorarep-start")
        loop = asyncio.get_running_loop()
        engine = await loop.run_in_executor(thread, self._load_engine)
        for adapter in self._config.adapters:
            wanted = LoadRequest(adapter.name, adapter.source, adapter.revision, trusted=True)
            load = partial(wanted.run, engine.adapters, self._progress)
            await loop.run_in_executor(thread, self._metrics.timed_load("folder" if adapter.is_folder else "hub", load))
        engine.start()
        self._loaded = engine
        await self._health.set("", SERVING)
        self._desired.start(engine.adapters)
        # Callers would only wait for what is not there yet. But none of the file's adapters may keep the server from
        # starting, be it missing or slow.
        await self._desired.attempted(FIRST_ATTEMPTS)
        await self._set_ready(SERVING)
        self.ready.set()
        log.info("ready: %s with %d adapters", engine.base.repository, len(engine.adapters.list()))

    async def _set_ready(self, status: health_pb2.HealthCheckResponse.ServingStatus.ValueType) -> None:
        for service in READINESS:
            await self._health.set(service, status)

    async def _failure(self) -> None:
        """Returns when the engine has failed."""
        while self.engine().failure is None:  # noqa: ASYNC110 (its thread knows no event loop)
            await asyncio.sleep(FAILURE_POLL)

    async def _end(self, failed: bool) -> None:
        """Lets calls finish, then ends those that have not."""
        if failed:
            for service in ("", "liveness"):
                await self._health.set(service, NOT_SERVING)
        await self._set_ready(NOT_SERVING)
        self._calls.close()
        self._desired.stop()
        log.info("ending: waiting for calls under way")
        if not await self._calls.finished(FAILURE_GRACE if failed else self._config.grace_seconds):
            self._calls.end()
            await self._calls.finished(LAST_WRITES)
        if self._loaded is not None:
            await asyncio.to_thread(self._loaded.stop, LAST_WRITES)
            log.info("ended with %d pages in use", self._loaded.stats().pages_used)

    def _build(self, access: TokenAuth | None) -> grpc.aio.Server:
        # Tokens come first: a call without one is none of those under way.
        interceptors = (self._calls,) if access is None else (access, self._calls)
        server = grpc.aio.server(interceptors=interceptors, options=GRPC_OPTIONS)
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(GenerationService(self._answers), server)
        fmaas_pb2_grpc.add_GenerationServiceServicer_to_server(FmaasService(self._answers), server)
        adapters_pb2_grpc.add_AdapterServiceServicer_to_server(
            AdapterService(self.engine, self._loads, self._desired), server
        )
        model_pb2_grpc.add_ModelServiceServicer_to_server(ModelService(self.engine), server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        files = (generation_pb2, adapters_pb2, model_pb2, fmaas_pb2, health_pb2, reflection_pb2)
        services = [service for file in files for service in file.DESCRIPTOR.services_by_name.values()]
        check_roles(services)
        reflection.enable_server_reflection([service.full_name for service in services], server)
        tls = self._tls_files()
        self.port = _bind(server, "listen", self._config.listen, None if tls is None else tls.grpc_credentials())
        return server

    def _build_health(self) -> Iterator[grpc.aio.Server]:
        """None, if health is served with the rest alone."""
        if (address := self._config.health_listen) is not None:
            server = grpc.aio.server(options=GRPC_OPTIONS)
            health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
            self.health_port = _bind(server, "health_listen", address, None)
            yield server

    async def _serve_openai(self, access: TokenAuth | None) -> AppRunner | None:
        """What has to be cleaned up in the end, if it is served."""
        if (address := self._config.openai_listen) is None:
            return None
        tls = self._tls_files()
        page = StatusPage(self.engine, self._desired, self._metrics)
        openai = OpenAI(self._answers, self._desired, self._calls, access, page)
        context = None if tls is None else tls.context()
        runner, self.openai_port = await openai.serve(address, context, LAST_WRITES)
        return runner

    def _tls_files(self) -> TlsFiles | None:
        """None for plain text."""
        config = self._config
        if config.tls_certificate is not None and config.tls_key is not None:
            return TlsFiles(config.tls_certificate, config.tls_key, config.tls_client_ca)
        if config.tls_certificate or config.tls_key or config.tls_client_ca:
            raise InvalidArgument("TLS needs tls_certificate and tls_key, both", field="tls_certificate")
        return None

    def _serve_metrics(self) -> WSGIServer:
        host, _, port = self._config.metrics_listen.rpartition(":")
        try:
            http, _thread = start_http_server(int(port), host.strip("[]"), self._registry)
        except (OSError, ValueError, OverflowError) as error:
            raise InvalidArgument(
                f"cannot serve at {self._config.metrics_listen!r}: {error}", field="metrics_listen"
            ) from error
        self.metrics_port = http.server_port
        return http


def _bind(server: grpc.aio.Server, field: str, address: str, credentials: grpc.ServerCredentials | None) -> int:
    """The port; in plain text without credentials."""
    try:
        if credentials is None:
            return server.add_insecure_port(address)
        return server.add_secure_port(address, credentials)
    except RuntimeError as error:
        raise InvalidArgument(f"cannot serve at {address!r}", field=field) from error
