"""The status page in Chromium, and its JSON against gRPC and the metrics of the same server."""

from __future__ import annotations

import asyncio
import json
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lorarep.v1 import adapters_pb2, model_pb2
from lorarep_server.api.status_page import StatusPage
from lorarep_server.loading.adapters_file import DesiredAdapter
from lorarep_server.telemetry.metrics import Metrics
from playwright.sync_api import Browser, expect
from playwright.sync_api import Page as Tab
from prometheus_client import CollectorRegistry

from lorarep_runtime.adapters.revision import AdapterInfo
from lorarep_runtime.engine.ledger import Ledger
from lorarep_runtime.engine.stats import Stats
from tests.support.browser import chromium
from tests.support.callers import adapters, load, request, streaming, unload
from tests.support.secured import BASE_FLAGS, USER
from tests.support.servers import Server, serving

WALL, PHONE = {"width": 1920, "height": 1080}, {"width": 390, "height": 844}
SECONDS = 60
"""Seconds until a wait for the page fails."""
HTML = "<img src=x onerror=document.title='taken'><b>bold</b>"
"""An adapter's name that would be harmful as HTML."""

expect.set_options(timeout=1000 * SECONDS)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@contextmanager
def opened(browser: Browser, port: int, **context: Any) -> Iterator[tuple[Tab, list[str]]]:
    """The opened page, and the errors and warnings of the browser's console."""
    with browser.new_context(**context) as opened:
        page, wrong = opened.new_page(), []
        page.set_default_timeout(1000 * SECONDS)
        page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(f"http://127.0.0.1:{port}/")
        yield page, wrong


def shows(page: Tab, id: str, text: str | re.Pattern[str]) -> None:
    """Waits until an element of the page contains a text."""
    expect(page.locator(f"#{id}")).to_contain_text(text)


def fetch(port: int, path: str) -> tuple[int, Any, str]:
    """The status, the headers and the body of a response."""
    try:
        response: Any = urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=SECONDS)
    except urllib.error.HTTPError as error:
        response = error
    with response:
        return response.status, response.headers, response.read().decode()


def status(server: Server) -> dict[str, Any]:
    return json.loads(fetch(server.openai_port, "/status")[2])


def test_the_status_is_what_grpc_and_metrics_tell(server: Server) -> None:
    server.generation.Generate(request("abc", "lora", new_tokens=7))
    server.wait_idle()
    told, samples = status(server), server.metrics()
    base = server.model.GetModel(model_pb2.GetModelRequest()).base
    assert told["base"].pop("quantization") == "none"
    assert told["base"] == {name: getattr(base, name) for name in told["base"]}
    stacks = {s.name: list(s.layers) for s in server.model.ListStacks(model_pb2.ListStacksRequest()).stacks}
    assert {name: stack["layers"] for stack in told["stacks"] for name in stack["names"]} == stacks
    assert [stack["ranges"] for stack in told["stacks"] if "deep" in stack["names"]] == [[[0, 4], [2, 6]]]
    ledger = server.model.GetLedger(model_pb2.GetLedgerRequest())
    assert sum(told["memory"].values()) == ledger.total
    for category, size in told["memory"].items():
        assert size == getattr(ledger, category) == samples[f"lorarep_memory_bytes{{category={category}}}"]
    assert told["peft_bytes"] == ledger.peft_bytes

    known = adapters(server)
    assert told["adapters_total"] == len(known) == len(told["adapters"])
    for adapter in told["adapters"]:
        expected = known[adapter["name"]]
        for field in ("repository", "error", "rank", "bytes", "references", "pinned"):
            assert adapter[field] == getattr(expected, field)
        assert told["stacks"][adapter["stack"]]["layers"] == list(expected.layers)
        assert adapters_pb2.AdapterTier.Name(expected.tier) == f"ADAPTER_TIER_{adapter['tier'].upper()}"
    assert sum(stack["adapters"] for stack in told["stacks"]) == len(known)
    assert told["tiers"] == {tier: samples[f"lorarep_adapters_loaded{{tier={tier}}}"] for tier in told["tiers"]}

    stats = told["stats"]
    assert stats["tokens_out"] == samples["lorarep_completion_tokens_total"] >= 7
    assert stats["tokens_in"] == samples["lorarep_prompt_tokens_total"]
    assert (stats["running"], stats["waiting"], stats["pages_used"]) == (0, 0, 0)
    for name, metric in (("first_token", "time_to_first_token"), ("output_token", "time_per_output_token")):
        buckets = told["latency"][name]
        assert buckets == {bound: samples[f"lorarep_{metric}_seconds_bucket{{le={bound}}}"] for bound in buckets}
        assert buckets["+Inf"] == samples[f"lorarep_{metric}_seconds_count"] > 0


def test_of_many_adapters_the_status_has_what_matters_most() -> None:
    infos = [
        AdapterInfo(
            name=f"a{n:03}",
            repository="org/a",
            commit="local",
            digest="",
            stack=(0, 1),
            kind="lora",
            rank=4,
            parameters=8,
            tier=("disk", "host", "device")[n % 3],
            bytes=16,
            references=int(n == 190),
            pinned=False,
            priority=0,
        )
        for n in range(200)
    ]
    errors = {"broken": "NOT_FOUND: there is none", "coming": "", "a150": "DATA_LOSS: it is corrupt"}
    engine: Any = SimpleNamespace(
        base=SimpleNamespace(
            repository="b", commit="local", quantization="none", dtype="float32", device="cpu", layers=2
        ),
        stacks={"base": (0, 1), "again": (0, 1, 0, 1)},
        adapters=SimpleNamespace(list=lambda: infos),
        ledger=lambda: Ledger({"adapters": 3200}, {}, 0),
        stats=lambda: Stats(0, 0, (), (), 0, 1, 0, {}, {}, 0, 0, 0, 0, 0),
    )
    entries = {name: DesiredAdapter(name, "org/b") for name in errors}
    desired: Any = SimpleNamespace(all=lambda: entries, error=errors.__getitem__)
    told = asyncio.run(StatusPage(lambda: engine, desired, Metrics(CollectorRegistry())).status())
    assert isinstance(told, dict)
    names = [adapter["name"] for adapter in told["adapters"]]
    assert names[:4] == ["broken", "a150", "coming", "a190"]
    assert (len(names), told["adapters_total"], told["tiers"]) == (100, 202, {"device": 66, "host": 67, "disk": 67})
    assert {adapter["tier"] for adapter in told["adapters"][4:70]} == {"device"}
    states = {adapter["name"]: (adapter["state"], adapter["error"]) for adapter in told["adapters"]}
    assert states["broken"] == ("failed", errors["broken"])
    assert states["coming"] == ("loading", "")
    assert states["a150"] == ("loaded", errors["a150"])
    assert [stack["adapters"] for stack in told["stacks"]] == [200, 0]


def test_the_page_may_load_nothing_from_elsewhere(server: Server) -> None:
    for path, kind in (("/", "text/html"), ("/page.js", "text/javascript")):
        code, headers, _ = fetch(server.openai_port, path)
        assert (code, headers.get_content_type()) == (200, kind)
        policy = headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "http" not in policy


@pytest.mark.parametrize(("size", "scheme"), [(WALL, "dark"), (PHONE, "light")], ids=["wall", "phone"])
def test_the_page_shows_what_comes_and_runs(server: Server, browser: Browser, size: Any, scheme: Any) -> None:
    with opened(browser, server.openai_port, viewport=size, color_scheme=scheme) as (page, wrong):
        shows(page, "state", "live")
        shows(page, "base", "org/base")
        shows(page, "stacks", "[[0,4],[2,6]] · 8 positions, 2 of them again")
        deep = page.get_by_role("img", name="deep: 8 positions")
        assert (deep.locator(".walk").count(), deep.locator(".again").count()) == (6, 2)
        expect(page.get_by_text(HTML)).to_have_count(0)
        load(server, HTML, "org/plain")
        try:
            item = page.get_by_role("listitem").filter(has_text=HTML)
            expect(item).to_contain_text("LoRA r2")
            with streaming(server, HTML, "lora"):
                expect(item).to_contain_text("1 request")
                shows(page, "running", "2")
                shows(page, "tokens", re.compile(r"[1-9]"))
                shows(page, "first", re.compile(r"\d\sm?s"))
                shows(page, "between-more", re.compile(r"p95 [\d.]+\sm?s · [\d.,]+ steps/s"))
                shows(page, "memory", re.compile(r"KV cache \([\d.]*[1-9][\d.]* % used\)2.0\sMiB"))
                assert page.locator("img, b").count() == 0
                needed = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.scrollHeight]")
                assert needed[0] <= size["width"]
                assert needed[1] <= size["height"] or size is PHONE
            shows(page, "running", "0")
            shows(page, "tokens-more", re.compile(r"peak [\d.,]*[1-9]"))
        finally:
            unload(server, HTML)
        expect(item).to_have_count(0)
        assert "org/base" in page.title()
        assert wrong == []
        page.context.set_offline(True)
        shows(page, "state", "not reached since")
        shows(page, "base", "org/base")
        expect(page.locator("main")).to_have_css("opacity", "0.5")  # the value after the transition
        page.context.set_offline(False)
        shows(page, "state", "live")
        # Another server's counts are not compared with those of the one before.
        page.route("**/status", lambda route: route.fulfill(json={**route.fetch().json(), "started": 0}))
        shows(page, "tokens-more", "peak 0 ")


def test_a_token_is_asked_for_once_whichever_server_answers(browser: Browser, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text(f"generate {USER}\n")
    flags = [*BASE_FLAGS, f"--token-file={tokens}", "--stack=twice=0-3,1-4"]
    with serving([*flags, "--openai-listen=127.0.0.1:0"]) as server:
        port = server.openai_port
        with opened(browser, port) as (page, _):
            shows(page, "state", "a token is needed")
            code, headers, told = fetch(port, "/status")
            assert (code, headers["WWW-Authenticate"], "stacks" in told) == (401, "Bearer", False)
            for path in ("/", "/page.js"):
                assert fetch(port, path)[0] == 200
            page.get_by_role("textbox").fill("wrong")
            page.get_by_role("button").click()
            shows(page, "state", "the token is not known")
            assert "twice" not in page.content()
            server.wait_ready()
            page.get_by_role("textbox").fill(f" {USER} ")
            page.get_by_role("button").click()
            shows(page, "stacks", "twice")
            expect(page.get_by_role("textbox")).to_be_hidden()
            assert USER not in page.content() + page.url
            page.reload()  # the same tab keeps the token
            shows(page, "stacks", "twice")
            server.stop()
            shows(page, "state", "not reached since")
            shows(page, "stacks", "twice")
            with serving([*flags, f"--openai-listen=127.0.0.1:{port}"]):
                shows(page, "state", "the server is starting")
                expect(page.get_by_role("textbox")).to_be_hidden()
