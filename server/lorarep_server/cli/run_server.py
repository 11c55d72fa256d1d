"""Runs a server in this process until SIGTERM or SIGINT."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from lorarep_runtime.config import EngineConfig
from lorarep_server.app import App
from lorarep_server.cli.options import NamedStack
from lorarep_server.cli.progress_bars import ProgressBars
from lorarep_server.cli.progress_log import ProgressLog
from lorarep_server.config import ServerConfig

if TYPE_CHECKING:
    from lorarep_runtime.engine.engine import Engine
    from lorarep_runtime.progress import Progress

log = logging.getLogger(__name__)

INTERRUPTED = 128 + signal.SIGINT
"""The exit status of a process that Ctrl-C has ended."""


def run(config: EngineConfig, stacks: Sequence[NamedStack], server: ServerConfig) -> int:
    """Serves until the process is told to end, and returns its exit status.

    Raises:
        LorarepError: the server cannot be started.
    """
    progress: Progress = ProgressBars() if sys.stderr.isatty() else ProgressLog()

    async def until_stopped() -> int:
        app = App(server, partial(load_engine, config, stacks, progress), progress)
        interrupted = False

        def interrupt() -> None:
            nonlocal interrupted
            if interrupted:
                os._exit(INTERRUPTED)  # whatever runs
            interrupted = True
            log.info("interrupted; a second Ctrl-C ends the server at once")
            app.stop()

        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, app.stop)
        loop.add_signal_handler(signal.SIGINT, interrupt)
        return await app.run()

    return asyncio.run(until_stopped())


def load_engine(config: EngineConfig, stacks: Sequence[NamedStack], progress: Progress) -> Engine:
    """Loads the base, with named stacks of its layers.

    Raises:
        LorarepError: as Engine, `hub.snapshot.fetch` and `lorarep_runtime.model.stack`.
    """
    from lorarep_runtime.engine.engine import Engine
    from lorarep_runtime.hub.snapshot import fetch
    from lorarep_runtime.model.model_config import read_model_config

    if stacks:
        base, limit = config.base, config.adapters.max_positions
        folder = fetch(base.base, base.revision, kind="config", cache_dir=base.cache_dir, progress=progress).folder
        layers = read_model_config(folder).get_text_config().num_hidden_layers
        config = replace(config, stacks={stack.name: stack.resolve(layers, limit, base.base) for stack in stacks})
    return Engine(config, progress)
