"""Rank 0 of a base that several ranks share: it computes its part, and has the others compute theirs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lorarep_runtime.config import BaseConfig
from lorarep_runtime.device.group import Group
from lorarep_runtime.device.ranks import Ranks
from lorarep_runtime.engine.messages import SentTables
from lorarep_runtime.errors import InvalidArgument
from lorarep_runtime.model.base import Base
from lorarep_runtime.model.batch import Batch
from lorarep_runtime.model.cut import FIELD
from lorarep_runtime.model.kv_cache import PagePool
from lorarep_runtime.model.loader import find_device
from lorarep_runtime.progress import Progress

FOLLOWER = "lorarep_runtime.engine.follower"
"""The module of the other ranks' processes."""


def start_ranks(config: BaseConfig) -> Ranks:
    """Starts the other ranks' processes.

    Raises:
        InvalidArgument: there are fewer devices.
    """
    count = config.tensor_parallel
    if find_device(config.device).type == "cpu":
        return Ranks(count, FOLLOWER, [{}] * (count - 1))
    devices = _visible_devices()
    if len(devices) < count:
        raise InvalidArgument(f"{count} ranks need as many devices, and there are {len(devices)}", field=FIELD)
    return Ranks(count, FOLLOWER, [{"CUDA_VISIBLE_DEVICES": device} for device in devices[1:count]])


def _visible_devices() -> Sequence[str]:
    """What CUDA_VISIBLE_DEVICES calls each device that this process may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return [str(i) for i in range(count)] if visible is None else visible.split(",")[:count]


class LeadingBase(Base):
    """Rank 0's part of a base. Its passes are those of all ranks.

    Raises:
        LorarepError: as Base, or because another rank cannot load its part.
    """

    def __init__(self, config: BaseConfig, ranks: Ranks, progress: Progress | None = None) -> None:
        self.ranks = ranks
        self._tables = SentTables()
        super().__init__(config, progress, lambda folder, device: self._join(config, folder, device))
        ranks.answers()

    def _join(self, config: BaseConfig, folder: Path, device: torch.device) -> Group:
        ranks = self.ranks
        ranks.answers()  # all have started
        ranks.tell("load", replace(config, base=str(folder), revision=None, device=str(device)))
        return ranks.join(device)

    def forward(self, batch: Batch, pool: PagePool, rows: Tensor) -> Tensor:
        """As of Base.

        Raises:
            EngineFailure: another rank has failed.
            Exception: as Base; then all ranks have failed, since the others wait in this pass.
        """
        self.ranks.tell("forward", self._tables.spans(batch.spans), batch.plan, rows.numpy())
        with self.ranks.together():
            return super().forward(batch, pool, rows)


class LeadingPool(PagePool):
    """Rank 0's pages. Those of the other ranks have the same numbers."""

    def __init__(self, pages: int, base: LeadingBase) -> None:
        self._ranks = base.ranks
        base.ranks.tell("make_pool", pages)
        super().__init__(pages, base.kv_shape, dtype=base.dtype, device=base.device)
        base.ranks.answers()

    def fill_with_zeros(self, pages: NDArray[np.int64]) -> None:
        self._ranks.tell("fill_with_zeros", pages)
        super().fill_with_zeros(pages)
