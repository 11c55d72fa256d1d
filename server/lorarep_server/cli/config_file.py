"""The YAML file of `lorarep serve --config`, whose keys are the names of the flags."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from lorarep_server.cli.options import read_yaml


def read_config(ctx: click.Context, param: click.Parameter, file: Path | None) -> None:
    """A click callback: makes a YAML file's values the defaults of the flags of the same names."""
    if file is None:
        return
    flags = {p.name: p for p in ctx.command.params if isinstance(p, click.Option) and p is not param}
    given = {}
    for key, value in read_yaml(file, param, ctx).items():
        name = key.replace("-", "_")
        if name not in flags:
            raise click.BadParameter(f"{file}: unknown key {key!r}", ctx, param)
        if value is not None:
            try:
                given[name] = _as_typed(value, several=flags[name].multiple)
            except ValueError as error:
                raise click.BadParameter(f"{file}: {key}: {error}", ctx, param) from error
    ctx.default_map = given


def _as_typed(value: Any, *, several: bool) -> str | list[str]:
    """A YAML value in the form that it has on the command line, so that the flags validate both.

    A mapping stands for several NAME=VALUE.
    """
    if not several:
        if isinstance(value, list | dict):
            raise ValueError("takes one value")
        return str(value)
    if isinstance(value, dict):
        return [f"{key}={item if isinstance(item, str) else json.dumps(item)}" for key, item in value.items()]
    if not isinstance(value, list):
        raise ValueError("takes a list or a mapping")
    return [str(item) for item in value]
