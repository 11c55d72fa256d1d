"""Weights of packed modules, which read the same x, as Hopper's kernels read them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lorarep_runtime.integers import ceil_div
from lorarep_runtime.kernels.eager.dora_norm import norm_products, row_squares
from lorarep_runtime.kernels.entry_table import DecodeRows
from lorarep_runtime.kernels.hopper import int8, nf4, prefill_gemm
from lorarep_runtime.kernels.hopper.decode_gemm import decode_gemm
from lorarep_runtime.kernels.hopper.decode_gemm import sources as decode_gemm_sources
from lorarep_runtime.kernels.hopper.launch_config import launch_config_for
from lorarep_runtime.kernels.hopper.nf4 import CHUNK, TILE

DENSE_BYTES = 64 << 20
"""Bytes of bf16 of an int8 weight that is dequantized at a time. With smaller blocks the device waits for launches."""


def compile_gemms(bits: Iterable[int]) -> None:
    """Compiles the kernels for weights of some kinds concurrently: each takes seconds.

    Args:
        bits: of a number of each kind of weight: 4, 8 or 16.
    """
    from lorarep_runtime.kernels.hopper.nvrtc import compile_for_device

    bits = set(bits)
    sources: list[tuple[Path, Mapping[str, int]]] = [
        (nf4.SOURCE, {}),
        *(source for kind in bits for source in decode_gemm_sources(kind)),
    ]
    sources += [*prefill_gemm.sources()] if 4 in bits else []
    sources += [(int8.SOURCE, {})] if 8 in bits else []
    with ThreadPoolExecutor() as pool:
        for _ in pool.map(lambda source: compile_for_device(*source), sources):
            pass


@dataclass(frozen=True)
class PackedWeight:
    """The weights W of packed modules, one under the other: (outputs of all modules, in)."""

    bits: int
    """Bits of a number of the weights: 4 (NF4), 8 (int8) or 16 (bf16)."""
    weights: Tensor
    """4 bits: uint8 (tiles, chunks, 32, 16); 8: int8 (tiles, chunks, 2, 32, 16); 16: bf16 (outputs, in)."""
    scales: Tensor | None
    """4 bits: fp32 (tiles, chunks, 8, 2); 8: fp32 (outputs), each the value of 127; 16: None."""
    sizes: tuple[int, ...]
    """Outputs of each module, multiples of 16."""

    @property
    def _scales(self) -> Tensor:
        assert self.scales is not None
        return self.scales

    @property
    def columns(self) -> int:
        """Numbers of x that each output reads."""
        return self.weights.shape[1] * (1 if self.bits == 16 else CHUNK)

    @property
    def nbytes(self) -> int:
        """Bytes of the weights and their scales."""
        return self.weights.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def module(self, index: int) -> PackedWeight:
        """The weight of one module alone, in the same memory."""
        return self._outputs(sum(self.sizes[:index]), sum(self.sizes[: index + 1]))

    def _output_blocks(self) -> Iterator[PackedWeight]:
        """Blocks of outputs, in the same memory: those of an int8 weight take at most DENSE_BYTES when dequantized."""
        tiles = sum(self.sizes) // TILE
        count = min(tiles, ceil_div(tiles * TILE * self.columns * 2, DENSE_BYTES)) if self.bits == 8 else 1
        for i in range(count):
            yield self._outputs(tiles * i // count * TILE, tiles * (i + 1) // count * TILE)

    def _outputs(self, begin: int, end: int) -> PackedWeight:
        rows, tiles = slice(begin, end), slice(begin // TILE, end // TILE)
        scales = None if self.scales is None else self.scales[tiles if self.bits == 4 else rows]
        return PackedWeight(self.bits, self.weights[rows if self.bits == 16 else tiles], scales, (end - begin,))

    def decode_rows(self, rows: int, ranks: int) -> int:
        """Rows of `decode` for which the weight is read once. Arguments as for `launch_config_for`."""
        tiles, modules = sum(self.sizes) // TILE, len(self.sizes)
        return min(rows, 8 * launch_config_for(self.bits, tiles, self.columns, rows, modules, ranks).eights)

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
        deterministic: bool = False,
    ) -> None:
        """y = c ⊙ (W x) + B (A x) + b for every row, with the c, B and b of its own adapter.

        Rows without a position keep their y. The kernel starts while the previous one ends.

        Args:
            x: bf16 (rows, in).
            y: bf16 (rows, outputs of all modules).
            shrunk: fp32 (rows, parts, modules, ranks), partial sums of A x; ranks are a multiple of four.
            rows: the position and the adapter of each row.
            first: number of the first module in entry tables.
            bias: bf16 (outputs), the base's own; None is 0.
            add: add to y (a residual) rather than write it.
            deterministic: a row's y is bitwise the same for any number of rows, and for any ranks of the others.
        """
        weight = self.bits, self.weights, self.scales, self.sizes
        decode_gemm(*weight, x, y, shrunk, rows, first, bias=bias, add=add, deterministic=deterministic)

    def dense(self, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """W (outputs of all modules, in) as bitsandbytes dequantizes it; a bf16 weight itself."""
        if self.scales is None:
            return self.weights.to(dtype)
        if self.bits == 8:
            return int8.dequantize(self.weights, self.scales, dtype)
        if dtype != torch.bfloat16:
            return self.dense().to(dtype)
        out = torch.empty(sum(self.sizes), self.columns, dtype=dtype, device=self.weights.device)
        nf4.dequantize(self.weights, self.scales, out)
        return out

    def matmul(self, x: Tensor, y: Tensor) -> None:
        """y = W x for many rows.

        Args:
            x: bf16 (rows, in).
            y: bf16, or for NF4 also fp32, (rows, outputs of all modules), written.
        """
        if self.bits == 4:
            prefill_gemm.matmul(self.weights, self._scales, x, y)
            return
        blocks = [*self._output_blocks()]
        for block, to in zip(blocks, y.split([block.sizes[0] for block in blocks], 1), strict=True):
            torch.mm(x, block.dense().T, out=to)

    def row_squares(self) -> Tensor:
        """|w|² of the rows of W: fp32 (outputs of all modules)."""
        if self.bits == 4:
            out = torch.empty(sum(self.sizes), dtype=torch.float32, device=self.weights.device)
            nf4.squares(self.weights, self._scales, out)
            return out
        return torch.cat([row_squares(weight) * scales**2 for weight, scales in self._exact_blocks()])

    def norm_products(self, a: Tensor) -> Tensor:
        """A Wᵀ, fp32 (n, outputs of all modules), from A, fp32 (n, in). For int8 and bf16 weights."""
        return torch.cat([norm_products(weight, a) * scales for weight, scales in self._exact_blocks()], 1)

    def _exact_blocks(self) -> Iterator[tuple[Tensor, Tensor | float]]:
        """Each block of outputs as a bf16 matrix, and the factors, fp32, of its rows."""
        for block in self._output_blocks():
            if block.scales is None:
                yield block.weights, 1.0
            else:
                yield int8.dequantize(block.weights, None, torch.bfloat16), block.scales * (1 / 127)
