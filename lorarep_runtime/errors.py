"""What can go wrong, as one tree. The server maps each class to one gRPC status code.

    LorarepError
    ├── InvalidArgument      a field is malformed or out of its range
    │   └── TooLong          a prompt, or it and its answer, has more tokens than can be computed together
    ├── NotFound             no such adapter, stack, repository or revision
    ├── AlreadyExists        the name is taken by something else
    ├── PermissionDenied     the repository is not on the allow-list
    ├── FailedPrecondition   well-formed, but nothing this server can honour
    ├── DataLoss             a file is corrupt or truncated
    ├── Exhausted            out of memory, pages, disk or queue places; `retry_after` is a hint in seconds
    ├── Unavailable          the hub cannot be reached, or the server is draining
    ├── DeadlineExceeded     the request's deadline passed
    ├── Cancelled            the caller went away
    └── EngineFailure        a forward pass failed; details are in the log

An error says which field it is about, of a request, a configuration or a file, where there is one. Messages name the
value and the limit.
"""

from __future__ import annotations

MAX_SHOWN = 80
"""Characters of a foreign value in a message."""


class LorarepError(Exception):
    """Base of every error that lorarep raises on purpose; as text it is "field: message"."""

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        """What is wrong, without the field's name."""
        self.field = field
        """Name of the field that is wrong, by lorarep's own names; None where no field is."""

    def __str__(self) -> str:
        return self.message if self.field is None else f"{self.field}: {self.message}"


class InvalidArgument(LorarepError):
    """A field is malformed or out of its range."""


class TooLong(InvalidArgument):
    """A prompt, or it and its answer, has more tokens than can be computed together."""


class NotFound(LorarepError):
    """No such adapter, stack, repository or revision."""


class AlreadyExists(LorarepError):
    """The name is taken by something else."""


class PermissionDenied(LorarepError):
    """The repository is not on the allow-list."""


class FailedPrecondition(LorarepError):
    """Well-formed, but asks for something this server cannot honour exactly."""


class DataLoss(LorarepError):
    """A file is corrupt or truncated."""


class Exhausted(LorarepError):
    """Out of memory, pages, disk or queue places."""

    def __init__(self, message: str, *, field: str | None = None, retry_after: float | None = None) -> None:
        super().__init__(message, field=field)
        self.retry_after = retry_after
        """Seconds after which a retry may succeed, or None."""


class Unavailable(LorarepError):
    """The hub cannot be reached, or the server is draining."""


class DeadlineExceeded(LorarepError):
    """The deadline of a request passed before its answer was complete."""

    def __init__(self, message: str, *, field: str | None = None, text: str = "") -> None:
        super().__init__(message, field=field)
        self.text = text
        """The end of the answer's text so far, if it was held back as the possible beginning of a stop string."""


class Cancelled(LorarepError):
    """The caller of a request cancelled it or closed the connection."""


class EngineFailure(LorarepError):
    """A forward pass of the engine failed."""


def shown(value: object) -> str:
    """A foreign value for a message: its `repr`, of at most MAX_SHOWN characters."""
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 3]}..."


def first_line(error: BaseException) -> str:
    """The first line that an error says, or its class where it says nothing."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
