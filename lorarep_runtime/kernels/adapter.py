"""The adapters' part of a linear layer: y = c ⊙ (W x) + B (A x) + b, each slice of rows with its own A, B, c and b."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Slice(NamedTuple):
    """Rows [start, stop) and the adapter weights they compute with."""

    start: int
    stop: int
    A: Tensor
    """(rank, in)"""
    B: Tensor
    """(out, rank), best held so that its transpose is contiguous."""
    c: Tensor | None
    """(out); None is 1."""
    b: Tensor | None
    """(out); None is 0."""


FEW_ROWS = 64
"""Up to here the rows of all slices are multiplied with the weights of all of them at once: the products wasted cost
less than launching each slice's own."""


def adapt(x: Tensor, y: Tensor, slices: Sequence[Slice]) -> None:
    """Applies adapter weights in place.

    Args:
        x: (rows, in).
        y: (rows, out), W x on entry. Rows outside all slices stay as they are.
        slices: disjoint.
    """
    together = len(slices) > 1 and x.shape[0] <= FEW_ROWS
    if together:
        # Each row meets every A; what belongs to other slices is masked before B.
        low = x @ torch.cat([s.A for s in slices]).T
        foreign = torch.ones_like(low, dtype=torch.bool)
        column = 0
        for s in slices:
            foreign[s.start : s.stop, column : (column := column + s.A.shape[0])] = False
        low.masked_fill_(foreign, 0)  # a product would let another adapter's infinities through as NaN
    for s in slices:
        rows = y[s.start : s.stop]
        if s.c is not None:
            rows.mul_(s.c)
        if not together:
            rows.addmm_(x[s.start : s.stop] @ s.A.T, s.B.T)
        if s.b is not None:
            rows.add_(s.b)
    if together:
        y.addmm_(low, torch.cat([s.B.T for s in slices]))
