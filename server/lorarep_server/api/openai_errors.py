"""Errors as OpenAI's HTTP API reports them: an HTTP status, and a JSON body with type, code and param."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import partial
from typing import Any

from aiohttp import web
from grpc import StatusCode

from lorarep_server.errors import RETRY_HINT, Status

HTTP: Mapping[StatusCode, tuple[int, str, str | None]] = {
    StatusCode.INVALID_ARGUMENT: (400, "invalid_request_error", None),
    StatusCode.FAILED_PRECONDITION: (400, "invalid_request_error", None),
    StatusCode.UNAUTHENTICATED: (401, "invalid_request_error", "invalid_api_key"),
    StatusCode.PERMISSION_DENIED: (403, "permission_error", None),
    StatusCode.NOT_FOUND: (404, "invalid_request_error", "model_not_found"),
    StatusCode.ALREADY_EXISTS: (409, "invalid_request_error", None),
    StatusCode.RESOURCE_EXHAUSTED: (429, "rate_limit_error", None),
    StatusCode.CANCELLED: (499, "server_error", None),
    StatusCode.UNAVAILABLE: (503, "server_error", None),
    StatusCode.DEADLINE_EXCEEDED: (504, "server_error", None),
}
"""The HTTP status, and OpenAI's type and code of an error. Statuses that are not in the table are 500."""

TOO_LONG = "context_length_exceeded"
"""OpenAI's code of prompts and answers that are too long, which clients look for to shorten them."""

FIELDS: Mapping[str, str] = {
    "adapter": "model",
    "adapters": "model",
    "repository": "model",
    "stack": "model",
    "prompt.chat": "messages",
    "prompt.chat.template_arguments": "chat_template_kwargs",
    "prompt.chat.add_generation_prompt": "add_generation_prompt",
    "prompt.chat.tools": "tools",
    "prompt.chat.tools.parameters": "tools",
    "prompt.chat.tool_name": "tool_choice",
    "prompt.chat.messages.tool_calls": "messages",
    "min_new_tokens": "min_tokens",
}
"""OpenAI's names of fields by lorarep's own, where the two differ."""


to_json = partial(json.dumps, allow_nan=False)
"""JSON has no NaN and no infinity: a value that has one is an error, and no client has to read it."""
json_response = partial(web.json_response, dumps=to_json)


def error_response(status: Status, fields: Mapping[str, str] = FIELDS) -> web.Response:
    """The HTTP response that reports a status.

    Args:
        fields: OpenAI's names of fields, by lorarep's own.
    """
    headers = retry_headers(status)
    if status.code is StatusCode.UNAUTHENTICATED:
        headers["WWW-Authenticate"] = "Bearer"
    code, *_ = HTTP.get(status.code, (500,))
    return json_response(error_body(status, fields), status=code, headers=headers)


def retry_headers(status: Status) -> dict[str, str]:
    """The headers that say when another attempt makes sense, where the status says so."""
    if milliseconds := dict(status.metadata).get(RETRY_HINT):
        return {"Retry-After": str(math.ceil(int(milliseconds) / 1000)), "Retry-After-Ms": milliseconds}
    return {}


def error_body(status: Status, fields: Mapping[str, str]) -> dict[str, Any]:
    """The JSON body that reports a status; its `param` is the field under OpenAI's name."""
    _, kind, code = HTTP.get(status.code, (500, "server_error", None))
    code = TOO_LONG if status.is_too_long else code
    named = status.named(fields)
    return _body(named.text, kind, named.field, code)


def bad_request(message: str, http_status: int) -> web.Response:
    """The response to an HTTP request that no handler has seen."""
    return json_response(_body(message, "invalid_request_error"), status=http_status)


def _body(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
