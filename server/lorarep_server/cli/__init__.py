"""The command line `lorarep`."""

from lorarep_server.cli.commands import main

__all__ = ["main"]
