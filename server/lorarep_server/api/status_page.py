"""The status page at `/`, for a wall screen and a phone, and `GET /status`, the JSON that it shows.

The JSON has the engine's counts at the moment. The page computes rates and quantiles from successive answers.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import heapq
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aiohttp import web

from lorarep_runtime.model.stack import Stack, ranges_of
from lorarep_server.errors import Status, status_of
from lorarep_server.loading.adapters_file import DesiredAdapter
from lorarep_server.loading.reconciler import Reconciler
from lorarep_server.telemetry.metrics import Metrics

if TYPE_CHECKING:
    from lorarep_runtime.adapters.resident import Tier
    from lorarep_runtime.adapters.revision import AdapterInfo
    from lorarep_runtime.engine.engine import Engine

FILES: Mapping[str, tuple[str, str]] = {
    "/": ("status_page.html", "text/html"),
    "/page.js": ("status_page.js", "text/javascript"),
}
"""The page's files and their content types, by path. They are public: they are the same on every server."""
MAX_ADAPTERS = 100
"""Most adapters in one answer. A screen holds no more, and 10,000 would be megabytes each second."""
TIERS: tuple[Tier, ...] = ("device", "host", "disk")


class StatusPage:
    """The handlers of the page. They run in the event loop's thread."""

    def __init__(self, engine: Callable[[], Engine], reconciler: Reconciler, metrics: Metrics) -> None:
        self._engine = engine
        self._reconciler = reconciler
        self._metrics = metrics
        self._started = time.time()
        self._files = {path: Path(__file__).with_name(name).read_text("utf-8") for path, (name, _) in FILES.items()}
        self._headers = {
            "Cache-Control": "no-cache",
            "Content-Security-Policy": _policy(self._files["/"]),
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
        }

    async def file(self, request: web.Request) -> web.Response:
        """Serves one file of the status page, by its path in FILES."""
        return web.Response(
            text=self._files[request.path], content_type=FILES[request.path][1], charset="utf-8", headers=self._headers
        )

    async def status(self) -> dict[str, Any] | Status:
        """The state of the server for JSON: bytes, seconds, and counts since the start. A Status if it is not serving.

        The request passes no admission: it is answered until the end, however many calls are running.
        """
        try:
            engine, entries = self._engine(), self._reconciler.all()
            errors = {name: self._reconciler.error(name) for name in entries}
            return await asyncio.to_thread(self._status, engine, entries, errors)
        except Exception as error:
            return status_of(error)

    def _status(
        self, engine: Engine, entries: Mapping[str, DesiredAdapter], errors: Mapping[str, str]
    ) -> dict[str, Any]:
        base, ledger = engine.base, engine.ledger()
        infos = {info.name: info for info in engine.adapters.list()}
        shown = heapq.nsmallest(
            MAX_ADAPTERS,
            entries.keys() | infos.keys(),
            key=lambda name: _rank(name, infos.get(name), errors.get(name, "")),
        )
        names: dict[Stack, list[str]] = {}
        for name, stack in engine.stacks.items():
            names.setdefault(stack, []).append(name)
        for name in shown:
            if name in infos:
                names.setdefault(infos[name].stack, [])
        numbers = {stack: number for number, stack in enumerate(names)}
        adapters, tiers = Counter(info.stack for info in infos.values()), Counter(info.tier for info in infos.values())
        return {
            "started": self._started,
            "time": time.monotonic(),
            "base": {
                "repository": base.repository,
                "commit": base.commit,
                "quantization": base.quantization,
                "dtype": str(base.dtype).removeprefix("torch."),
                "device": str(base.device),
                "layers": base.layers,
            },
            "stacks": [
                {"names": names[stack], "layers": stack, "ranges": ranges_of(stack), "adapters": adapters[stack]}
                for stack in names
            ],
            "adapters": [
                _loaded(infos[name], numbers, errors.get(name, ""))
                if name in infos
                else _absent(entries[name], errors[name])
                for name in shown
            ],
            "adapters_total": len(entries.keys() | infos.keys()),
            "tiers": {tier: tiers[tier] for tier in TIERS},
            "memory": ledger.categories,
            "peft_bytes": ledger.peft_bytes,
            "stats": asdict(engine.stats()),
            "latency": self._metrics.latencies(),
        }


def _rank(name: str, info: AdapterInfo | None, error: str) -> tuple[bool, bool, int, int, str]:
    """The sort key of an adapter: failed ones come first, then loading ones, ones in use, and the nearest tier."""
    if info is None:
        return not error, False, 0, 0, name
    return not error, True, -info.references, TIERS.index(info.tier), name


def _loaded(info: AdapterInfo, numbers: Mapping[Stack, int], error: str) -> dict[str, Any]:
    return {
        "name": info.name,
        "repository": info.repository,
        "state": "loaded",
        "error": error,
        "tier": info.tier,
        "stack": numbers[info.stack],
        "kind": info.kind,
        "rank": info.rank,
        "bytes": info.bytes,
        "references": info.references,
        "pinned": info.pinned,
    }


def _absent(entry: DesiredAdapter, error: str) -> dict[str, Any]:
    state = "failed" if error else "loading"
    return {"name": entry.name, "repository": entry.repository, "state": state, "error": error}


def _policy(html: str) -> str:
    """The content security policy of the page: only its own style and script, and only requests to this server."""
    style = re.search(r"<style>(.*?)</style>", html, re.DOTALL)
    assert style is not None
    digest = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
    return (
        f"default-src 'none'; script-src 'self'; style-src 'sha256-{digest}'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
