"""The threads that torch computes with on the CPU: as many as the process may use processors.

In a container torch counts the processors of the host. Threads over the container's limit wait for each other, while
the kernel halts all of them for the rest of each period.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch

log = logging.getLogger(__name__)


def limit_threads(processes: int = 1) -> None:
    """Sets the number of torch's threads for the whole process, unless `OMP_NUM_THREADS` says it. Never raises it.

    Args:
        processes: that compute on the same processors.
    """
    usable = max(1, usable_processors() // processes)
    if not os.environ.get("OMP_NUM_THREADS") and usable < torch.get_num_threads():
        torch.set_num_threads(usable)
    log.info("%d threads on %d processors, of which %d may be used", torch.get_num_threads(), os.cpu_count(), usable)


def usable_processors(root: Path = Path("/")) -> int:
    """Processors that the process may use, by its affinity and the quotas of its control groups; at least 1.

    Args:
        root: where /proc and /sys are.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min([allowed, *_quotas(root)])))


def _quotas(root: Path) -> Iterator[float]:
    """The quotas of the process's control groups and all above them, in processors."""
    try:
        groups = Path(root, "proc/self/cgroup").read_text().splitlines()
    except OSError:  # no Linux
        return
    for group in groups:
        _, controllers, path = group.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = Path(root, "sys/fs/cgroup", *(("cpu",) if controllers else ()))
        # In a container the path may be the host's; its own group is then at the top.
        for folder in (top, *(top.joinpath(*Path(path).parts[1:i]) for i in range(2, len(Path(path).parts) + 1))):
            with suppress(OSError, ValueError):
                yield _quota(folder)


def _quota(folder: Path) -> float:
    """The quota of a control group in processors. Raises OSError or ValueError where there is none."""
    if (v2 := folder / "cpu.max").exists():
        quota, period = v2.read_text().split()
    else:
        quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
    if int(quota) < 0:  # in the first version; the second one says "max", which is no number
        raise ValueError("no quota")
    return int(quota) / int(period)
