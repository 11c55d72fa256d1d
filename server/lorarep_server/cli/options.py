"""Types of flags that several commands share: sizes in bytes, adapters, stacks, YAML files."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lorarep_server.addresses import parse_address
from lorarep_server.sources import AdapterSource, found_here, split_here, split_revision

if TYPE_CHECKING:
    from lorarep_runtime.model.stack import Stack

option = partial(click.option, show_default=True, show_envvar=True)

GRPC_SCHEMES = ("unix:", "unix-abstract:", "dns:", "ipv4:", "ipv6:", "vsock:", "xds:")
"""What addresses in gRPC's own notation begin with."""
_UNITS = {"": 1, "B": 1} | {
    f"{prefix}{infix}B": factor ** (power + 1)
    for infix, factor in (("", 1000), ("I", 1024))
    for power, prefix in enumerate("KMGT")
}


class ByteSize(click.ParamType):  # type: ignore[type-arg]
    """A number of bytes, such as "1073741824", "40GiB" or "1.5 GB"."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Z]*)", str(value).strip().upper())
        if match is None or match[2] not in _UNITS:
            self.fail(f"{value!r} is not a number of bytes such as 512MiB or 40GiB", param, ctx)
        return int(float(match[1]) * _UNITS[match[2]])


class HomePath(click.Path):  # type: ignore[type-arg]
    """A path that may begin with "~", the home folder: shells leave `--flag=~/...` as it is, and YAML files everything.

    Args:
        options: as for `click.Path`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(path_type=Path, **options)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return super().convert(os.path.expanduser(value), param, ctx)


class Address(click.ParamType):  # type: ignore[type-arg]
    """Where a server listens, or is: HOST:PORT, or an address in gRPC's own notation."""

    name = "HOST:PORT"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        address = str(value)
        try:
            if not address.startswith(GRPC_SCHEMES):
                parse_address(address)
        except ValueError:
            port = address if address.isdigit() else "50051"
            self.fail(f"{address!r} is not HOST:PORT, such as 127.0.0.1:{port} or [::1]:{port}", param, ctx)
        return address


class BaseSourceType(click.ParamType):  # type: ignore[type-arg]
    """The base: a folder that exists, or a Hub repository."""

    name = "SOURCE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return found_here(str(value))


class AdapterSourceType(click.ParamType):  # type: ignore[type-arg]
    """An adapter to load, written NAME=SOURCE[@REVISION].

    Args:
        here: whether it is loaded on this machine, so that a folder that exists goes before a repository of its name.
    """

    name = "NAME=SOURCE[@REVISION]"

    def __init__(self, *, here: bool) -> None:
        self._split = split_here if here else split_revision

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> AdapterSource:
        if isinstance(value, AdapterSource):
            return value
        name, equals, source = value.partition("=")
        if not (name and equals and source):
            self.fail(f"{value!r} is not NAME=SOURCE[@REVISION]", param, ctx)
        return AdapterSource(name, *self._split(source))


@dataclass(frozen=True)
class NamedStack:
    """A named stack for a base that is not known yet, written NAME=RANGES or NAME=FILE."""

    name: str
    source: Sequence[tuple[int, int]] | Mapping[str, Any]
    """Ranges of layers, or the content of a mergekit recipe."""

    def resolve(self, layers: int, max_positions: int, base: str) -> Stack:
        """The stack's sequence of layers on a base.

        Args:
            layers: the number of layers of the base.
            max_positions: most positions of the stack.
            base: Hub repository or folder of the base; a recipe has to be for this repository.

        Raises:
            InvalidArgument, FailedPrecondition: as `lorarep_runtime.model.stack`.
        """
        from lorarep_runtime.model.stack import stack_from_mergekit, stack_from_ranges

        if isinstance(self.source, Mapping):
            return stack_from_mergekit(
                self.source, layers, max_positions=max_positions, base=None if Path(base).is_dir() else base
            )
        return stack_from_ranges(self.source, layers, max_positions=max_positions, field=f"stack {self.name!r}")


class StackType(click.ParamType):  # type: ignore[type-arg]
    """A named stack: NAME=FILE, a mergekit recipe; or NAME=RANGES, such as "deep=0-24,8-32", "deep=[[0,24],[8,32]]"."""

    name = "NAME=RANGES|FILE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> NamedStack:
        from lorarep_runtime.errors import LorarepError
        from lorarep_runtime.model.stack import parse_ranges

        if isinstance(value, NamedStack):
            return value
        name, equals, source = value.partition("=")
        if not (name and equals and source):
            self.fail(f"{value!r} is not NAME=RANGES or NAME=FILE.yaml", param, ctx)
        if source.endswith((".yaml", ".yml")):
            return NamedStack(name, read_yaml(Path(source).expanduser(), param, ctx))
        try:
            return NamedStack(name, parse_ranges(source))
        except LorarepError as error:
            self.fail(f"{name}: {error}", param, ctx)


def read_yaml(file: Path, param: click.Parameter | None = None, ctx: click.Context | None = None) -> dict[str, Any]:
    """Reads a YAML file whose top level is a mapping.

    Raises:
        click.BadParameter: the file cannot be read, or its top level is something else.
    """
    import yaml

    try:
        content = yaml.safe_load(file.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise click.BadParameter(" ".join(f"{file}: {error}".split()), ctx, param) from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise click.BadParameter(f"{file}: not a mapping of names to values", ctx, param)
    return content
