"""Failpoints: places where a test can cause a fault that nothing from outside provokes, after etcd's gofail.

They do nothing unless the process was started with `LORAREP_FAILPOINTS` naming a folder. A file there with a
failpoint's name says how that failpoint acts, for as long as the file exists: `error`, `out-of-memory`, `panic`,
`sleep SECONDS`, or `hold`, which waits until the file is gone. After the word `once` the first thread that passes
removes the file. A failpoint that has acted leaves the file `NAME.reached`.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

_FOLDER = os.environ.get("LORAREP_FAILPOINTS")


class Panic(BaseException):
    """What a panic of a library in Rust becomes: no Exception."""


def failpoint(name: str) -> None:
    """Acts as the file of a name says, if there is one.

    Args:
        name: `step` comes before each step, and `forward` inside the work whose failure ends its own requests alone.
            `base` and `adapter` come before each is put into device memory, and `admission` before a request's prompt
            becomes tokens. `base-1`, `adapter-1` and `forward-1` come before rank 1 does its part of these.
            `compare` comes before a family is compared, in a process of its own. `load-` and a stage's name come when a
            load has reported that stage.
    """
    if _FOLDER is not None:
        _act(Path(_FOLDER, name))


def _act(file: Path) -> None:
    try:
        action, *more = file.read_text().split()
        if action == "once":
            file.unlink()
            action, *more = more
    except FileNotFoundError:
        return
    file.with_suffix(".reached").touch()
    match action:
        case "error":
            raise RuntimeError(f"failpoint {file.name}")
        case "out-of-memory":
            import torch  # slow to import, and not needed by a server that has yet to open its port

            raise torch.OutOfMemoryError(f"failpoint {file.name}")
        case "panic":
            raise Panic(f"failpoint {file.name}")
        case "sleep":
            time.sleep(float(more[0]))
        case "hold":
            while file.exists():
                time.sleep(0.01)
        case _:
            raise ValueError(f"failpoint {file.name}: {action!r} is not an action")
