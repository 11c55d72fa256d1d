"""The one table from the runtime's errors to gRPC status codes."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass

from grpc import StatusCode

from lorarep_runtime.errors import (
    AlreadyExists,
    Cancelled,
    DataLoss,
    DeadlineExceeded,
    EngineFailure,
    Exhausted,
    FailedPrecondition,
    InvalidArgument,
    LorarepError,
    NotFound,
    PermissionDenied,
    Unavailable,
)

log = logging.getLogger(__name__)

CODES: Mapping[type[LorarepError], StatusCode] = {
    InvalidArgument: StatusCode.INVALID_ARGUMENT,
    NotFound: StatusCode.NOT_FOUND,
    AlreadyExists: StatusCode.ALREADY_EXISTS,
    PermissionDenied: StatusCode.PERMISSION_DENIED,
    FailedPrecondition: StatusCode.FAILED_PRECONDITION,
    DataLoss: StatusCode.DATA_LOSS,
    Exhausted: StatusCode.RESOURCE_EXHAUSTED,
    Unavailable: StatusCode.UNAVAILABLE,
    DeadlineExceeded: StatusCode.DEADLINE_EXCEEDED,
    Cancelled: StatusCode.CANCELLED,
    EngineFailure: StatusCode.INTERNAL,
}

MAX_MESSAGE = 512
"""Characters; a message travels in HTTP/2 headers, of which clients take 8 KiB."""
RETRY_HINT = "grpc-retry-pushback-ms"
"""Trailing metadata that clients with a retry policy obey (gRPC proposal A6)."""


@dataclass(frozen=True)
class Status:
    """What a caller is told of an error."""

    code: StatusCode
    message: str
    metadata: tuple[tuple[str, str], ...] = ()
    """Trailing metadata."""


def code_of(error: BaseException) -> StatusCode:
    """The status code of an error; INTERNAL for what is not in the table."""
    if isinstance(error, asyncio.CancelledError):
        return StatusCode.CANCELLED
    return CODES.get(type(error), StatusCode.INTERNAL)  # type: ignore[arg-type]


def status_of(error: BaseException) -> Status:
    """What the caller is told; of an error that is not in the table nothing, it is in the log."""
    code = code_of(error)
    if isinstance(error, asyncio.CancelledError):
        return Status(code, "the caller went away")
    if not isinstance(error, LorarepError):
        log.error("an unexpected error", exc_info=error)
        return Status(code, "internal error; the server's log has the details")
    if isinstance(error, Exhausted) and error.retry_after is not None:
        return Status(code, _sendable(error), ((RETRY_HINT, str(round(1000 * error.retry_after))),))
    return Status(code, _sendable(error))


def renamed(message: str, fields: Mapping[str, str]) -> tuple[str | None, str]:
    """The field that an error's message begins with, if it does, and the message, by names that the caller knows."""
    found = re.match(r"(prompt and max_new_tokens|[\w.-]+)(?=: )", message)
    if found is None:
        return None, message
    field = fields.get(found[0], found[0])
    return field, field + message[found.end() :]


def _sendable(error: LorarepError) -> str:
    """Its message, which may hold names of foreign files: of any length, and with what no UTF-8 stands for."""
    text = str(error).encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= MAX_MESSAGE else f"{text[: MAX_MESSAGE - 3]}..."
