"""Bodies of OpenAI's API: read in bounded time and memory, and parsed."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable
from typing import TypeVar

from aiohttp import web
from pydantic import ValidationError

from lorarep_runtime.errors import DeadlineExceeded, InvalidArgument, TooLong, shown
from lorarep_server.api.openai_fields import Message
from lorarep_server.config import MAX_MESSAGE
from lorarep_server.requests.admission import LONG_MESSAGE
from lorarep_server.requests.message_bounds import most_bytes

log = logging.getLogger(__name__)

M = TypeVar("M", bound=Message)

BODY_SECONDS = 60.0
"""Seconds for a body to arrive."""
LIST = re.compile(rb'"prompt"\s*:\s*\[\s*["\[]')
"""How a list of prompts begins. A list of numbers is one prompt."""
MOST_LOGGED = 16
"""Most names of ignored fields in one line of the log."""


class Bodies:
    """Reads the bodies of requests."""

    def __init__(self, max_tokens: Callable[[], int], *, ignores_unknown: bool) -> None:
        """
        Args:
            max_tokens: gives the most tokens of a prompt, or raises Unavailable.
            ignores_unknown: whether unknown fields are ignored, and logged, instead of refused.
        """
        self._max_tokens = max_tokens
        self._ignores_unknown = ignores_unknown

    async def read(self, kind: type[M], request: web.Request) -> M:
        """The message in a body of JSON; a long one is parsed in a thread.

        Raises:
            InvalidArgument: the body is none, with the path of the first wrong field.
            TooLong, DeadlineExceeded: as `_body`.
        """
        if request.content_type != "application/json":  # which no web page sends elsewhere without permission
            raise InvalidArgument(f"is {request.content_type!r} and has to be application/json", field="content-type")
        body = await _body(request, most_bytes(self._max_tokens()))
        ignored: list[str] | None = [] if self._ignores_unknown else None
        if len(body) > LONG_MESSAGE:
            parsed = await asyncio.to_thread(_parsed, kind, body, ignored)
        else:
            parsed = _parsed(kind, body, ignored)
        if ignored:
            log.warning("%s ignores %s", request.path, ", ".join(map(shown, ignored[:MOST_LOGGED])))
        return parsed


async def _body(request: web.Request, most: int) -> bytes:
    """The body of a request.

    Raises:
        InvalidArgument: it is broken, or has a list of prompts and is longer than `most` bytes.
        TooLong: it is longer than that with one prompt.
        DeadlineExceeded: it does not end in time.
    """
    length = request.content_length or 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            body = await (request.content.readany() if length > most else request.read())
    except TimeoutError as error:
        raise DeadlineExceeded(f"has not arrived within {BODY_SECONDS:g} seconds", field="body") from error
    except web.RequestPayloadError as error:
        raise InvalidArgument(str(error.args[0] if error.args else error), field="body") from error
    except web.HTTPRequestEntityTooLarge as error:
        raise InvalidArgument(f"is over the limit of {MAX_MESSAGE} bytes", field="body") from error
    length = max(length, len(body))
    if length > most and LIST.search(body, 0, most):
        raise InvalidArgument(
            f"{length} bytes are over the limit of {most} for all prompts of a list together", field="prompt"
        )
    if length > most:
        raise TooLong(f"{length} bytes are over the limit of {most}", field="body")
    return body


def _parsed(kind: type[M], body: bytes, ignored: list[str] | None) -> M:
    """The message in a body of JSON. Raises InvalidArgument, which names the path of the first wrong field.

    Args:
        ignored: gets the names of unknown fields, which are ignored then; None has them refused.
    """
    try:
        return kind.model_validate_json(body, context=ignored)
    except ValidationError as invalid:
        error = invalid.errors(include_url=False, include_input=False)[0]
        # Pydantic's path also has names of alternatives, such as "list[int]".
        path = [str(at) for at in error["loc"] if isinstance(at, int) or (at.isidentifier() and at != "str")]
        message = error["msg"]
        if error["type"] == "extra_forbidden" or (error["type"] == "too_long" and not error["ctx"]["max_length"]):
            message = "is not supported"
        raise InvalidArgument(message, field=".".join(path) or "body") from None
