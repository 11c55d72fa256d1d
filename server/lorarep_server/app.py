"""The life of a server: its ports open, the base loads, calls are served, and SIGTERM or a failure ends it.

Health has several names. "liveness" says that the process works, "readiness" that it accepts new calls, and the empty
name that the base is served.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

from aiohttp import web
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector

from lorarep_runtime.errors import Unavailable
from lorarep_server.api.grpc_adapters import AdapterService
from lorarep_server.api.grpc_health import HealthService
from lorarep_server.api.grpc_services import OWN_SERVICES, add_services
from lorarep_server.api.openai import OpenAI
from lorarep_server.api.openai_bodies import Bodies
from lorarep_server.api.status_page import StatusPage
from lorarep_server.api.vllm_routes import VllmRoutes
from lorarep_server.auth import TokenAuth, check_exposure
from lorarep_server.config import ServerConfig
from lorarep_server.hosts import HostCheck, host_checks
from lorarep_server.loading.load_queue import LoadQueue, LoadRequest
from lorarep_server.loading.reconciler import Reconciler
from lorarep_server.ports import Ports, scraper
from lorarep_server.requests.admission import Admission
from lorarep_server.requests.frontend import Frontend
from lorarep_server.requests.message_bounds import MessageBounds
from lorarep_server.requests.stall_watch import StallWatch
from lorarep_server.requests.workers import UnjoinedThreads, run_apart
from lorarep_server.telemetry.metrics import EngineCollector, Metrics
from lorarep_server.telemetry.tracing import Traces

if TYPE_CHECKING:
    from lorarep_runtime.engine.engine import Engine
    from lorarep_runtime.progress import Progress

log = logging.getLogger(__name__)

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
READINESS = ("readiness", *OWN_SERVICES)
"""Names of readiness in the health service. Clients ask for a service's own name, as do vllm-tgis-adapter's probes."""

FIRST_ATTEMPTS = 60.0
"""Seconds for which readiness waits until every entry of the adapters file is loaded or has failed."""
FAILURE_GRACE = 1.0
"""Seconds in which running calls are told that the engine has failed."""
MOST_POLL = 0.5
"""Most seconds between two looks at the engine and at admission."""
STALLS_UNTIL_DEAD = 20
"""Liveness ends after so many times the standstill that ends readiness: a step that takes minutes may be at work."""
LAST_WRITES = 1.0
"""Seconds for pending statuses to reach their callers, and for the running step to end."""


class App:
    """One server from start to end. It is made and run in the same event loop."""

    def __init__(
        self, config: ServerConfig, load_engine: Callable[[], Engine], progress: Progress | None = None
    ) -> None:
        """
        Args:
            config: addresses, credentials, limits and adapters.
            load_engine: loads the base; called in a thread.
            progress: told of the loads before the server is ready.

        Raises:
            InvalidArgument, FailedPrecondition: the adapters file or the traces endpoint cannot be used.
        """
        self._config = config
        self._load_engine = load_engine
        self._progress = progress
        self._engine: Engine | None = None
        self._stop = asyncio.Event()
        self._metrics_registry = CollectorRegistry()
        ProcessCollector(registry=self._metrics_registry)
        PlatformCollector(registry=self._metrics_registry)
        self._metrics = Metrics(self._metrics_registry)
        self._traces = Traces(config.traces_endpoint)
        self._load_queue = LoadQueue(self._metrics)
        self._reconciler = Reconciler(config.adapters_file, self._load_queue)
        self._admission = Admission(config.max_calls, self._message_bounds, self._metrics)
        self._frontend = Frontend(
            self.engine,
            self._load_queue,
            self._reconciler,
            self._metrics,
            self._traces,
            max_unread=config.max_unread,
            patience=config.max_unread_seconds,
            tool_call_parser=config.tool_call_parser,
        )
        self._metrics_registry.register(EngineCollector(self.engine, self._reconciler.states))
        self._health = HealthService()

    def engine(self) -> Engine:
        """The engine.

        Raises:
            Unavailable: the base is not loaded yet.
        """
        if self._engine is None:
            raise Unavailable("the server is starting")
        return self._engine

    def _message_bounds(self) -> MessageBounds:
        engine = self.engine()
        return MessageBounds(engine.max_tokens, engine.config.scheduler.max_prompts)

    def stop(self) -> None:
        """Tells the server to end. For signal handlers, in the event loop's thread."""
        self._stop.set()

    async def run(self) -> int:
        """Serves until it is told to end, and returns the exit status of the process.

        Raises:
            LorarepError: the server cannot be started.
        """
        asyncio.get_running_loop().set_default_executor(UnjoinedThreads(thread_name_prefix="lorarep-worker"))
        for service in ("", *READINESS):
            await self._health.set(service, NOT_SERVING)
        await self._health.set("liveness", SERVING)
        ports = await self._open_ports()
        try:
            failed = False
            if await self._unless_stopped(self._start()):
                failed = await self._unless_stopped(self._failure())
            await self._end(failed)
            return 1 if failed else 0
        finally:
            await ports.close(LAST_WRITES)
            await run_apart(self._traces.close)

    async def _open_ports(self) -> Ports:
        """Opens all ports before anything is loaded: probes are answered, and calls are refused as Unavailable."""
        check_exposure(self._config)
        hosts = host_checks(self._config)
        token_auth = None if self._config.token_file is None else TokenAuth(self._config.token_file)
        ports = Ports(self._config)
        ports.bind_grpc(
            partial(
                add_services,
                frontend=self._frontend,
                load_queue=self._load_queue,
                reconciler=self._reconciler,
                health=self._health,
            ),
            # Tokens come first: a call without a token is not counted as a running call.
            (self._admission,) if token_auth is None else (token_auth, self._admission),
        )
        ports.bind_health(partial(health_pb2_grpc.add_HealthServicer_to_server, self._health))
        await ports.serve_metrics(self._metrics_registry, hosts.metrics, LAST_WRITES)
        await ports.serve_openai(partial(self._openai_application, token_auth, hosts.openai), LAST_WRITES)
        await ports.start()
        return ports

    def _openai_application(self, token_auth: TokenAuth | None, hosts: HostCheck | None) -> web.Application:
        config = self._config
        page = StatusPage(self.engine, self._reconciler, self._metrics)
        bodies = Bodies(lambda: self.engine().max_tokens, ignores_unknown=config.ignore_unknown_fields)
        others = VllmRoutes(
            self._frontend,
            AdapterService(self.engine, self._load_queue, self._reconciler),
            self._admission,
            bodies,
            lambda: self._health.is_serving(READINESS[0]),
            scraper(self._metrics_registry) if config.openai_metrics else None,
        )
        return OpenAI(
            self._frontend, self._reconciler, self._admission, token_auth, hosts, page, bodies, others
        ).application()

    async def _unless_stopped(self, work: Coroutine[Any, Any, None]) -> bool:
        """Waits for the work; False if the server is told to end before the work is done."""
        task, stopped = asyncio.create_task(work), asyncio.create_task(self._stop.wait())
        await asyncio.wait((task, stopped), return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if not task.done():
            task.cancel()
            return False
        task.result()
        return True

    async def _start(self) -> None:
        # 1. Load the base and the configured adapters. The event loop's own threads are joined at its end and a load
        #    can take minutes, so loads run in another thread.
        thread = ThreadPoolExecutor(1, thread_name_prefix="lorarep-start")
        loop = asyncio.get_running_loop()
        engine = await loop.run_in_executor(thread, self._load_engine)
        engine.adapters.residency.transfers.subscribe(self._metrics.brought)
        for adapter in self._config.adapters:
            request = LoadRequest(adapter.name, adapter.source, adapter.revision, trusted=True)
            load = partial(request.run, engine.adapters, self._progress)
            await loop.run_in_executor(thread, self._metrics.timed_load("folder" if adapter.is_folder else "hub", load))
        # 2. Serve the base.
        engine.start()
        self._engine = engine
        await self._health.set("", SERVING)
        # 3. Load the adapters file's adapters. Readiness waits for them, since callers would too. But neither a missing
        #    nor a slow adapter keeps the server from starting.
        self._reconciler.start(engine.adapters)
        await self._reconciler.attempted(FIRST_ATTEMPTS)
        await self._set_readiness(SERVING)
        log.info("ready: %s with %d adapters", engine.base.repository, len(engine.adapters.list()))

    async def _set_readiness(self, status: health_pb2.HealthCheckResponse.ServingStatus.ValueType) -> None:
        for service in READINESS:
            await self._health.set(service, status)

    async def _failure(self) -> None:
        """Returns when the engine has failed. Health says meanwhile whether requests go on."""
        engine, most = self.engine(), self._config.stall_seconds
        frontend = self._frontend
        watch = StallWatch(engine, frontend.pass_admission, frontend.admission_turns, min(MOST_POLL, most / 4))
        is_ready = is_alive = True
        try:
            while engine.failure is None:
                stalled = await watch.wait_and_look()
                if is_ready and stalled >= most:
                    log.error("not ready: no request has gone on for %g s", stalled)
                elif not is_ready and stalled < most:
                    log.warning("ready: requests go on")
                if is_ready != (stalled < most):
                    is_ready = not is_ready
                    await self._set_readiness(SERVING if is_ready else NOT_SERVING)
                if is_alive != (stalled < STALLS_UNTIL_DEAD * most):
                    is_alive = not is_alive
                    await self._health.set("liveness", SERVING if is_alive else NOT_SERVING)
        finally:
            watch.close()

    async def _end(self, failed: bool) -> None:
        """Lets running calls finish, ends those that do not in time, and stops the engine."""
        if failed:
            for service in ("", "liveness"):
                await self._health.set(service, NOT_SERVING)
        await self._set_readiness(NOT_SERVING)
        self._admission.close()
        self._reconciler.stop()
        log.info("ending: waiting for calls under way")
        if not await self._admission.finished(FAILURE_GRACE if failed else self._config.grace_seconds):
            self._admission.end()
            await self._admission.finished(LAST_WRITES)
        if self._engine is not None:
            await run_apart(self._engine.stop, LAST_WRITES)
            # Pages that calls still hold, which had not ended in time. They go with the process.
            log.info("ended: %s", _held(self._engine.stats().pages_used))


def _held(pages: int) -> str:
    """What calls have left at the end."""
    return f"calls that did not end in time hold {pages} pages of keys and values" if pages else "no call holds pages"
