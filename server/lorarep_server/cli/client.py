"""`lorarep generate`, `lorarep adapters` and `lorarep health`: clients of a running server."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lorarep_server.cli.options import AdapterSourceType, option
from lorarep_server.sources import AdapterSource

if TYPE_CHECKING:
    import grpc
    from lorarep.v1 import adapters_pb2_grpc

FILE = click.Path(dir_okay=False, exists=True, path_type=Path)
TOKEN_VARIABLE = "LORAREP_TOKEN"


@dataclass(frozen=True)
class Connection:
    """How a server is reached."""

    server: str
    tls_ca: Path | None
    tls_certificate: Path | None
    tls_key: Path | None
    token_file: Path | None

    @contextmanager
    def channel(self) -> Iterator[grpc.Channel]:
        """The statuses of calls that fail become one line."""
        import grpc

        with self._channel() as channel:
            try:
                yield channel
            except grpc.RpcError as error:
                status: Any = error
                raise click.ClickException(f"{status.code().name}: {status.details()}") from error

    def _channel(self) -> grpc.Channel:
        import grpc

        if (self.tls_certificate is None) != (self.tls_key is None):
            raise click.UsageError("--tls-certificate and --tls-key need each other")
        if self.tls_ca is None:
            if self.tls_certificate:
                raise click.UsageError("--tls-certificate needs --tls-ca")
            return grpc.insecure_channel(self.server)
        files = (self.tls_ca, self.tls_key, self.tls_certificate)
        pems = [None if file is None else file.read_bytes() for file in files]
        return grpc.secure_channel(self.server, grpc.ssl_channel_credentials(*pems))

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """For every call: the token, if there is one."""
        token = os.environ.get(TOKEN_VARIABLE, "") if self.token_file is None else self.token_file.read_text().strip()
        if not token:
            return ()
        if not re.fullmatch("[!-~]+", token):
            raise click.UsageError(f"{self.token_file or TOKEN_VARIABLE}: is not one token")
        return (("authorization", f"Bearer {token}"),)


def with_connection(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the flags of a connection, as its argument `connection`."""

    @option("--server", metavar="HOST:PORT", default="127.0.0.1:50051", help="The server.")
    @option("--tls-ca", type=FILE, help="PEM file of the authorities that the server's certificate may be from.")
    @option("--tls-certificate", type=FILE, help="PEM file of an own certificate chain.")
    @option("--tls-key", type=FILE, help="PEM file of its key.")
    @option("--token-file", type=FILE, show_default=f"${TOKEN_VARIABLE}, a token", help="File of one bearer token.")
    @wraps(command)
    def connected(
        *,
        server: str,
        tls_ca: Path | None,
        tls_certificate: Path | None,
        tls_key: Path | None,
        token_file: Path | None,
        **others: Any,
    ) -> None:
        command(connection=Connection(server, tls_ca, tls_certificate, tls_key, token_file), **others)

    return connected


class AdapterWeightType(click.ParamType):  # type: ignore[type-arg]
    """NAME or NAME=WEIGHT."""

    name = "NAME[=WEIGHT]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, float | None]:
        if isinstance(value, tuple):
            return value
        name, equals, weight = value.rpartition("=")
        if not equals:
            return value, None
        try:
            return name, float(weight)
        except ValueError:
            self.fail(f"{weight!r} in {value!r} is not a weight", param, ctx)


@click.command()
@click.argument("prompt", required=False)
@with_connection
@option("--adapter", type=AdapterWeightType(), multiple=True, help="Adapter, and its weight if that is not 1.")
@option("--stack", help="Named stack.")
@option("--chat", is_flag=True, help="Put the prompt into the chat template, as the user's message.")
@option("--max-new-tokens", type=int, help="Most tokens of the answer.")
@option("--min-new-tokens", type=int, help="Fewest tokens of the answer.")
@option("--stop", multiple=True, help="String that ends the answer.")
@option("--ignore-eos", is_flag=True, help="Go on past end tokens.")
@option("--temperature", type=float, help="0 is greedy.")
@option("--top-k", type=int, help="Sample among so many of the likeliest tokens.")
@option("--top-p", type=float, help="Sample among the likeliest tokens that have this probability together.")
@option("--min-p", type=float, help="Sample among tokens with this part of the likeliest one's probability.")
@option("--repetition-penalty", type=float, help="Over 1 makes all tokens so far less likely.")
@option("--presence-penalty", type=float, help="Over 0 makes tokens of the answer less likely.")
@option("--frequency-penalty", type=float, help="Over 0 makes frequent tokens of the answer less likely.")
@option("--seed", type=int, help="Makes sampling reproducible.")
def generate(
    prompt: str | None,
    connection: Connection,
    adapter: tuple[tuple[str, float | None], ...],
    stack: str | None,
    chat: bool,
    max_new_tokens: int | None,
    min_new_tokens: int | None,
    stop: tuple[str, ...],
    ignore_eos: bool,
    **sampling: Any,
) -> None:
    """Continue PROMPT, or standard input, on a running server."""
    from lorarep.v1 import generation_pb2 as pb
    from lorarep.v1 import generation_pb2_grpc

    text = sys.stdin.read() if prompt is None else prompt
    try:
        request = pb.GenerateRequest(
            prompt=pb.Prompt(chat=pb.Chat(messages=[pb.ChatMessage(role="user", content=text)]))
            if chat
            else pb.Prompt(text=text),
            adapters=[pb.AdapterRef(name=name, weight=weight) for name, weight in adapter],
            stack=stack,
            sampling=pb.Sampling(**sampling),
            stopping=pb.Stopping(
                max_new_tokens=max_new_tokens, min_new_tokens=min_new_tokens, stop=stop, ignore_eos=ignore_eos
            ),
        )
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    with connection.channel() as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        for message in stub.GenerateStream(pb.GenerateStreamRequest(request=request), metadata=connection.metadata):
            click.echo(message.chunk.text, nl=False)
    click.echo()


@click.group()
def adapters() -> None:
    """Load, unload and list the adapters of a running server."""


@contextmanager
def _adapter_service(connection: Connection) -> Iterator[adapters_pb2_grpc.AdapterServiceStub]:
    from lorarep.v1 import adapters_pb2_grpc

    with connection.channel() as channel:
        yield adapters_pb2_grpc.AdapterServiceStub(channel)


@adapters.command()
@click.argument("adapter", type=AdapterSourceType())
@option("--stack", help="Named stack that the adapter's layer numbers count.")
@option("--pinned/--not-pinned", default=None, show_default="as it is", help="Never leave the device for others.")
@option("--priority", type=int, show_default="as it is", help="Of those not pinned, the lowest leaves first.")
@option("--replace", is_flag=True, help="Take the place of another revision, or follow a branch that has moved.")
@with_connection
def load(
    adapter: AdapterSource,
    stack: str | None,
    pinned: bool | None,
    priority: int | None,
    replace: bool,
    connection: Connection,
) -> None:
    """Load a repository: NAME=REPOSITORY[@REVISION]. Interrupted, it is cancelled, unless others wait for it too."""
    from lorarep.v1 import adapters_pb2 as pb

    from lorarep_server.cli.progress_bars import ProgressBars

    request = pb.LoadAdapterRequest(
        name=adapter.name,
        repository=adapter.source,
        revision=adapter.revision,
        stack=stack,
        pinned=pinned,
        priority=priority,
        replace=replace,
    )
    bars = ProgressBars(lines=True)
    with _adapter_service(connection) as service:
        for message in service.LoadAdapter(request, metadata=connection.metadata):
            if message.HasField("progress"):
                at = message.progress
                bars(_word(pb.LoadStage.Name(at.stage)), at.done, at.total)
        bars.end()
        loaded = message.adapter
    click.echo(f"{loaded.name}: {loaded.repository} at {loaded.commit}, {len(loaded.layers)} positions")


@adapters.command()
@click.argument("name")
@with_connection
def unload(name: str, connection: Connection) -> None:
    """Take an adapter's name away."""
    from lorarep.v1 import adapters_pb2 as pb

    with _adapter_service(connection) as service:
        service.UnloadAdapter(pb.UnloadAdapterRequest(name=name), metadata=connection.metadata)


@adapters.command(name="list")
@with_connection
def list_(connection: Connection) -> None:
    """Print a table of the adapters."""
    from lorarep.v1 import adapters_pb2 as pb

    with _adapter_service(connection) as service:
        found = service.ListAdapters(pb.ListAdaptersRequest(), metadata=connection.metadata).adapters
    rows = [("NAME", "FROM", "STATE", "TIER", "PINNED", "PRIORITY", "BYTES", "IN USE", "ERROR")]
    for a in found:
        rows.append(
            (
                a.name,
                f"{a.repository}@{a.commit[:12]}" if a.commit else a.repository,
                _word(pb.AdapterState.Name(a.state)),
                _word(pb.AdapterTier.Name(a.tier)) if a.tier else "",
                "pinned" if a.pinned else "",
                str(a.priority),
                str(a.bytes),
                str(a.references),
                a.error,
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _word(name: str) -> str:
    """Of an enumeration's value, such as LOAD_STAGE_WAITING."""
    return name.rpartition("_")[2].lower()


@click.command()
@click.argument("service", type=click.Choice(("liveness", "readiness")), default="readiness")
@option("--timeout", type=click.FloatRange(min=0, min_open=True), default=5.0, help="Seconds to wait for the answer.")
@with_connection
def health(connection: Connection, service: str, timeout: float) -> None:
    """Ask a server for its health; the exit status is 0 if it serves.

    A probe for servers with TLS, which Kubernetes' own gRPC probes do not speak.
    """
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    with connection.channel() as channel:
        asked = health_pb2.HealthCheckRequest(service=service)
        status = health_pb2_grpc.HealthStub(channel).Check(asked, timeout=timeout).status
    click.echo(health_pb2.HealthCheckResponse.ServingStatus.Name(status))
    if status != health_pb2.HealthCheckResponse.SERVING:
        raise SystemExit(1)
