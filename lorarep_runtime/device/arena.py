"""Memory for what stays, apart from what is made on the way to it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

ALIGNMENT = 128
"""Bytes: a line of the cache."""


class Arena:
    """Memory for tensors that stay, taken at once. Taken one by one they would lie amid what made them, in segments
    that the allocator cannot give back for as long."""

    def __init__(self, tensors: Sequence[Tensor], device: torch.device, pool: torch.cuda.MemPool | None) -> None:
        """Has room for copies of tensors, in segments of a pool."""
        with nullcontext() if pool is None else torch.cuda.use_mem_pool(pool, device.index):
            nbytes = sum(_padded(t.nbytes) for t in tensors)
            self._memory = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self._taken = 0

    def cat(self, tensors: tuple[Tensor, ...]) -> Tensor:
        """A copy of tensors of one kind, one under the other."""
        shape = (sum(len(t) for t in tensors), *tensors[0].shape[1:])
        nbytes = sum(t.nbytes for t in tensors)
        memory = self._memory[self._taken : self._taken + nbytes]
        self._taken += _padded(nbytes)
        return torch.cat(tensors, out=memory.view(tensors[0].dtype).view(shape))


def _padded(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
