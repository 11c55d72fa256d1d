"""Sums and logits of the ranks that share a base, inside captured steps: by NCCL, or by torch's symmetric memory.

Rank 0 adds its term to h, the others add theirs to zeros, and the sum of all is the new h. So the kernels that add a
module's outputs to h are those of one device.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lorarep_runtime.device.group import Group

log = logging.getLogger(__name__)

ONE_SHOT_BYTES = 512 << 10
"""Up to so many bytes each rank reads the terms of all others; with more, each sums a part, which takes two rounds. On
two H200s both take 8 µs there, and NCCL 20 µs."""


class RankSums:
    """The sums of one rank, and its logits for rank 0. All ranks ask for the same ones, in the same order."""

    def __init__(self, group: Group, device: torch.device) -> None:
        self._group = group
        self._device = device
        self._terms: Tensor | None = None
        """This rank's term, in memory that all ranks read; None leaves the sums to the group."""
        self._parts: Any = None
        """By which rank 0 reads the parts of all ranks; None leaves that to the group."""
        self.tensors: list[Tensor] = []
        """What all ranks read of this one's memory."""
        self._operators: Any = torch.ops.symm_mem

    def take_memory(self, h: Tensor, logits: int) -> None:
        """Takes memory that all ranks read, where they can. All ranks call it at the same time.

        Args:
            h: (rows, hidden size), of the largest step.
            logits: most numbers that `gather` is given, of h's dtype.
        """
        if self._device.type != "cuda":
            return
        works = h.new_ones(1, dtype=torch.float32)
        try:
            self._terms, self._parts = self._shared_terms(h), self._shared_parts(h.new_empty(logits))
        except Exception:
            log.warning("sums go through NCCL: no memory is shared among the ranks", exc_info=True)
            works.zero_()
        self._group.add_up(works)
        if works.item() != self._group.ranks:
            self._terms = self._parts = None
            self.tensors.clear()

    def _shared_memory(self, like: Tensor) -> tuple[Tensor, Any]:
        """Memory of a tensor's size and dtype that all ranks read, and by which each reads the others'."""
        from torch.distributed import _symmetric_memory as symmetric

        memory = symmetric.empty(like.numel(), dtype=like.dtype, device=like.device)
        handle = symmetric.rendezvous(memory, self._group.name)
        self.tensors.append(memory)
        return memory, handle

    def _shared_terms(self, h: Tensor) -> Tensor:
        terms, _ = self._shared_memory(h)
        for sum_up, numbers in ((self._one_shot, 256), (self._two_shots, h.numel())):
            terms.fill_(self._group.rank + 1)
            found = torch.empty_like(terms[:numbers])
            sum_up(terms[:numbers], found)
            if not (found == self._group.ranks * (self._group.ranks + 1) / 2).all():
                raise RuntimeError("a sum is wrong")
        return terms

    def _shared_parts(self, like: Tensor) -> Any:
        _, parts = self._shared_memory(like)
        found = self._exchanged(parts, like.fill_(self._group.rank + 1))
        if any((part != rank).any() for rank, part in enumerate(found, 1)):
            raise RuntimeError("a part is wrong")
        return parts

    def begin(self, h: Tensor) -> Tensor:
        """Where this rank's term is to be added to what is there; h's values may be lost until `end`.

        Args:
            h: (rows, hidden size), the same on all ranks.
        """
        term = h if self._terms is None else self._terms[: h.numel()].view_as(h)
        if self._group.rank:
            term.fill_(0)
        elif term is not h:
            torch.mul(h, 1, out=term)  # a kernel: the next one begins while it ends, which it does with no copy
        return term

    def end(self, term: Tensor, h: Tensor) -> None:
        """Writes the sum of all ranks' terms to h. term: as `begin` gave it."""
        if self._terms is None:
            self._group.add_up(h)
        elif h.nbytes <= ONE_SHOT_BYTES:
            self._one_shot(term, h)
        else:
            self._two_shots(term, h)

    def put(self, term: Tensor, h: Tensor) -> None:
        """Writes the sum of all ranks' terms to h; both are (rows, hidden size)."""
        own = h if self._terms is None else self._terms[: h.numel()].view_as(h)
        own.copy_(term)
        self.end(own, h)

    def share(self, tokens: Tensor) -> None:
        """Overwrites a tensor with rank 0's."""
        self._group.share(tokens)

    def gather(self, part: Tensor, whole: Tensor) -> bool:
        """Writes the parts of all ranks, one beside the other, on rank 0. Returns whether this is rank 0.

        Args:
            part: (n, width).
            whole: (n, up to ranks · width); what parts have beyond its end is left out.
        """
        parts = self._group.gather(part) if self._parts is None else self._exchanged(self._parts, part)
        for columns, own in zip(whole.split(part.shape[1], 1), parts, strict=False):
            columns.copy_(own[:, : columns.shape[1]])
        return bool(parts)

    def _exchanged(self, parts: Any, part: Tensor) -> Sequence[Tensor]:
        """On rank 0 the parts of all ranks, in their memory.

        Another rank overwrites its own at the end of the next step, whose first sum waits for what rank 0 read before.
        """
        parts.get_buffer(self._group.rank, part.shape, part.dtype).copy_(part)
        parts.barrier()
        if self._group.rank:
            return []
        return [parts.get_buffer(rank, part.shape, part.dtype) for rank in range(self._group.ranks)]

    def of_prompts(self, term: Tensor) -> Tensor:
        """The sum of many rows' terms, in place."""
        self._group.add_up(term)
        return term

    def _one_shot(self, term: Tensor, to: Tensor) -> None:
        self._operators.one_shot_all_reduce_out(term, "sum", self._group.name, to)

    def _two_shots(self, term: Tensor, to: Tensor) -> None:
        self._operators.two_shot_all_reduce_(term, "sum", self._group.name)
        to.copy_(term)
