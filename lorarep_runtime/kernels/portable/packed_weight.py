"""Weights of packed modules, which read the same x, as the portable kernels read them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lorarep_runtime.integers import ceil_div
from lorarep_runtime.kernels.decode.expand import expand
from lorarep_runtime.kernels.eager import dora_norm
from lorarep_runtime.kernels.entry_table import DecodeRows
from lorarep_runtime.kernels.portable.dequantize import dequantize_nf4
from lorarep_runtime.kernels.portable.gemm import gemm
from lorarep_runtime.kernels.portable.launch_config import LAUNCH_CONFIGS, MOST_ROWS
from lorarep_runtime.kernels.portable.nf4 import TILE

DENSE_BYTES = 64 << 20
"""Bytes of a quantized weight in 16 bits that is dequantized at a time."""


@dataclass(frozen=True)
class PortableWeight:
    """The weights W of packed modules, one under the other: (outputs of all modules, in)."""

    bits: int
    """Bits of a number of the weights: 4 (NF4), 8 (int8) or 16 (bf16 or fp16)."""
    weights: Tensor
    """4 bits: int16 (tiles, chunks, 16, 32), of `nf4.arrange`; 8: int8 (outputs, in); 16: (outputs, in)."""
    scales: Tensor | None
    """4 bits: fp32 (tiles, 2 · chunks, 16); 8: fp32 (outputs), each the value of 127; 16: None."""
    sizes: tuple[int, ...]
    """Outputs of each module, multiples of 16."""
    columns: int
    """Numbers of x that each output reads."""

    @property
    def nbytes(self) -> int:
        """Bytes of the weights and their scales."""
        return self.weights.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def module(self, index: int) -> PortableWeight:
        """The weight of one module alone, in the same memory."""
        return self._outputs(sum(self.sizes[:index]), sum(self.sizes[: index + 1]))

    def _outputs(self, begin: int, end: int) -> PortableWeight:
        unit = TILE if self.bits == 4 else 1
        own = slice(begin // unit, end // unit)
        scales = None if self.scales is None else self.scales[own]
        return PortableWeight(self.bits, self.weights[own], scales, (end - begin,), self.columns)

    def _output_blocks(self) -> Iterator[PortableWeight]:
        """Blocks of outputs, in the same memory: those of a quantized weight take at most DENSE_BYTES in 16 bits."""
        tiles = sum(self.sizes) // TILE
        count = min(tiles, ceil_div(tiles * TILE * self.columns * 2, DENSE_BYTES)) if self.bits < 16 else 1
        for i in range(count):
            yield self._outputs(tiles * i // count * TILE, tiles * (i + 1) // count * TILE)

    def decode(
        self,
        x: Tensor,
        y: Tensor,
        shrunk: Tensor,
        rows: DecodeRows,
        first: int,
        *,
        bias: Tensor | None = None,
        add: bool = False,
    ) -> None:
        """y = c ⊙ (W x) + B (A x) + b for every row, with the c, B and b of its own adapter, by two kernels.

        Rows without a position keep their y. W x is rounded once, adapted.

        Args:
            x: (rows, in), at most `MOST_ROWS` rows.
            y: (rows, outputs of all modules).
            shrunk: fp32 (rows, parts, modules, ranks), partial sums of A x.
            rows: the position and the adapter of each row.
            first: number of the first module in entry tables.
            bias: (outputs), the base's own; None is 0.
            add: add to y (a residual) rather than write it.
        """
        # Programmatic dependent launch: a kernel starts while the one before it ends.
        pdl = x.is_cuda and torch.cuda.get_device_capability(x.device) >= (9, 0)
        terms = self.gemm(x, pdl=pdl)
        residual = y if add else None
        expand(y, shrunk, self.sizes, rows, first, bias=bias, residual=residual, terms=terms, pdl=pdl)

    def gemm(self, x: Tensor, *, y: Tensor | None = None, pdl: bool = False) -> Tensor:
        """W x as terms; arguments and result as for `gemm.gemm`."""
        return gemm(self.bits, self.weights, self.scales, x, y=y, pdl=pdl)

    def matmul(self, x: Tensor, y: Tensor) -> None:
        """y = W x for many rows.

        Args:
            x: bf16 or fp16 (rows, in); for 16 bits of the weight's dtype.
            y: of x's dtype, or for NF4 also fp32, (rows, outputs of all modules), contiguous, written.
        """
        if len(x) > MOST_ROWS and y.dtype == x.dtype:
            for block, to in zip(*self._blocks_of(y), strict=True):
                torch.mm(x, block.dense(x.dtype).T, out=to)
            return
        for some, to in zip(x.split(MOST_ROWS), y.split(MOST_ROWS), strict=True):
            terms = self.gemm(some, y=to)
            if len(terms) > 1:
                to.copy_(terms.sum(0))

    def _blocks_of(self, y: Tensor) -> tuple[list[PortableWeight], tuple[Tensor, ...]]:
        blocks = [*self._output_blocks()]
        return blocks, y.split([block.sizes[0] for block in blocks], 1)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """W (outputs of all modules, in) as bitsandbytes dequantizes it: scaled in fp32 and rounded once."""
        if self.scales is None:
            return self.weights.to(dtype)
        if self.bits == 8:
            return (self.weights * self._row_scales()).to(dtype)
        return dequantize_nf4(self.weights, self.scales, self.columns, dtype)

    def _row_scales(self) -> Tensor:
        """Factors of an int8 weight's rows, fp32 (outputs, 1)."""
        assert self.scales is not None
        return (self.scales * (1 / 127)).unsqueeze(1)

    def row_squares(self) -> Tensor:
        """|w|² of the rows of W: fp32 (outputs of all modules)."""
        return torch.cat([dora_norm.row_squares(block.dense(torch.float32)) for block in self._output_blocks()])

    def norm_products(self, a: Tensor) -> Tensor:
        """A Wᵀ, fp32 (n, outputs of all modules), from A, fp32 (n, in). For int8 and 16-bit weights."""
        if self.bits == 16:
            return dora_norm.norm_products(self.weights, a)
        blocks = self._output_blocks()
        return torch.cat(
            # bf16 holds the numbers exactly.
            [dora_norm.norm_products(b.weights.bfloat16(), a) * b._row_scales().T for b in blocks],
            1,
        )

    def load_kernels(self, dtype: torch.dtype) -> None:
        """Compiles and loads all that multiplies with the weight, by launching each kernel once.

        Args:
            dtype: of the activations.
        """
        for rows in (*LAUNCH_CONFIGS[self.bits], MOST_ROWS, MOST_ROWS + 1):
            x = torch.zeros(rows, self.columns, dtype=dtype, device=self.weights.device)
            self.matmul(x, x.new_empty(rows, sum(self.sizes)))
