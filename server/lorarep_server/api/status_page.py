"""The page at `/` for a wall screen and a phone, and `GET /status`, which is all that it knows.

That is what the engine counts anyway, as it is at the moment; rates and quantiles the page takes from one answer to the
next.
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
    from lorarep_runtime.adapters.registry import AdapterInfo, Tier
    from lorarep_runtime.engine.engine import Engine

FILES: Mapping[str, tuple[str, str]] = {
    "/": ("status_page.html", "text/html"),
    "/page.js": ("status_page.js", "text/javascript"),
}
"""What is at which path, and of which type. Anyone may have it: it is the same wherever lorarep is served."""
MAX_ADAPTERS = 100
"""In one answer: a screen holds no more, and 10,000 would be megabytes each second."""
TIERS: tuple[Tier, ...] = ("device", "host", "disk")


class StatusPage:
    """The page, to be served with other paths. For the event loop's thread."""

    def __init__(self, engine: Callable[[], Engine], desired: Reconciler, metrics: Metrics) -> None:
        self._engine = engine
        self._desired = desired
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
        """One of FILES."""
        return web.Response(
            text=self._files[request.path], content_type=FILES[request.path][1], charset="utf-8", headers=self._headers
        )

    async def status(self) -> dict[str, Any] | Status:
        """What is served and how it goes, for JSON, in bytes, seconds and counts since the start; or why not.

        This is none of the calls under way: it is answered to the last, and however many those are.
        """
        try:
            engine, desired = self._engine(), self._desired.all()
            errors = {name: self._desired.error(name) for name in desired}
            return await asyncio.to_thread(self._status, engine, desired, errors)
        except Exception as error:
            return status_of(error)

    def _status(
        self, engine: Engine, desired: Mapping[str, DesiredAdapter], errors: Mapping[str, str]
    ) -> dict[str, Any]:
        base, ledger = engine.base, engine.ledger()
        infos = {info.name: info for info in engine.adapters.list()}
        shown = heapq.nsmallest(
            MAX_ADAPTERS,
            desired.keys() | infos.keys(),
            key=lambda name: _rank(name, infos.get(name), errors.get(name, "")),
        )
        names: dict[Stack, list[str]] = {}
        for name, stack in engine.stacks.items():
            names.setdefault(stack, []).append(name)
        for name in shown:
            if name in infos:
                names.setdefault(infos[name].stack, [])
        numbers = {stack: number for number, stack in enumerate(names)}
        walked, tiers = Counter(info.stack for info in infos.values()), Counter(info.tier for info in infos.values())
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
                {"names": names[stack], "layers": stack, "ranges": ranges_of(stack), "adapters": walked[stack]}
                for stack in names
            ],
            "adapters": [
                _loaded(infos[name], numbers, errors.get(name, ""))
                if name in infos
                else _absent(desired[name], errors[name])
                for name in shown
            ],
            "adapters_total": len(desired.keys() | infos.keys()),
            "tiers": {tier: tiers[tier] for tier in TIERS},
            "memory": ledger.categories,
            "peft_bytes": ledger.peft_bytes,
            "stats": asdict(engine.stats()),
            "latency": self._metrics.latencies(),
        }


def _rank(name: str, info: AdapterInfo | None, error: str) -> tuple[bool, bool, int, int, str]:
    """What is wrong comes first, then what is on its way, in use, and near."""
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
    """Nothing but what the server itself sends: this style, its own script, its own answers."""
    style = re.search(r"<style>(.*?)</style>", html, re.DOTALL)
    assert style is not None
    digest = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
    return (
        f"default-src 'none'; script-src 'self'; style-src 'sha256-{digest}'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
