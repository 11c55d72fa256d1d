"""LoRA and DoRA of a linear layer by torch: y = c ⊙ (W x) + B (A x) + b, with A, B, c and b for each slice of rows.

A and B are LoRA's (Hu et al., 2021). DoRA (Liu et al., 2024) adds c, its magnitude divided by its norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Slice(NamedTuple):
    """Rows [start, stop) of a batch, and the adapter weights of one linear module that they use."""

    start: int
    stop: int
    A: Tensor
    """(rank, in), shrinks x."""
    B: Tensor
    """(out, rank), expands A x. Products are fastest if its transpose is contiguous."""
    c: Tensor | None
    """(out), factors of W x; None is 1."""
    b: Tensor | None
    """(out), the adapter's bias; None is 0."""


def adapt(x: Tensor, y: Tensor, slices: Sequence[Slice]) -> None:
    """Applies each slice's adapter weights to y = W x in place: y = c ⊙ y + B (A x) + b.

    Args:
        x: (rows, in), input of the linear module.
        y: (rows, out), W x on entry. Rows outside all slices keep it.
        slices: disjoint, in the order of their rows.
    """
    if len(x) == len(slices):  # decoding: each slice is one row
        # BLAS multiplies a vector several times as fast as a matrix of one row.
        for s, into, row in zip(slices, x.unbind(), y.unbind(), strict=True):
            if s.c is not None:
                row.mul_(s.c)
            row.addmv_(s.B, s.A.mv(into))
            if s.b is not None:
                row.add_(s.b)
        return
    for s in slices:
        rows = y[s.start : s.stop]
        if s.c is not None:
            rows.mul_(s.c)
        rows.addmm_(x[s.start : s.stop] @ s.A.T, s.B.T)
        if s.b is not None:
            rows.add_(s.b)
