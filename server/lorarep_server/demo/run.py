"""`lorarep demo`: a real server with several adapters, loaded from a stand-in for the Hub, answers concurrently.

The demo needs no network. Every answer is known in advance, and a wrong answer is a failure.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.request import ProxyHandler, build_opener

import click

from lorarep_server.demo.hub_stand_in import HubStandIn
from lorarep_server.demo.screen import Screen
from lorarep_server.demo.voices import BASE, MODELS, VOICES, answer

LINES = ("the quick brown fox jumps over", "the lazy dog which does not care", "by the light of a silver star")
LATE = "spell"
"""The adapter that is loaded while the others answer."""
METRICS = ("lorarep_completion_tokens_total", "lorarep_adapters_loaded", "lorarep_step_rows_count")
MAX_NEW_TOKENS = 96
START_SECONDS = 120
END_SECONDS = 30
CHANNEL_OPTIONS = (("grpc.enable_http_proxy", 0),)


@dataclass(frozen=True)
class Server:
    """The addresses of a listening server."""

    address: str
    """HOST:PORT of gRPC."""
    metrics: str
    """URL of the metrics."""


@click.command()
def demo() -> None:
    """Serve a tiny trained base and its adapters, and check what they say. Needs no network."""
    with TemporaryDirectory(prefix="lorarep-demo-") as folder, HubStandIn() as hub:
        for name in (BASE, *VOICES):
            hub.publish(_repository(name), MODELS / name)
        click.echo(f"Hub stand-in at {hub.url} with {', '.join(map(_repository, (BASE, *VOICES)))}")
        with _server(hub.url, Path(folder)) as server:
            asyncio.run(_talk(server))
            _show_metrics(server.metrics)
    click.echo("\nThe server ended in order, and every answer was right.")


def _repository(name: str) -> str:
    return f"demo/{name}"


@contextmanager
def _server(hub: str, cache: Path) -> Iterator[Server]:
    """A server process as a user would start it, on free ports; it ends by SIGTERM when the context does."""
    flags = ["--quantization=nf4", "--dtype=float32", "--kv-bytes=16MiB", f"--cache-dir={cache}"]
    flags += ["--listen=127.0.0.1:0", "--metrics-listen=127.0.0.1:0", "--allow-repository=demo/*"]
    flags += [f"--adapter={name}={_repository(name)}" for name in VOICES if name != LATE]
    arguments = ["serve", f"--base={_repository(BASE)}", *flags]
    click.echo(f"$ HF_ENDPOINT={hub} lorarep {' '.join(arguments)}")
    process = subprocess.Popen(
        [sys.executable, "-c", "from lorarep_server.cli.commands import main; main()", *arguments],
        env={
            **{key: value for key, value in os.environ.items() if not key.startswith("LORAREP_")},
            "HF_ENDPOINT": hub,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",  # would take precedence over the other
        },
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    log: deque[str] = deque(maxlen=10)
    try:
        for line in process.stderr:
            log.append(line)
            if ports := re.search(r"listening on port (\d+), metrics on port (\d+)", line):
                break
        else:
            raise click.ClickException(f"the server did not start:\n{''.join(log)}")
        # Without a reader the pipe would fill up and block the server.
        threading.Thread(target=log.extend, args=(process.stderr,), daemon=True).start()
        try:
            yield Server(f"127.0.0.1:{ports[1]}", f"http://127.0.0.1:{ports[2]}/metrics")
        except Exception as error:
            raise click.ClickException(f"{error}\nLast lines of the server's log:\n{''.join(log)}") from error
        process.send_signal(signal.SIGTERM)
        if status := process.wait(END_SECONDS):
            raise click.ClickException(f"the server ended with status {status}:\n{''.join(log)}")
    finally:
        process.kill()
        process.wait()


async def _talk(server: Server) -> None:
    import grpc
    from lorarep.v1 import adapters_pb2_grpc, generation_pb2_grpc, model_pb2_grpc

    async with grpc.aio.insecure_channel(server.address, options=CHANNEL_OPTIONS) as channel:
        adapters: Any = adapters_pb2_grpc.AdapterServiceStub(channel)  # type: ignore[no-untyped-call]
        generation: Any = generation_pb2_grpc.GenerationServiceStub(channel)  # type: ignore[no-untyped-call]
        models: Any = model_pb2_grpc.ModelServiceStub(channel)  # type: ignore[no-untyped-call]
        await _ready(channel)
        await _show_adapters(adapters)
        early = [BASE, *(name for name in VOICES if name != LATE)]
        await _say(generation, LINES[0], early)
        await _say(generation, LINES[1], early, adapters)
        await _say(generation, LINES[2], [*early, LATE])
        await _show_ledger(models)


async def _ready(channel: Any) -> None:
    """Waits until the base is served."""
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=START_SECONDS)
    async for health in watch:
        if health.status == health_pb2.HealthCheckResponse.SERVING:
            watch.cancel()
            return


async def _say(generation: Any, line: str, names: Sequence[str], adapters: Any = None) -> None:
    """Streams the answers of several voices to a line concurrently, and checks them.

    Args:
        generation: stub of GenerationService.
        line: the line to answer.
        names: the voices: the base and adapters.
        adapters: stub of AdapterService, over which the late adapter is loaded meanwhile; None loads nothing.

    Raises:
        click.ClickException: an answer is wrong.
    """
    click.echo(f"\nprompt: {line}")
    screen = Screen(names)
    all_speak = asyncio.Event()

    async def speak(name: str) -> None:
        async for piece in _pieces(generation, name, line):
            screen.add(name, piece)
            if screen.all_begun:
                all_speak.set()
        screen.end(name)

    async def load() -> str:
        await all_speak.wait()
        began = time.monotonic()
        repository, commit = await _load(adapters)
        return f"{repository} at {commit[:12]} in {time.monotonic() - began:.2f} s"

    loading = None if adapters is None else asyncio.create_task(load())
    await asyncio.gather(*(speak(name) for name in names))
    click.echo(
        f"  ({screen.pieces} pieces, {screen.changes} of them from another stream than the one before; "
        f"longest pause of a stream {1000 * screen.longest_pause:.0f} ms)"
    )
    if loading is not None:
        click.echo(f"  (meanwhile, {LATE} was loaded from {await loading})")
    for name in names:
        if (said := screen.texts[name]) != answer(name, line):
            raise click.ClickException(f"{name} should have said {answer(name, line)!r}, but said {said!r}")


async def _pieces(generation: Any, name: str, line: str) -> Any:
    from lorarep.v1 import generation_pb2 as pb

    request = pb.GenerateRequest(
        prompt=pb.Prompt(text=f"{line}\n"),
        adapters=[] if name == BASE else [pb.AdapterRef(name=name)],
        stopping=pb.Stopping(max_new_tokens=MAX_NEW_TOKENS),
    )
    async for message in generation.GenerateStream(pb.GenerateStreamRequest(request=request)):
        if message.WhichOneof("event") == "chunk":
            yield message.chunk.text


async def _load(adapters: Any) -> tuple[str, str]:
    """Loads the late adapter, and returns its repository and commit."""
    from lorarep.v1 import adapters_pb2 as pb

    call = adapters.LoadAdapter(pb.LoadAdapterRequest(name=LATE, repository=_repository(LATE)))
    *_, last = [message async for message in call]
    return last.adapter.repository, last.adapter.commit


async def _show_adapters(adapters: Any) -> None:
    from lorarep.v1 import adapters_pb2 as pb

    for adapter in (await adapters.ListAdapters(pb.ListAdaptersRequest())).adapters:
        kind = "DoRA" if adapter.kind == pb.ADAPTER_KIND_DORA else "LoRA"
        click.echo(f"  {adapter.name:<{Screen.NAME}} {kind} on layers {' '.join(map(str, adapter.layers))}")


async def _show_ledger(models: Any) -> None:
    from lorarep.v1 import model_pb2 as pb

    ledger = await models.GetLedger(pb.GetLedgerRequest())
    categories = ("base_weights", "quantization_constants", "embeddings_and_head", "adapters", "kv_cache", "workspace")
    rows = [(name, getattr(ledger, name)) for name in categories]
    rows += [("total", ledger.total), ("without kv_cache", ledger.total - ledger.kv_cache)]
    rows += [("PEFT, without kv_cache", ledger.peft_bytes)]
    click.echo("\nmemory ledger, bytes")
    for name, size in rows:
        click.echo(f"  {name:<24} {size:>12,}")


def _show_metrics(url: str) -> None:
    click.echo(f"\nmetrics at {url}, such as")
    with build_opener(ProxyHandler({})).open(url, timeout=10) as response:
        for line in response.read().decode().splitlines():
            if line.startswith(METRICS):
                click.echo(f"  {line}")
