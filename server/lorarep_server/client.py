"""`lorarep generate` and `lorarep adapters`: clients of a running server."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from lorarep_server.options import AdapterSource, AdapterSourceType, option

if TYPE_CHECKING:
    import grpc
    from lorarep.v1 import adapters_pb2_grpc

server_option = option("--server", metavar="HOST:PORT", default="127.0.0.1:50051", help="The server.")


@contextmanager
def channel_to(server: str) -> Iterator[grpc.Channel]:
    """A connection; the statuses of calls that fail become one line."""
    import grpc

    with grpc.insecure_channel(server) as channel:
        try:
            yield channel
        except grpc.RpcError as error:
            status: Any = error
            raise click.ClickException(f"{status.code().name}: {status.details()}") from error


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
@server_option
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
    server: str,
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
    with channel_to(server) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        for message in stub.GenerateStream(pb.GenerateStreamRequest(request=request)):
            click.echo(message.chunk.text, nl=False)
    click.echo()


@click.group()
def adapters() -> None:
    """Load, unload and list the adapters of a running server."""


@contextmanager
def _adapter_service(server: str) -> Iterator[adapters_pb2_grpc.AdapterServiceStub]:
    from lorarep.v1 import adapters_pb2_grpc

    with channel_to(server) as channel:
        yield adapters_pb2_grpc.AdapterServiceStub(channel)


@adapters.command()
@click.argument("adapter", type=AdapterSourceType())
@option("--stack", help="Named stack that the adapter's layer numbers count.")
@server_option
def load(adapter: AdapterSource, stack: str | None, server: str) -> None:
    """Load a repository: NAME=REPOSITORY[@REVISION]."""
    from lorarep.v1 import adapters_pb2 as pb

    request = pb.LoadAdapterRequest(
        name=adapter.name, repository=adapter.source, revision=adapter.revision, stack=stack
    )
    with _adapter_service(server) as service:
        loaded = service.LoadAdapter(request).adapter
    click.echo(f"{loaded.name}: {loaded.repository} at {loaded.commit}, {len(loaded.layers)} positions")


@adapters.command()
@click.argument("name")
@server_option
def unload(name: str, server: str) -> None:
    """Take an adapter's name away."""
    from lorarep.v1 import adapters_pb2 as pb

    with _adapter_service(server) as service:
        service.UnloadAdapter(pb.UnloadAdapterRequest(name=name))


@adapters.command(name="list")
@server_option
def list_(server: str) -> None:
    """Print a table of the adapters."""
    from lorarep.v1 import adapters_pb2 as pb

    with _adapter_service(server) as service:
        found = service.ListAdapters(pb.ListAdaptersRequest()).adapters
    rows = [("NAME", "KIND", "RANK", "POSITIONS", "MIB", "IN USE", "REPOSITORY", "COMMIT")]
    for a in found:
        kind = pb.AdapterKind.Name(a.kind).removeprefix("ADAPTER_KIND_").lower()
        size = f"{a.bytes / 2**20:.1f}" if a.loaded else "evicted"
        rows.append(
            (a.name, kind, str(a.rank), str(len(a.layers)), size, str(a.references), a.repository, a.commit[:12])
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
