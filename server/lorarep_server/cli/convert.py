"""`lorarep convert`: pickled weights of an adapter as safetensors."""

from __future__ import annotations

from pathlib import Path

import click

from lorarep_server.cli.options import HomePath, option
from lorarep_server.sources import split_here


@click.command()
@click.argument("source", metavar="SOURCE[@REVISION]")
@click.argument("out", type=HomePath(file_okay=False))
@option("--cache-dir", type=HomePath(file_okay=False), help="Hub cache.")
def convert(source: str, out: Path, cache_dir: Path | None) -> None:
    """Write the adapter of SOURCE, a Hub repository or a folder with adapter_model.bin, to OUT as safetensors.

    Servers never open pickles. This reads one for tensors alone, in a process with limits of time and memory.
    """
    from lorarep_runtime.adapters.conversion import convert as converted
    from lorarep_server.cli.progress_bars import ProgressBars

    snapshot = converted(*split_here(source), out, cache_dir, ProgressBars())
    click.echo(f"{snapshot.source} at {snapshot.commit} is in {out}")
