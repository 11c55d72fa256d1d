"""The statuses of errors: one table maps the runtime's errors to gRPC status codes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace

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
    TooLong,
    Unavailable,
)

log = logging.getLogger(__name__)

CODES: Mapping[type[LorarepError], StatusCode] = {
    InvalidArgument: StatusCode.INVALID_ARGUMENT,
    TooLong: StatusCode.INVALID_ARGUMENT,
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
"""Most characters of a message. It is sent in HTTP/2 headers, of which clients accept 8 KiB."""
RETRY_HINT = "grpc-retry-pushback-ms"
"""Trailing metadata that clients with a retry policy obey (gRPC proposal A6)."""


@dataclass(frozen=True)
class Status:
    """The status of a failed call, as its caller sees it."""

    code: StatusCode
    message: str
    field: str | None = None
    """The field that the message is about, by lorarep's own names."""
    metadata: tuple[tuple[str, str], ...] = ()
    """Trailing metadata."""
    is_too_long: bool = False
    """Whether a prompt, or it and its answer, has too many tokens."""

    def named(self, names: Mapping[str, str]) -> Status:
        """The same status with the field under a protocol's own name.

        Args:
            names: the protocol's names of fields, by lorarep's own, where the two differ.
        """
        return self if self.field is None else replace(self, field=names.get(self.field, self.field))

    @property
    def text(self) -> str:
        """The field and the message as valid UTF-8 of at most MAX_MESSAGE characters.

        Names of foreign files in a message may be longer, and of any bytes.
        """
        whole = self.message if self.field is None else f"{self.field}: {self.message}"
        whole = whole.encode("utf-8", "backslashreplace").decode()
        return whole if len(whole) <= MAX_MESSAGE else f"{whole[: MAX_MESSAGE - 3]}..."


def code_of(error: BaseException) -> StatusCode:
    """The status code of an error; INTERNAL if its class is not in the table."""
    if isinstance(error, asyncio.CancelledError):
        return StatusCode.CANCELLED
    return CODES.get(type(error), StatusCode.INTERNAL)  # type: ignore[arg-type]


def status_of(error: BaseException) -> Status:
    """The status that an error has for the caller. Details of an unexpected error are in the log alone."""
    code = code_of(error)
    if isinstance(error, asyncio.CancelledError):
        return Status(code, "the caller went away")
    if not isinstance(error, LorarepError):
        log.error("an unexpected error", exc_info=error)
        return Status(code, "internal error; the server's log has the details")
    if isinstance(error, Exhausted) and error.retry_after is not None:
        return Status(code, error.message, error.field, ((RETRY_HINT, str(round(1000 * error.retry_after))),))
    return Status(code, error.message, error.field, is_too_long=isinstance(error, TooLong))
