"""Adapters that requests no longer hold and that the device may still read."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Seq

import torch

from lorarep_runtime.adapters.lease import Lease
from lorarep_runtime.device.timer import DeviceMark


class DeferredReleases:
    """Leases that are released once the device has passed all that was launched before. Nobody waits for it.

    Loads of other adapters run on streams of their own: they would write to memory that a pass still reads. The step
    loop's thread alone touches it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._kept: deque[tuple[DeviceMark, Seq[Lease]]] = deque()

    def __bool__(self) -> bool:
        return bool(self._kept)

    def add(self, leases: Seq[Lease]) -> None:
        """Takes over leases of adapters that what has been launched may read."""
        if leases:
            self._kept.append((DeviceMark(self._device), leases))
            self.release_passed()

    def release_passed(self) -> None:
        """Releases what the device has passed."""
        while self._kept and self._kept[0][0].is_passed:
            self._release_oldest()

    def release_all(self) -> None:
        """Releases everything: nothing will be launched any more."""
        while self._kept:
            self._release_oldest()

    def _release_oldest(self) -> None:
        for lease in self._kept.popleft()[1]:
            lease.release()
