"""Places where a test can have a fault happen that nothing from outside provokes, after etcd's gofail.

They do nothing unless the process was started with `LORAREP_FAILPOINTS` naming a folder. Then a failpoint does what the
file of its name there says, for as long as there is one: `error`, `out-of-memory`, `sleep SECONDS`, or `hold` until the
file is gone; after `once` it is gone with the first that comes by. That a failpoint has acted, `NAME.reached` shows.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

_FOLDER = os.environ.get("LORAREP_FAILPOINTS")


def failpoint(name: str) -> None:
    """Passes a failpoint: `step` before each, `forward` inside what ends its requests alone, `base` and `adapter`
    before each is put into device memory, `load-` and a stage when a load has reported it."""
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
            import torch  # slow to import, and no business of a server that has yet to open its port

            raise torch.OutOfMemoryError(f"failpoint {file.name}")
        case "sleep":
            time.sleep(float(more[0]))
        case "hold":
            while file.exists():
                time.sleep(0.01)
        case _:
            raise ValueError(f"failpoint {file.name}: {action!r} is not an action")
