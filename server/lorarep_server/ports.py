"""The ports of a server: gRPC, metrics, health alone and OpenAI's API. Each is bound, served and closed here."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import grpc
from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from lorarep_runtime.errors import InvalidArgument
from lorarep_server.addresses import parse_address
from lorarep_server.config import MAX_MESSAGE, ServerConfig
from lorarep_server.connections import ConnectionLimit, close_connections, raise_descriptor_limit
from lorarep_server.hosts import HostCheck
from lorarep_server.http_port import HttpPort
from lorarep_server.tls import TlsFiles

log = logging.getLogger(__name__)

GRPC_OPTIONS = (
    ("grpc.so_reuseport", 0),  # a second server on the port is an error; it does not share the calls
    ("grpc.max_receive_message_length", MAX_MESSAGE),
    ("grpc.max_send_message_length", 64 << 20),
    ("grpc.max_concurrent_streams", 1024),
    # A connection says what it speaks at once, and goes when it has had no call for a while. Callers' libraries connect
    # again by themselves.
    ("grpc.server_handshake_timeout_ms", 10_000),
    ("grpc.max_connection_idle_ms", 600_000),
    # A caller that has vanished is noticed within 90 seconds. A caller that pings too often is cut off.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.http2.max_ping_strikes", 3),
)

MAX_SCRAPERS = 64
"""Most connections to the port of metrics, and to the port of health alone."""
METRICS_REST = 9
"""How long metrics are answered again, as a multiple of the processor's time for them: they have a tenth of it."""
LEAST_METRICS_SECONDS, METRICS_SECONDS = 1.0, 10.0
"""Metrics that would be answered again for less are always new, and none are for longer."""
MAX_CONNECTIONS = 512
"""Most connections to the port of OpenAI's API where the configuration says nothing."""


@dataclass(frozen=True)
class PortLimits:
    """Most connections of each port. All together leave a quarter of the process's descriptors to files."""

    grpc: int
    openai: int
    openai_per_address: int
    small: int
    """Of the port of metrics, and of the port of health alone."""

    @classmethod
    def within(cls, descriptors: int, config: ServerConfig) -> PortLimits:
        """The limits of a configuration for a process that may have so many open files and connections.

        Raises:
            InvalidArgument: more connections are configured than the process may have.
        """
        most = max(1, descriptors // 4)
        openai = config.max_connections
        if openai is None:
            openai = min(MAX_CONNECTIONS, config.max_calls, most)
        elif openai > most:
            raise InvalidArgument(
                f"{openai} connections need {4 * openai} open files, and this process may have {descriptors}: "
                "raise its hard limit (ulimit -Hn)",
                field="max_connections",
            )
        per_address = config.max_connections_per_address or _half(openai)
        return cls(most, openai, per_address, max(1, min(MAX_SCRAPERS, descriptors // 8)))


class Ports:
    """The bound ports of one server. The port numbers are known once they are bound; 0 is a port that is not served."""

    def __init__(self, config: ServerConfig) -> None:
        """
        Args:
            config: the addresses and the TLS files.

        Raises:
            InvalidArgument: the TLS files are not complete, or the process may not have the connections.
        """
        self._config = config
        self._limits = PortLimits.within(raise_descriptor_limit(), config)
        self._tls = _tls_files(config)
        self._grpc_servers: list[grpc.aio.Server] = []
        self._http_ports: list[HttpPort] = []
        self.grpc = self.health = self.metrics = self.openai = 0

    def bind_grpc(self, add_services: Callable[[grpc.aio.Server], None], interceptors: Sequence[Any]) -> None:
        """Binds the port of gRPC, with the configured TLS.

        Args:
            add_services: registers all services on the server.
            interceptors: see each call first, in this order.

        Raises:
            InvalidArgument: the address or the TLS files cannot be used.
        """
        server = grpc.aio.server(interceptors=interceptors, options=_grpc_options(self._limits.grpc))
        add_services(server)
        credentials = None if self._tls is None else self._tls.grpc_credentials()
        self.grpc = _bind(server, "listen", self._config.listen, credentials)
        self._grpc_servers.append(server)

    def bind_health(self, add_services: Callable[[grpc.aio.Server], None]) -> None:
        """Binds the port of health alone, in plain text, if the configuration has one.

        Raises:
            InvalidArgument: the address cannot be used.
        """
        if (address := self._config.health_listen) is not None:
            server = grpc.aio.server(options=_grpc_options(self._limits.small))
            add_services(server)
            self.health = _bind(server, "health_listen", address, None)
            self._grpc_servers.append(server)

    async def serve_metrics(self, registry: CollectorRegistry, hosts: HostCheck | None, patience: float) -> None:
        """Serves Prometheus metrics at every path, in plain text.

        Raises:
            InvalidArgument: the address cannot be used.
        """
        answer = scraper(registry)

        async def scrape(request: web.Request) -> web.Response:
            if hosts is not None and (refusal := hosts.refusal(request)) is not None:
                return web.Response(text=refusal.text, status=403)
            return await answer(request)

        application = web.Application()
        application.router.add_get("/{path:.*}", scrape)
        limit = ConnectionLimit(self._limits.small, _half(self._limits.small))
        port = HttpPort(application, limit, patience)
        await port.open(self._config.metrics_listen, "metrics_listen")
        self._http_ports.append(port)
        self.metrics = port.port

    async def serve_openai(self, application: Callable[[], web.Application], patience: float) -> None:
        """Serves OpenAI's API with the configured TLS, if the configuration has an address for it.

        Args:
            application: makes the application; it is not called if nothing is served.
            patience: seconds that requests have to finish when the port is closed.

        Raises:
            InvalidArgument: the address or the TLS files cannot be used.
        """
        if (address := self._config.openai_listen) is None:
            return
        limit = ConnectionLimit(self._limits.openai, self._limits.openai_per_address)
        port = HttpPort(application(), limit, patience)
        await port.open(address, "openai_listen", None if self._tls is None else self._tls.contexts())
        self._http_ports.append(port)
        self.openai = port.port

    async def start(self) -> None:
        """Starts the gRPC servers, and logs all ports."""
        for server in self._grpc_servers:
            await server.start()
        log.info("listening on port %d, metrics on port %d", self.grpc, self.metrics)
        if self.health:
            log.info("health alone on port %d", self.health)
        if self.openai:
            log.info("OpenAI's API on port %d", self.openai)

    async def close(self, patience: float) -> None:
        """Closes all ports and their connections.

        Args:
            patience: seconds that calls have to receive their last messages.
        """
        close_connections({self.grpc, self.health} - {0})
        for server in self._grpc_servers:
            await server.stop(patience)
        for port in self._http_ports:
            await port.close()


def scraper(registry: CollectorRegistry) -> Callable[[web.Request], Awaitable[web.Response]]:
    """A handler that answers with Prometheus metrics, which are collected in a thread of its own.

    Whoever reaches the port may ask all the time. What takes long to collect is answered again for a while.
    """
    thread = ThreadPoolExecutor(1, thread_name_prefix="lorarep-metrics")
    kept: dict[str, tuple[bytes, float]] = {}
    """By content type: the metrics, and until when they are answered again."""

    def collect(encode: Callable[[CollectorRegistry], bytes], content_type: str) -> bytes:
        metrics, until = kept.get(content_type, (b"", 0.0))
        if time.monotonic() >= until:
            began = time.thread_time()
            metrics = encode(registry)
            age = (time.thread_time() - began) * METRICS_REST
            age = min(age, METRICS_SECONDS) if age >= LEAST_METRICS_SECONDS else 0.0
            kept[content_type] = metrics, time.monotonic() + age
        return metrics

    async def scrape(request: web.Request) -> web.Response:
        encode, content_type = choose_encoder(request.headers.get("Accept", ""))
        metrics = await asyncio.get_running_loop().run_in_executor(thread, collect, encode, content_type)
        response = web.Response(body=metrics, headers={"Content-Type": content_type})
        response.enable_compression()
        return response

    return scrape


def _half(number: int) -> int:
    return max(1, number // 2)


def _grpc_options(max_connections: int) -> tuple[tuple[str, int], ...]:
    """The options of a port of gRPC. The library counts its connections in all, not by address."""
    return (*GRPC_OPTIONS, ("grpc.max_allowed_incoming_connections", max_connections))


def _tls_files(config: ServerConfig) -> TlsFiles | None:
    """The TLS files of the configuration; None means plain text."""
    if config.tls_certificate is not None and config.tls_key is not None:
        return TlsFiles(config.tls_certificate, config.tls_key, config.tls_client_ca)
    if config.tls_certificate or config.tls_key or config.tls_client_ca:
        raise InvalidArgument("TLS needs tls_certificate and tls_key, both", field="tls_certificate")
    return None


def _bind(server: grpc.aio.Server, field: str, address: str, credentials: grpc.ServerCredentials | None) -> int:
    """Binds a gRPC server and returns the port. Without credentials the port is in plain text."""
    try:
        if credentials is None:
            return server.add_insecure_port(address)
        return server.add_secure_port(address, credentials)
    except RuntimeError as error:
        # gRPC says no reason.
        raise InvalidArgument(f"cannot serve at {address!r}{_reason(address)}", field=field) from error


def _reason(address: str) -> str:
    """Why nothing can listen at an address, as an end of a message; nothing where that cannot be found out."""
    try:
        host, port = parse_address(address)
        family = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        with socket.create_server((host, port), family=family):
            return ""
    except OSError as error:
        return f": {(error.strerror or str(error)).lower()}"
    except ValueError:
        return ""
