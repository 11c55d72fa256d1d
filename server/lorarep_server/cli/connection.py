"""The connection flags of client commands, and the gRPC channel that they describe."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lorarep_server.cli.options import Address, HomePath, option

if TYPE_CHECKING:
    import grpc

FILE = HomePath(dir_okay=False, exists=True)
TOKEN_VARIABLE = "LORAREP_TOKEN"


@dataclass(frozen=True)
class Connection:
    """The address of a server, and the credentials to reach it."""

    server: str
    """HOST:PORT."""
    tls_ca: Path | None
    """PEM file of authorities; None is plain text."""
    tls_certificate: Path | None
    """PEM file of the client's certificate chain."""
    tls_key: Path | None
    """PEM file of the key of the client's certificate."""
    token_file: Path | None
    """File of one bearer token; None reads it from LORAREP_TOKEN."""

    @contextmanager
    def channel(self) -> Iterator[grpc.Channel]:
        """An open channel. A call that fails inside the context ends the command with its status in one line."""
        import grpc

        with self._channel() as channel:
            try:
                yield channel
            except grpc.RpcError as error:
                status: Any = error
                raise click.ClickException(
                    f"{status.code().name}: {status.details()}{self._hint(status.code())}"
                ) from error

    def _hint(self, code: grpc.StatusCode) -> str:
        """What an operator may do about a status."""
        if code.name != "UNAUTHENTICATED":
            return ""
        given = TOKEN_VARIABLE if self.token_file is None else "--token-file"
        return f" ({given} gave it)" if self.metadata else f" (--token-file or {TOKEN_VARIABLE} gives one)"

    def _channel(self) -> grpc.Channel:
        import grpc

        if (self.tls_certificate is None) != (self.tls_key is None):
            raise click.UsageError("--tls-certificate and --tls-key need each other")
        if self.tls_ca is None:
            if self.tls_certificate:
                raise click.UsageError("--tls-certificate needs --tls-ca")
            return grpc.insecure_channel(self.server)
        files = (self.tls_ca, self.tls_key, self.tls_certificate)
        pems = [None if file is None else file.read_bytes() for file in files]
        return grpc.secure_channel(self.server, grpc.ssl_channel_credentials(*pems))

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """The metadata of every call: the bearer token, if there is one."""
        token = os.environ.get(TOKEN_VARIABLE, "") if self.token_file is None else self.token_file.read_text().strip()
        if not token:
            return ()
        if not re.fullmatch("[!-~]+", token):
            raise click.UsageError(f"{self.token_file or TOKEN_VARIABLE}: is not one token")
        return (("authorization", f"Bearer {token}"),)


def with_connection(command: Callable[..., None]) -> Callable[..., None]:
    """Decorates a command with the connection flags, which it receives as its argument `connection`."""

    @option("--server", type=Address(), default="127.0.0.1:50051", help="The server.")
    @option("--tls-ca", type=FILE, help="PEM file of the authorities that the server's certificate may be from.")
    @option("--tls-certificate", type=FILE, help="PEM file of an own certificate chain.")
    @option("--tls-key", type=FILE, help="PEM file of its key.")
    @option("--token-file", type=FILE, show_default=f"${TOKEN_VARIABLE}, a token", help="File of one bearer token.")
    @wraps(command)
    def connected(
        *,
        server: str,
        tls_ca: Path | None,
        tls_certificate: Path | None,
        tls_key: Path | None,
        token_file: Path | None,
        **others: Any,
    ) -> None:
        command(connection=Connection(server, tls_ca, tls_certificate, tls_key, token_file), **others)

    return connected
