"""The adapters' part of a linear layer: y = c ⊙ (W x) + B (A x) + b, each slice of rows with its own A, B, c and b."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

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


def adapt(x: Tensor, y: Tensor, slices: Sequence[Slice]) -> None:
    """Applies adapter weights in place.

    Args:
        x: (rows, in).
        y: (rows, out), W x on entry. Rows outside all slices stay as they are.
        slices: disjoint, in order.
    """
    if len(x) == len(slices):  # a row each: decoding
        # BLAS libraries are several times as fast at vectors as at matrices of one row.
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
