"""One HTTP port: its connections are limited in number, and in the time that they may take to ask for something."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Awaitable, Callable

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from lorarep_runtime.errors import InvalidArgument
from lorarep_server.addresses import parse_address

REQUEST_SECONDS = 75.0
"""Seconds for a connection to send the head of its next request. Proxies keep idle connections for a minute."""
HANDSHAKE_SECONDS = 10.0
"""Seconds for a TLS handshake."""


class HttpPort:
    """An application on a port. `port` is its number once it is open."""

    def __init__(
        self,
        application: web.Application,
        max_connections: int,
        patience: float,
        request_seconds: float = REQUEST_SECONDS,
    ) -> None:
        """
        Args:
            max_connections: most connections; further ones are closed at once. Those of one burst are counted late.
            patience: seconds that requests have to finish when the port is closed.
            request_seconds: seconds for a connection to send the head of its next request.
        """
        application.middlewares.insert(0, self._counted)
        # A caller that leaves cancels its request.
        self._runner = web.AppRunner(application, handler_cancellation=True, shutdown_timeout=patience, access_log=None)
        self._max_connections = max_connections
        self._request_seconds = request_seconds
        self._since: dict[web.RequestHandler, float] = {}
        """When each connection without a request became one."""
        self._busy: set[web.RequestHandler] = set()
        """Connections whose request is being handled."""
        self._server: asyncio.Server | None = None
        self._watch: asyncio.Task[None] | None = None
        self.port = 0

    async def open(self, address: str, field: str, context: ssl.SSLContext | None = None) -> None:
        """Serves at an address, with TLS if there is a context.

        Args:
            field: the name of the address in errors.

        Raises:
            InvalidArgument: the address cannot be used.
        """
        logging.getLogger("aiohttp.server").addFilter(_is_ours)
        await self._runner.setup()
        handshake = None if context is None else HANDSHAKE_SECONDS
        try:
            host, port = parse_address(address)
            self._server = await asyncio.get_running_loop().create_server(
                self._connection, host or None, port, ssl=context, ssl_handshake_timeout=handshake
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
            await self._runner.cleanup()

    def _connection(self) -> asyncio.Protocol:
        server = self._runner.server
        assert server is not None
        return server() if len(server.connections) < self._max_connections else _Refusal()

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


class _Refusal(asyncio.Protocol):
    """A connection too many."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.close()


def _is_ours(record: logging.LogRecord) -> bool:
    """A log filter: drops aiohttp's reports of malformed requests, which would copy a peer's bytes into the log."""
    return not (record.exc_info and isinstance(record.exc_info[1], HttpProcessingError | web.RequestPayloadError))
