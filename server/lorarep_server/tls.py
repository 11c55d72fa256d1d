"""The server's end of TLS, with certificates that are renewed in place."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any

import grpc

from lorarep_runtime.errors import InvalidArgument
from lorarep_server.watched import Watched


def server_credentials(certificate: Path, key: Path, client_ca: Path | None) -> grpc.ServerCredentials:
    """Credentials of PEM files, looked at anew for each connection. With `client_ca`, callers need a certificate of it.

    Raises:
        InvalidArgument: the files cannot be used.
    """

    def read() -> grpc.ServerCertificateConfiguration:
        # gRPC would only find out in a handshake, and say nothing of why. An encrypted key must not ask the terminal.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_cert_chain(certificate, key, password="")
            pair = key.read_bytes(), certificate.read_bytes()
        except (OSError, ValueError) as error:
            raise InvalidArgument(
                f"tls_certificate: cannot use {str(certificate)!r} with key {str(key)!r}: {error}"
            ) from error
        if client_ca is None:
            return grpc.ssl_server_certificate_configuration([pair])
        try:
            context.load_verify_locations(client_ca)
            roots = client_ca.read_bytes()
        except (OSError, ValueError) as error:
            raise InvalidArgument(f"tls_client_ca: cannot use {str(client_ca)!r}: {error}") from error
        return grpc.ssl_server_certificate_configuration([pair], roots)

    files = Watched([certificate, key] if client_ca is None else [certificate, key, client_ca], read)
    # None stands for "as before", which the stubs do not know.
    changed: Any = files.changed
    return grpc.dynamic_ssl_server_credentials(files.first, changed, client_ca is not None)
