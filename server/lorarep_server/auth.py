"""Authorization: the roles of bearer tokens, the role that each RPC needs, and the check of open addresses."""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from enum import IntEnum
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.descriptor import ServiceDescriptor

from lorarep_runtime.errors import InvalidArgument
from lorarep_server.addresses import is_loopback
from lorarep_server.config import ServerConfig
from lorarep_server.errors import Status
from lorarep_server.watched_files import WatchedFiles

log = logging.getLogger(__name__)


class Role(IntEnum):
    """The role of a token. Each role includes the ones before it."""

    ANYONE = 0
    GENERATE = 1
    ADMINISTER = 2


ROLES: Mapping[str, Role] = {
    "/lorarep.v1.GenerationService/Generate": Role.GENERATE,
    "/lorarep.v1.GenerationService/GenerateStream": Role.GENERATE,
    "/lorarep.v1.GenerationService/Tokenize": Role.GENERATE,
    "/lorarep.v1.AdapterService/LoadAdapter": Role.ADMINISTER,
    "/lorarep.v1.AdapterService/UnloadAdapter": Role.ADMINISTER,
    "/lorarep.v1.AdapterService/GetAdapter": Role.GENERATE,
    "/lorarep.v1.AdapterService/ListAdapters": Role.GENERATE,
    "/lorarep.v1.ModelService/GetModel": Role.GENERATE,
    "/lorarep.v1.ModelService/ListStacks": Role.GENERATE,
    "/lorarep.v1.ModelService/GetLedger": Role.GENERATE,
    "/fmaas.GenerationService/Generate": Role.GENERATE,
    "/fmaas.GenerationService/GenerateStream": Role.GENERATE,
    "/fmaas.GenerationService/Tokenize": Role.GENERATE,
    "/fmaas.GenerationService/ModelInfo": Role.GENERATE,
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": Role.GENERATE,
    # Kubernetes' probes send no token.
    "/grpc.health.v1.Health/Check": Role.ANYONE,
    "/grpc.health.v1.Health/List": Role.ANYONE,
    "/grpc.health.v1.Health/Watch": Role.ANYONE,
}
"""The role that each RPC needs. An RPC that is not in the table is refused to everybody."""

HTTP_ROLES: Mapping[str, Role] = {
    "/health": Role.ANYONE,
    "/ping": Role.ANYONE,
    "/v1/load_lora_adapter": Role.ADMINISTER,
    "/v1/unload_lora_adapter": Role.ADMINISTER,
}
"""The role that each path of the HTTP API needs. All others need GENERATE, but for the status page's own files."""

TOKEN_LINE = re.compile(rb"(generate|administer)[ \t]+([!-~]+)")


def check_roles(services: Iterable[ServiceDescriptor]) -> None:
    """Raises NotImplementedError unless each RPC of the services has a role in ROLES."""
    served = {f"/{service.full_name}/{method.name}" for service in services for method in service.methods}
    if forgotten := served - ROLES.keys():
        raise NotImplementedError(f"no role is set for {', '.join(sorted(forgotten))}")


def check_exposure(config: ServerConfig) -> None:
    """Raises InvalidArgument if other machines could call without token or certificate, unless `insecure` is set."""
    if config.token_file or config.tls_client_ca or config.insecure:
        return
    for field in ("listen", "metrics_listen", "openai_listen"):
        address: str | None = getattr(config, field)
        if address is not None and not is_loopback(address):
            raise InvalidArgument(
                f"{address!r} is open to other machines: set token_file or tls_client_ca, or insecure", field=field
            )


class TokenAuth(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Refuses calls whose bearer token does not have the role that they need. The token file may change meanwhile."""

    def __init__(self, token_file: Path) -> None:
        """Reads the tokens. Raises InvalidArgument if the file cannot be used."""
        self._file = WatchedFiles([token_file], lambda: read_tokens(token_file))
        self._tokens = self._file.first

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        method = handler_call_details.method
        needed = ROLES.get(method)
        given = [str(value) for key, value in handler_call_details.invocation_metadata if key == "authorization"]
        # Only callers with a token may learn whether an unknown method exists.
        if refusal := self.refusal(given, Role.GENERATE if needed is None else needed):
            return _refuse(method, refusal)
        handler = await continuation(handler_call_details)
        if handler is not None and needed is None:
            return _refuse(method, Status(grpc.StatusCode.PERMISSION_DENIED, "no role is known to be enough"))
        return handler

    def refusal(self, authorization: Sequence[str], needed: Role) -> Status | None:
        """The status that refuses a caller; None if it is allowed.

        Args:
            authorization: all values of the call's `authorization` metadata or header.
            needed: the role that the call needs.
        """
        if needed is Role.ANYONE:
            return None
        role = self._role(authorization)
        if role is None:
            return Status(grpc.StatusCode.UNAUTHENTICATED, "has to be 'Bearer' and a token", "authorization")
        if role is Role.ANYONE:
            return Status(grpc.StatusCode.UNAUTHENTICATED, "the token is not known", "authorization")
        if role < needed:
            return Status(grpc.StatusCode.PERMISSION_DENIED, f"needs a token to {needed.name.lower()}")
        return None

    def _role(self, authorization: Sequence[str]) -> Role | None:
        """The role of the call's token: ANYONE if the token is unknown, None if there is no token."""
        scheme, _, token = authorization[0].partition(" ") if len(authorization) == 1 else ("", "", "")
        if scheme.lower() != "bearer" or not token:
            return None
        if (tokens := self._file.changed()) is not None:
            self._tokens = tokens
        digest, role = _digest(token.encode("utf-8", "surrogateescape")), Role.ANYONE
        # All tokens are compared, each in constant time: the time taken reveals nothing.
        for known, known_role in self._tokens.items():
            if hmac.compare_digest(known, digest):
                role = known_role
        return role


def read_tokens(file: Path) -> dict[bytes, Role]:
    """Roles by the digest of their token, from lines `generate TOKEN` or `administer TOKEN`; # begins a comment line.

    Raises:
        InvalidArgument: the file cannot be read, has a malformed line, or has no token. The message reveals no token.
    """
    try:
        lines = file.read_bytes().splitlines()
    except OSError as error:
        raise InvalidArgument(f"cannot read {str(file)!r}: {error.strerror}", field="token_file") from error
    tokens: dict[bytes, Role] = {}
    for number, line in enumerate(map(bytes.strip, lines), 1):
        if not line or line.startswith(b"#"):
            continue
        found = TOKEN_LINE.fullmatch(line)
        if found is None:
            raise InvalidArgument(
                f"line {number} of {str(file)!r} is not 'generate TOKEN' or 'administer TOKEN'", field="token_file"
            )
        digest = _digest(found[2])
        if digest in tokens:
            raise InvalidArgument(
                f"line {number} of {str(file)!r} has the token of a line before it", field="token_file"
            )
        tokens[digest] = Role[found[1].decode().upper()]
    if not tokens:
        raise InvalidArgument(f"{str(file)!r} has no token", field="token_file")
    return tokens


def _digest(token: bytes) -> bytes:
    return hashlib.sha256(token).digest()


def _refuse(method: str, refusal: Status) -> Any:
    """A handler that refuses a call of any kind without reading its request."""

    async def refuse(requests: Any, context: Any) -> None:
        log.info("%r %s", method, refusal.code.name)
        await context.abort(refusal.code, refusal.text)

    return grpc.stream_stream_rpc_method_handler(refuse)
