"""One block of memory for tensors that stay, apart from the memory of all that is made on the way to them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from lorarep_runtime.integers import round_up

ALIGNMENT = 128
"""Bytes: a line of the cache."""


class Arena:
    """Memory for tensors that stay, allocated at once.

    Allocated one by one, they would lie between the temporary tensors that they are made from. The allocator could not
    give those segments back for as long as they stay.
    """

    def __init__(self, tensors: Sequence[Tensor], device: torch.device, pool: torch.cuda.MemPool | None) -> None:
        """
        Args:
            tensors: the arena has room for a copy of each.
            pool: the allocator's pool that the memory comes from; None is the default one.
        """
        with nullcontext() if pool is None else torch.cuda.use_mem_pool(pool, device.index):
            nbytes = sum(round_up(t.nbytes, ALIGNMENT) for t in tensors)
            self._memory = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self._taken = 0

    def cat(self, tensors: tuple[Tensor, ...]) -> Tensor:
        """A copy, in the arena, of tensors of one dtype, concatenated along their first dimension."""
        shape = (sum(len(t) for t in tensors), *tensors[0].shape[1:])
        nbytes = sum(t.nbytes for t in tensors)
        memory = self._memory[self._taken : self._taken + nbytes]
        self._taken += round_up(nbytes, ALIGNMENT)
        return torch.cat(tensors, out=memory.view(tensors[0].dtype).view(shape))
