"""The server's side of TLS. Certificates may be renewed in place."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from lorarep_runtime.errors import InvalidArgument
from lorarep_server.watched_files import WatchedFiles


@dataclass(frozen=True)
class TlsFiles:
    """PEM files, checked for changes at each connection. With `client_ca`, callers need a certificate signed by it."""

    certificate: Path
    key: Path
    client_ca: Path | None

    def grpc_credentials(self) -> grpc.ServerCredentials:
        """Credentials for a gRPC server. Raises InvalidArgument if the files cannot be used."""

        def read() -> grpc.ServerCertificateConfiguration:
            # gRPC would notice only in a handshake, without an explanation.
            self._context()
            pair = self.key.read_bytes(), self.certificate.read_bytes()
            roots = None if self.client_ca is None else self.client_ca.read_bytes()
            return grpc.ssl_server_certificate_configuration([pair], roots)

        files = WatchedFiles(self._paths(), read)
        # None means "unchanged", which the type stubs do not know.
        changed: Any = files.changed
        return grpc.dynamic_ssl_server_credentials(files.first, changed, self.client_ca is not None)

    def contexts(self) -> Callable[[], ssl.SSLContext]:
        """Gives the context of each new connection. Raises InvalidArgument if the files cannot be used.

        A session can be resumed with the context that it began with, and no other. So what changed files no longer
        admit is not resumed either.
        """
        files = WatchedFiles(self._paths(), self._context)
        newest = files.first

        def context() -> ssl.SSLContext:
            nonlocal newest
            newest = files.changed() or newest
            return newest

        return context

    def _paths(self) -> list[Path]:
        return [path for path in (self.certificate, self.key, self.client_ca) if path is not None]

    def _context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_cert_chain(self.certificate, self.key, password="")  # no prompt for an encrypted key
        except (OSError, ValueError) as error:
            raise InvalidArgument(
                f"cannot use {str(self.certificate)!r} with key {str(self.key)!r}: {error}", field="tls_certificate"
            ) from error
        if self.client_ca is not None:
            try:
                context.load_verify_locations(self.client_ca)
            except (OSError, ValueError) as error:
                raise InvalidArgument(f"cannot use {str(self.client_ca)!r}: {error}", field="tls_client_ca") from error
            context.verify_mode = ssl.CERT_REQUIRED
        return context
