"""A stand-in for the Hub that records requests and injects faults."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from lorarep_server.demo.hub_stand_in import HubHandler, HubStandIn

XET_HASH = "0123456789abcdef" * 4
"""The address of a large file in Xet storage."""


@dataclass(frozen=True)
class Asked:
    """One recorded request."""

    method: str
    path: str
    range: str | None
    agent: str

    @property
    def file(self) -> str:
        """The last part of the path."""
        return self.path.rpartition("/")[2]

    @property
    def is_look(self) -> bool:
        """Whether it asks for the beginning of a file alone, as the look at a header does."""
        return self.range is not None and self.range.startswith("bytes=0-") and not self.range.endswith("-")


class FaultyHub(HubStandIn):
    """A stand-in for the Hub with faults to set. Without a fault it behaves like `HubStandIn`."""

    def __init__(self) -> None:
        self.asked: list[Asked] = []
        self.served: Counter[str] = Counter()
        """Bytes of bodies that were sent, by file name."""
        self.faulty = ""
        """Requests whose path contains this text are subject to `status` and `stalled`."""
        self.status: int | None = None
        """HTTP status of the answer to faulty requests, which also asks for a long pause."""
        self.stalled = False
        """Whether faulty requests are never answered."""
        self.cuts: dict[str, list[int]] = {}
        """By file name: the bytes after which the connection of each next download breaks. Looks are no downloads."""
        self.hangs: dict[str, int] = {}
        """By file name: the bytes after which a download hangs."""
        self.claims: dict[str, int] = {}
        """By file name: the size that listings and headers claim."""
        self.garbage: bytes | None = None
        """The body of every answer about a repository, in place of JSON."""
        self.renamed: dict[str, str] = {}
        """New names of repositories, to which requests for the old ones are sent on."""
        self.fails_looks = False
        """Whether requests for the beginning of a file fail."""
        self.has_xet = False
        """Whether large files are in Xet storage too, whose server never answers."""
        self.hanging = threading.Event()
        self._closed = threading.Event()
        super().__init__(FaultyHandler)

    def downloads(self) -> list[str]:
        """The names of the files whose content was requested."""
        return sorted(
            asked.file
            for asked in self.asked
            if asked.method == "GET" and "/resolve/" in asked.path and not asked.is_look
        )

    def hang(self) -> None:
        """Waits until the Hub closes, or beyond any client's patience."""
        self.hanging.set()
        self._closed.wait(60)

    def close(self) -> None:
        self._closed.set()
        super().close()


class FaultyHandler(HubHandler):
    def answer(self) -> None:
        hub = self.hub
        path = unquote(self.path.partition("?")[0])
        hub.asked.append(Asked(self.command, path, self.headers.get("Range"), self.headers.get("User-Agent", "")))
        if hub.fails_looks and hub.asked[-1].is_look:
            self.send(500)
        elif path.startswith("/xet/") or (hub.stalled and hub.faulty in path):
            hub.hang()
        elif "/xet-read-token/" in path:
            self.send(
                200,
                {
                    "X-Xet-Cas-Url": f"{hub.url}/xet",
                    "X-Xet-Access-Token": "token",
                    "X-Xet-Token-Expiration": "4000000000",
                },
            )
        elif hub.status is not None and hub.faulty in path:
            self.send(hub.status, {"Retry-After": "3600"})
        elif old := next((name for name in hub.renamed if f"/{name}/" in f"{path}/"), None):
            self.send(307, {"Location": hub.url + self.path.replace(f"/{old}", f"/{hub.renamed[old]}", 1)})
        else:
            super().answer()

    def send(self, status: int, headers: Mapping[str, str] | None = None, body: bytes = b"") -> None:
        claim = self.hub.claims.get(self.file)
        if self.hub.has_xet and "X-Linked-Etag" in (headers or {}):
            route = f"{self.hub.url}/api/models/org/name/xet-read-token/main"
            headers = {**(headers or {}), "X-Xet-Hash": XET_HASH, "X-Xet-Refresh-Route": route}
        if status != 200 or claim is None:
            super().send(status, headers, body)
            return
        self.send_response(status)
        for name, value in {**(headers or {}), "X-Linked-Size": claim, "Content-Length": claim}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.send_body(body)

    def send_json(self, value: Any, headers: Mapping[str, str] | None = None) -> None:
        if self.hub.garbage is not None:
            self.send(200, {"Content-Type": "application/json"}, self.hub.garbage)
            return
        for entry in value if isinstance(value, list) else ():
            if claim := self.hub.claims.get(entry.get("path", "")):
                entry["size"] = claim
                entry.get("lfs", {})["size"] = claim
            if self.hub.has_xet and "lfs" in entry:
                entry["xetHash"] = XET_HASH
        super().send_json(value, headers)

    @property
    def file(self) -> str:
        """The last part of the path."""
        return unquote(self.path.partition("?")[0]).rpartition("/")[2]

    def send_body(self, body: bytes) -> None:
        hub, name = self.hub, self.file
        if Asked(self.command, "", self.headers.get("Range"), "").is_look:
            super().send_body(body)
            return
        stop = hub.cuts[name].pop(0) if hub.cuts.get(name) else hub.hangs.get(name, len(body))
        super().send_body(body[:stop])
        hub.served[name] += len(body[:stop])
        if name in hub.hangs:
            self.wfile.flush()
            hub.hang()

    @property
    def hub(self) -> FaultyHub:
        assert isinstance(self.server.hub, FaultyHub)
        return self.server.hub
