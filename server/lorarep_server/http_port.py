"""One HTTP port: its connections are limited in number, and in the time that they may take to ask for something.

A connection is counted when it is accepted, before its TLS handshake.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Awaitable, Callable
from contextlib import suppress

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from lorarep_runtime.errors import InvalidArgument
from lorarep_server.addresses import parse_address
from lorarep_server.connections import ConnectionLimit

REQUEST_SECONDS = 75.0
"""Seconds for a connection to send the head of its next request. Proxies keep idle connections for a minute."""
HANDSHAKE_SECONDS = 10.0
"""Seconds for a TLS handshake."""


class HttpPort:
    """An application on a port. `port` is its number once it is open."""

    def __init__(
        self,
        application: web.Application,
        limit: ConnectionLimit,
        patience: float,
        request_seconds: float = REQUEST_SECONDS,
    ) -> None:
        """
        Args:
            limit: of connections; those over it are closed at once.
            patience: seconds that requests have to finish when the port is closed.
            request_seconds: seconds for a connection to send the head of its next request.
        """
        application.middlewares.insert(0, self._counted)
        # A caller that leaves cancels its request.
        self._runner = web.AppRunner(application, handler_cancellation=True, shutdown_timeout=patience, access_log=None)
        self._limit = limit
        self._request_seconds = request_seconds
        self._since: dict[web.RequestHandler, float] = {}
        """When each connection without a request became one."""
        self._busy: set[web.RequestHandler] = set()
        """Connections whose request is being handled."""
        self._server: asyncio.Server | None = None
        self._watch: asyncio.Task[None] | None = None
        self._tls: Callable[[], ssl.SSLContext] | None = None
        self._handshakes: set[asyncio.Task[None]] = set()
        self.port = 0

    async def open(self, address: str, field: str, tls: Callable[[], ssl.SSLContext] | None = None) -> None:
        """Serves at an address.

        Args:
            field: the name of the address in errors.
            tls: gives the context of a new connection; None serves plain text.

        Raises:
            InvalidArgument: the address cannot be used.
        """
        logging.getLogger("aiohttp.server").addFilter(_is_ours)
        await self._runner.setup()
        self._tls = tls
        try:
            host, port = parse_address(address)
            self._server = await asyncio.get_running_loop().create_server(
                lambda: _Connection(self._limit, self._take), host or None, port
            )
        except (OSError, ValueError, OverflowError) as error:
            await self._runner.cleanup()
            raise InvalidArgument(f"cannot serve at {address!r}: {error}", field=field) from error
        self.port = int(self._server.sockets[0].getsockname()[1])
        self._watch = asyncio.create_task(self._close_idle())

    async def close(self) -> None:
        """Closes the port and its connections."""
        if self._server is not None and self._watch is not None:
            self._watch.cancel()
            self._server.close()
            for handshake in self._handshakes:
                handshake.cancel()
            await self._runner.cleanup()

    def _take(self, connection: _Connection, transport: asyncio.Transport) -> None:
        """Serves an accepted connection, after its handshake if there is TLS."""
        if self._tls is None:
            connection.serve(self._handler(), transport)
            return
        handshake = asyncio.create_task(self._shake_hands(connection, transport, self._tls()))
        self._handshakes.add(handshake)
        handshake.add_done_callback(self._handshakes.discard)

    async def _shake_hands(
        self, connection: _Connection, transport: asyncio.Transport, context: ssl.SSLContext
    ) -> None:
        encrypted = None
        try:
            with suppress(OSError):  # of the caller, and of TLS
                encrypted = await asyncio.get_running_loop().start_tls(
                    transport, connection, context, server_side=True, ssl_handshake_timeout=HANDSHAKE_SECONDS
                )
        finally:
            if encrypted is None:
                connection.connection_lost(None)
        if encrypted is not None:
            connection.serve(self._handler(), encrypted)

    def _handler(self) -> web.RequestHandler:
        server = self._runner.server
        assert server is not None
        return server()

    @web.middleware
    async def _counted(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        self._busy.add(request.protocol)
        self._since.pop(request.protocol, None)
        try:
            return await handler(request)
        finally:
            self._busy.discard(request.protocol)

    async def _close_idle(self) -> None:
        """Closes connections that have sent no whole head of a request for too long."""
        loop, server = asyncio.get_running_loop(), self._runner.server
        while server is not None:
            idle = set(server.connections) - self._busy
            self._since = {connection: since for connection, since in self._since.items() if connection in idle}
            for connection in idle:
                if loop.time() - self._since.setdefault(connection, loop.time()) > self._request_seconds:
                    connection.force_close()
            await asyncio.sleep(min(1, self._request_seconds / 4))


class _Connection(asyncio.Protocol):
    """A connection from its acceptance to its end, which is counted meanwhile. aiohttp serves it."""

    def __init__(self, limit: ConnectionLimit, take: Callable[[_Connection, asyncio.Transport], None]) -> None:
        """
        Args:
            limit: counts the connection; one too many is closed.
            take: is told of a connection that is not; calls `serve`.
        """
        self._limit = limit
        self._take = take
        self._address: str | None = None
        """Where a counted connection comes from."""
        self._handler: web.RequestHandler | None = None
        self._early: list[bytes] = []
        """What has arrived behind the last message of a handshake."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        peer = transport.get_extra_info("peername")
        address = str(peer[0]) if isinstance(peer, tuple) else ""
        if not self._limit.enter(address):
            transport.abort()
            return
        self._address = address
        self._take(self, transport)

    def serve(self, handler: web.RequestHandler, transport: asyncio.Transport) -> None:
        """Hands the connection over to aiohttp, unless it is lost already."""
        if self._address is None:
            return
        self._handler = handler
        handler.connection_made(transport)
        for data in self._early:
            handler.data_received(data)
        self._early.clear()

    def data_received(self, data: bytes) -> None:
        if self._handler is None:
            self._early.append(data)
        else:
            self._handler.data_received(data)

    def eof_received(self) -> None:
        if self._handler is not None:
            self._handler.eof_received()

    def pause_writing(self) -> None:
        if self._handler is not None:
            self._handler.pause_writing()

    def resume_writing(self) -> None:
        if self._handler is not None:
            self._handler.resume_writing()

    def connection_lost(self, error: Exception | None) -> None:
        if self._address is not None:
            self._limit.leave(self._address)
            self._address = None
        if self._handler is not None:
            self._handler.connection_lost(error)


def _is_ours(record: logging.LogRecord) -> bool:
    """A log filter: drops aiohttp's reports of malformed requests, which would copy a peer's bytes into the log."""
    return not (record.exc_info and isinstance(record.exc_info[1], HttpProcessingError | web.RequestPayloadError))
