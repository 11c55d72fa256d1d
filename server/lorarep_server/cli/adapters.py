"""`lorarep adapters`: loads, unloads and lists the adapters of a running server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from lorarep_server.cli.connection import Connection, with_connection
from lorarep_server.cli.options import AdapterSourceType, option
from lorarep_server.sources import AdapterSource

if TYPE_CHECKING:
    from lorarep.v1 import adapters_pb2_grpc


@click.group()
def adapters() -> None:
    """Load, unload and list the adapters of a running server."""


@contextmanager
def _adapter_service(connection: Connection) -> Iterator[adapters_pb2_grpc.AdapterServiceStub]:
    from lorarep.v1 import adapters_pb2_grpc

    with connection.channel() as channel:
        yield adapters_pb2_grpc.AdapterServiceStub(channel)


@adapters.command()
@click.argument("adapter", type=AdapterSourceType(here=False))
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
    """The last word of an enumeration's value: "waiting" for LOAD_STAGE_WAITING."""
    return name.rpartition("_")[2].lower()
