"""Processes of Python for work that may take too much: nothing ends a thread, or takes back what it has allocated."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

KEPT_VARIABLES = ("HOME", "PATH", "LD_LIBRARY_PATH", "TZ", "LORAREP_FAILPOINTS")

Process = subprocess.Popen[bytes]


def start_process(module: str, function: str, environment: Mapping[str, str] | None = None) -> Process:
    """Starts a process that calls a module's function, with pipes to its standard input and output.

    It knows little of this process' environment, where tokens are.

    Args:
        environment: further variables.
    """
    # No fork of a process with threads.
    kept = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
    return subprocess.Popen(
        [sys.executable, "-P", "-c", f"from {module} import {function}; {function}()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**kept, **(environment or {}), "PYTHONPATH": os.pathsep.join(sys.path)},
        start_new_session=True,  # Ctrl-C is the server's
    )


def end_process(process: Process) -> None:
    """Ends a process and waits for it."""
    process.kill()
    process.communicate()


def end_with_parent() -> None:
    """Has this process, started by `start_process`, end when its standard input does, however its parent ends."""
    threading.Thread(target=_await_parents_end, daemon=True).start()


def _await_parents_end() -> None:
    while os.read(0, 1):
        pass
    os._exit(1)


def limit_memory(more: int) -> None:
    """Limits the memory of this process to what it has and so many bytes more, where there is such a limit."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        most = int(statm.read_text().split()[0]) * resource.getpagesize() + more
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
