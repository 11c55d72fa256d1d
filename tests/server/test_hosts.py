"""Web pages that reach a server on this machine under a name of their own, or that send requests from elsewhere."""

from __future__ import annotations

import contextlib
import http.client
import json
import urllib.parse
from pathlib import Path
from typing import Any

import pytest
from aiohttp.test_utils import make_mocked_request
from lorarep_server.config import ServerConfig
from lorarep_server.hosts import HostCheck, host_checks

from lorarep_runtime.errors import InvalidArgument
from tests.support.servers import SECONDS, Server


def answer(port: int, path: str, **headers: str) -> tuple[int, bytes]:
    """The status and the body of a request with these headers."""
    connection = http.client.HTTPConnection("127.0.0.1", port, SECONDS)
    with contextlib.closing(connection):
        connection.request("GET", path, headers=headers)
        response = connection.getresponse()
        return response.status, response.read()


@pytest.mark.parametrize(
    ("headers", "field"),
    [
        ({"Host": "evil.example"}, "host"),
        ({"Host": "127.0.0.1.evil.example:8000"}, "host"),
        ({"Host": "localhost", "Origin": "http://evil.example"}, "origin"),
        ({"Host": "localhost:8000", "Origin": "http://localhost:3000"}, "origin"),
        ({"Host": "localhost", "Origin": "null"}, "origin"),
        ({"Host": "localhost"}, None),
        ({"Host": "127.0.0.1:8000", "Origin": "http://127.0.0.1:8000"}, None),
    ],
    ids=str,
)
def test_pages_from_elsewhere_are_refused(server: Server, headers: dict[str, str], field: str | None) -> None:
    for path in ("/", "/status", "/v1/models", "/absent"):
        status, body = answer(server.openai_port, path, **headers)
        assert (status == 403) == (field is not None), (path, status)
        if field is not None:
            error = json.loads(body)["error"]
            assert (error["type"], error["param"]) == ("permission_error", field)
            assert "--allow-host" in error["message"]
    status, _ = answer(urllib.parse.urlsplit(server.metrics_url).port, "/metrics", **headers)
    assert status == (200 if field is None else 403)


@pytest.mark.parametrize(
    ("headers", "passes"),
    [
        ({"Host": "Chat.Example:80"}, True),
        ({"Host": "chat.example.", "Origin": "https://chat.example"}, True),
        ({"Host": "localhost", "Origin": "https://chat.example:8443"}, True),  # a proxy that names the server itself
        ({"Host": "[::1]:8000"}, True),
        ({"Host": "LOCALHOST"}, True),
        ({"Host": "other.example"}, False),
        ({"Host": "chat.example.evil.example"}, False),
        ({"Host": "evil@localhost"}, False),
        ({"Host": "0.0.0.0:8000"}, False),
        ({"Host": "[::1"}, False),
        ({"Host": ""}, False),
        ({}, False),
    ],
    ids=str,
)
def test_names_are_allowed_by_the_operator(headers: dict[str, str], passes: bool) -> None:
    check = HostCheck(["chat.example"])
    assert (check.refusal(make_mocked_request("GET", "/", headers=headers)) is None) == passes


@pytest.mark.parametrize("given", ["Chat.Example.", "[::2]"])
def test_a_name_may_be_spelt_as_a_browser_spells_it(given: str) -> None:
    asked = make_mocked_request("GET", "/", headers={"Host": f"{given.lower()}:8443"})
    assert HostCheck([given]).refusal(asked) is None


@pytest.mark.parametrize("given", ["chat.example:8443", "https://chat.example", "chat.example/", "::2", "a@b", ""])
def test_what_is_no_name_alone_is_refused_at_the_start(given: str) -> None:
    with pytest.raises(InvalidArgument, match=r"^allow_host: .* without scheme and port"):
        HostCheck([given])


@pytest.mark.parametrize(
    ("fields", "checked"),
    [
        ({}, "metrics"),
        ({"openai_listen": "127.0.0.1:0"}, "metrics openai"),
        ({"openai_listen": "127.0.0.1:0", "token_file": Path("tokens")}, "metrics"),
        ({"openai_listen": "127.0.0.1:0", "tls_client_ca": Path("ca")}, "metrics"),
        ({"openai_listen": "0.0.0.0:8000", "metrics_listen": "0.0.0.0:9095"}, ""),
        ({"openai_listen": "127.0.0.1:0", "metrics_listen": "0.0.0.0:9095"}, "openai"),
        ({"metrics_listen": "0.0.0.0:9095"}, ""),
    ],
    ids=str,
)
def test_ports_that_ask_for_credentials_or_are_open_have_any_name(
    fields: dict[str, Any], checked: str, caplog: pytest.LogCaptureFixture
) -> None:
    """An operator who allows a name there is told that this changes nothing."""
    checks = host_checks(ServerConfig(**fields, allow_hosts=("chat.example",)))
    assert " ".join(name for name in ("metrics", "openai") if getattr(checks, name)) == checked
    assert ("--allow-host changes nothing" in caplog.text) == (not checked)
    caplog.clear()
    host_checks(ServerConfig(**fields))
    assert caplog.text == ""
    with pytest.raises(InvalidArgument, match="allow_host"):
        host_checks(ServerConfig(**fields, allow_hosts=("a:1",)))
