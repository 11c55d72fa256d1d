"""Linear modules that read the same x, with each row's own adapter: y = c ⊙ (W x) + B (A x) + b.

W is the base's and shared by all rows; A, B, c and the adapter's bias belong to each row's adapter (DoRA has a c, LoRA
has none). On Hopper a kernel carries the adapters in its epilogue; elsewhere a portable kernel or a library multiplies,
and a second kernel adapts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from lorarep_runtime.kernels.decode.expand import expand
from lorarep_runtime.kernels.entry_table import DecodeRows
from lorarep_runtime.kernels.hopper.packed_weight import PackedWeight
from lorarep_runtime.kernels.portable.launch_config import MOST_ROWS
from lorarep_runtime.kernels.portable.packed_weight import PortableWeight
from lorarep_runtime.model.packed import PackedPart
from lorarep_runtime.model.weights import Weight

MOST_KERNEL_ROWS = {4: 32, 8: 64, 16: 64}
"""Most rows of a step for the decode GEMM, by the weight's bits. It reads the weight once for 32 of them at most."""


class AdaptedLinear(Protocol):
    """Linear modules that read the same x; their outputs lie side by side in y."""

    def decode(
        self, x: Tensor, y: Tensor, shrunk: Tensor, rows: DecodeRows, first: int, *, bias: Tensor | None, add: bool
    ) -> None:
        """y = c ⊙ (W x) + B shrunk + b for rows of one new token each, or that added to y.

        Rows without a position may get any y where `add` is False, and keep theirs where it is True.

        Args:
            x: (rows, in).
            y: (rows, outputs of all modules), written.
            shrunk: fp32 (rows, parts, modules, ranks), A x as partial sums (`kernels.entry_table`).
            first: number of the first module in entry tables.
            bias: (outputs of all modules), the base's own; None is 0.
        """

    def matmul(self, x: Tensor, y: Tensor) -> None:
        """y = W x for many rows: x (rows, in), y (rows, outputs of all modules)."""


def adapted_linear(weights: Sequence[Weight], *, deterministic: bool = False) -> AdaptedLinear:
    """The modules of some weights, which are all packed together or all not.

    Args:
        deterministic: a row's y of `decode` is bitwise the same for any number of rows. A library's is not.
    """
    first = weights[0]
    if isinstance(first, PackedPart):
        packed = first.packed
        if isinstance(packed, PortableWeight):
            return PortableLinear(packed)
        return PackedLinear(packed, deterministic=deterministic)
    return LibraryLinear(weights)


class LibraryLinear:
    """An AdaptedLinear of weights that have no kernel of lorarep's own."""

    def __init__(self, weights: Sequence[Weight]) -> None:
        self._weights = weights
        self._sizes = [weight.shape[0] for weight in weights]

    def decode(
        self, x: Tensor, y: Tensor, shrunk: Tensor, rows: DecodeRows, first: int, *, bias: Tensor | None, add: bool
    ) -> None:
        _multiply_then_adapt(self.matmul, x, y, shrunk, self._sizes, rows, first, bias=bias, add=add, pdl=False)

    def matmul(self, x: Tensor, y: Tensor) -> None:
        for weight, to in zip(self._weights, y.split(self._sizes, 1), strict=True):
            to.copy_(weight.matmul(x))


class PackedLinear:
    """An AdaptedLinear of a packed weight: one kernel for few rows, and another for many."""

    def __init__(self, packed: PackedWeight, *, deterministic: bool) -> None:
        """
        Args:
            deterministic: as for `adapted_linear`: the kernel for few rows takes many, too, and reads the weight anew
                for every 32 of them.
        """
        self.packed, self._deterministic = packed, deterministic
        self.matmul = packed.matmul

    def decode(
        self, x: Tensor, y: Tensor, shrunk: Tensor, rows: DecodeRows, first: int, *, bias: Tensor | None, add: bool
    ) -> None:
        packed = self.packed
        if self._deterministic or self._is_read_once(len(x), shrunk.shape[3]):
            packed.decode(x, y, shrunk, rows, first, bias=bias, add=add, deterministic=self._deterministic)
        else:
            _multiply_then_adapt(self.matmul, x, y, shrunk, packed.sizes, rows, first, bias=bias, add=add, pdl=True)

    def _is_read_once(self, rows: int, ranks: int) -> bool:
        """Whether the decode GEMM is the faster one."""
        packed = self.packed
        # Shared memory has no room for many rows of a long x, and the prefill GEMM reads the weight once for 64 rows.
        return rows <= MOST_KERNEL_ROWS[packed.bits] and (packed.bits != 4 or packed.decode_rows(rows, ranks) == rows)


class PortableLinear:
    """An AdaptedLinear of a weight that the portable kernels multiply with."""

    def __init__(self, packed: PortableWeight) -> None:
        self.packed = packed
        self.matmul = packed.matmul

    def decode(
        self, x: Tensor, y: Tensor, shrunk: Tensor, rows: DecodeRows, first: int, *, bias: Tensor | None, add: bool
    ) -> None:
        packed = self.packed
        if len(x) <= MOST_ROWS:
            packed.decode(x, y, shrunk, rows, first, bias=bias, add=add)
        else:
            _multiply_then_adapt(self.matmul, x, y, shrunk, packed.sizes, rows, first, bias=bias, add=add, pdl=False)


def _multiply_then_adapt(
    matmul: Callable[[Tensor, Tensor], None],
    x: Tensor,
    y: Tensor,
    shrunk: Tensor,
    sizes: Sequence[int],
    rows: DecodeRows,
    first: int,
    *,
    bias: Tensor | None,
    add: bool,
    pdl: bool,
) -> None:
    plain = torch.empty_like(y) if add else y
    matmul(x, plain)
    expand(plain, shrunk, sizes, rows, first, bias=bias, residual=y if add else None, pdl=pdl)
