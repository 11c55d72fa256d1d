"""The command line `lorarep`. Each command is imported when it is used, so that help and clients start at once."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import click

from lorarep_runtime.errors import LorarepError

log = logging.getLogger(__name__)

COMMANDS: Mapping[str, str] = {
    "serve": "lorarep_server.cli.serve",
    "generate": "lorarep_server.cli.client",
    "adapters": "lorarep_server.cli.client",
    "health": "lorarep_server.cli.client",
    "plan": "lorarep_server.cli.plan",
    "verify": "lorarep_server.cli.verify",
    "demo": "lorarep_server.demo.run",
}


class Commands(click.Group):
    """Finds commands in their modules, and turns what goes wrong into one line."""

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
        except LorarepError as error:
            raise click.ClickException(str(error)) from error
        except Exception as error:
            log.debug("an unexpected error", exc_info=error)
            raise click.ClickException(" ".join(f"{type(error).__name__}: {error}".split())) from error


@click.group(cls=Commands, context_settings={"auto_envvar_prefix": "LORAREP", "help_option_names": ["-h", "--help"]})
@click.version_option(package_name="lorarep")
def main() -> None:
    """Many replicated stacks and adapters, one quantized base."""
