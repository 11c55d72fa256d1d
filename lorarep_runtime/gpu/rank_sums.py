"""Sums over the ranks that share a base, inside captured steps: NCCL's, or those of torch's symmetric memory.

Rank 0 adds its term to h, the others add theirs to zeros, and the sum of all is the new h. So the kernels that add a
module's outputs to h are those of one device.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from lorarep_runtime.device.group import Group

log = logging.getLogger(__name__)

ONE_SHOT_BYTES = 512 << 10
"""Up to so many bytes each rank reads the terms of all others; with more, each sums a part, which takes two rounds. On
two H200s both take 8 µs there, and NCCL 20 µs."""


class RankSums:
    """The sums of one rank. All ranks ask for the same ones, in the same order."""

    def __init__(self, group: Group, device: torch.device) -> None:
        self._group = group
        self._device = device
        self._terms: Tensor | None = None
        """This rank's term, in memory that all ranks read; None leaves the sums to the group."""
        self._operators: Any = torch.ops.symm_mem

    def take_memory(self, h: Tensor) -> None:
        """Takes memory that all ranks read, where they can. All ranks call it at the same time.

        Args:
            h: (rows, hidden size), of the largest step.
        """
        if self._device.type != "cuda":
            return
        works = h.new_ones(1, dtype=torch.float32)
        try:
            self._terms = self._shared_memory(h)
        except Exception:
            log.warning("sums go through NCCL: no memory is shared among the ranks", exc_info=True)
            works.zero_()
        self._group.add_up(works)
        if works.item() != self._group.ranks:
            self._terms = None

    def _shared_memory(self, h: Tensor) -> Tensor:
        from torch.distributed import _symmetric_memory as symmetric

        terms = symmetric.empty(h.numel(), dtype=h.dtype, device=h.device)
        symmetric.rendezvous(terms, self._group.name)
        for sum_up, numbers in ((self._one_shot, 256), (self._two_shots, h.numel())):
            terms.fill_(self._group.rank + 1)
            found = torch.empty_like(terms[:numbers])
            sum_up(terms[:numbers], found)
            if not (found == self._group.ranks * (self._group.ranks + 1) / 2).all():
                raise RuntimeError("a sum is wrong")
        return terms

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
        parts = self._group.gather(part)
        for columns, own in zip(whole.split(part.shape[1], 1), parts, strict=False):
            columns.copy_(own[:, : columns.shape[1]])
        return bool(parts)

    def of_prompts(self, term: Tensor) -> Tensor:
        """The sum of many rows' terms, in place."""
        self._group.add_up(term)
        return term

    def _one_shot(self, term: Tensor, to: Tensor) -> None:
        self._operators.one_shot_all_reduce_out(term, "sum", self._group.name, to)

    def _two_shots(self, term: Tensor, to: Tensor) -> None:
        self._operators.two_shot_all_reduce_(term, "sum", self._group.name)
        to.copy_(term)
