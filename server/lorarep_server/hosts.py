"""Which web pages may ask a port of HTTP that asks for no credentials: none but its own.

Any page can have its own name lead to 127.0.0.1 (DNS rebinding). A browser on this machine then takes a port here for
a part of that page. Yet the browser says which name it asked for (`Host`), and which page asks (`Origin`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import urlsplit

from aiohttp import web
from grpc import StatusCode

from lorarep_runtime.errors import InvalidArgument
from lorarep_server.addresses import is_loopback, is_loopback_host
from lorarep_server.config import ServerConfig
from lorarep_server.errors import Status

log = logging.getLogger(__name__)


class HostCheck:
    """Refuses requests that were meant for another host than this machine, or that a page from elsewhere sends."""

    def __init__(self, allowed: Iterable[str]) -> None:
        """
        Args:
            allowed: further names of this machine, such as a proxy's, without a port. IPv6 has brackets.

        Raises:
            InvalidArgument: one is no name alone.
        """
        self._allowed = {_allowed_name(name) for name in allowed}

    def refusal(self, request: web.BaseRequest) -> Status | None:
        """The status that refuses a request; None if it may pass."""
        hosts = request.headers.getall("Host", [])
        name = _name(hosts[0]) if len(hosts) == 1 else None
        if name is None or not (name in self._allowed or is_loopback_host(name)):
            return _refusal(", ".join(hosts), "host")
        for origin in request.headers.getall("Origin", []):
            site = origin.partition("://")[2]
            if site.lower() != hosts[0].lower() and _name(site) not in self._allowed:
                return _refusal(origin, "origin")
        return None


@dataclass(frozen=True)
class HostChecks:
    """The checks of a server's ports; None where callers show credentials, or where other machines may call anyway."""

    metrics: HostCheck | None
    openai: HostCheck | None


def host_checks(config: ServerConfig) -> HostChecks:
    """The checks of a server's ports. Says so in the log if there is none that further names could be for.

    Raises:
        InvalidArgument: a further name is none.
    """
    check = HostCheck(config.allow_hosts)
    has_credentials = config.token_file is not None or config.tls_client_ca is not None
    has_pages = config.openai_listen is not None and not has_credentials
    checks = HostChecks(
        check if is_loopback(config.metrics_listen) else None,
        check if has_pages and is_loopback(config.openai_listen or "") else None,
    )
    if config.allow_hosts and checks == HostChecks(None, None):
        log.warning("--allow-host changes nothing: no port of HTTP here looks at the name that it is asked for")
    return checks


def _refusal(given: str, field: str) -> Status:
    return Status(StatusCode.PERMISSION_DENIED, f"{given!r} is not this server; --allow-host adds a name", field)


def _allowed_name(given: str) -> str:
    name = _name(given)
    if name is None or given.lower().removesuffix(".") not in (name, f"[{name}]"):
        raise InvalidArgument(f"{given!r} is no host name alone, without scheme and port", field="allow_host")
    return name


def _name(host: str) -> str | None:
    """The name in "HOST" or "HOST:PORT"; None if it is neither."""
    try:
        name = urlsplit(f"//{host}").hostname
    except ValueError:
        return None
    return None if name is None or "@" in host else name.removesuffix(".")
