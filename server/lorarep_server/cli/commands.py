"""The command line `lorarep`. Each command is imported only when it is used, so that help and clients start at once."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import click

from lorarep_runtime.errors import LorarepError

COMMANDS: Mapping[str, str] = {
    "serve": "lorarep_server.cli.serve",
    "generate": "lorarep_server.cli.generate",
    "adapters": "lorarep_server.cli.adapters",
    "health": "lorarep_server.cli.health",
    "plan": "lorarep_server.cli.plan",
    "convert": "lorarep_server.cli.convert",
    "verify": "lorarep_server.cli.verify",
    "demo": "lorarep_server.demo.run",
}
"""The module of each command, which defines the command under the same name."""


class Commands(click.Group):
    """Finds commands in their modules, and reports errors in one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = getattr(import_module(COMMANDS[cmd_name]), cmd_name)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.exceptions.Exit, click.Abort, click.ClickException):
            raise
        except Exception as error:
            if ctx.params["debug"]:
                click.echo(traceback.format_exc(), err=True, nl=False)
            if isinstance(error, LorarepError):
                raise click.ClickException(str(error)) from error
            line = " ".join(f"{type(error).__name__}: {error}".split())
            hint = "" if ctx.params["debug"] else " (`lorarep --debug` prints the traceback)"
            raise click.ClickException(f"{line}{hint}") from error


@click.group(cls=Commands, context_settings={"auto_envvar_prefix": "LORAREP", "help_option_names": ["-h", "--help"]})
@click.version_option(package_name="lorarep")
@click.option("--debug", is_flag=True, show_envvar=True, help="Print the traceback of an error.")
def main(debug: bool) -> None:
    """Many replicated stacks and adapters, one quantized base."""
