"""NF4 weights in the order in which tensor cores read them, and their product with few rows.

bitsandbytes packs a weight (out, in) row by row, two 4-bit numbers a byte, the first in the high half, with an fp32
scale for each 64 (QLoRA, Dettmers et al., 2023). Here the same bytes and scales lie as `nf4.cu` reads them: not one bit
of a value changes, and the weight is held once.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lorarep_runtime.kernels.rows import PlainRows, Rows

if TYPE_CHECKING:
    from lorarep_runtime.kernels.cuda import Kernel

SOURCE = Path(__file__).with_suffix(".cu")
TILE = 16
"""Rows of a weight that a warp works on at once."""
CHUNK = 64
"""Columns that share a scale."""
MAX_MODULES = 3
"""Of a group: the modules that read the same x."""


def arrange(packed: Tensor, scales: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """From bitsandbytes' order to tiles.

    Args:
        packed: uint8, out · in / 2 bytes.
        scales: fp32, out · in / 64.
        shape: (out, in), multiples of 16 and 64.

    Returns:
        uint8 (tiles, chunks, 32 lanes, 16) and fp32 (tiles, chunks, 8, 2): lane 4g + t holds the columns 16t..16t+15 of
        a chunk for the rows g and g + 8 of a tile.
    """
    out, into = shape
    tiles, chunks = out // TILE, into // CHUNK
    bytes_ = packed.view(tiles, 2, 8, chunks, 4, 8).permute(0, 3, 2, 4, 1, 5)
    return (
        bytes_.reshape(tiles, chunks, 32, 16).contiguous(),
        scales.view(tiles, 2, 8, chunks).permute(0, 3, 2, 1).contiguous(),
    )


class Group(ctypes.Structure):
    """`Group` of `nf4.cu`."""

    _fields_: ClassVar[Any] = [
        *((name, ctypes.c_void_p) for name in ("weights", "scales", "x", "y")),
        *((name, ctypes.c_void_p) for name in ("base_bias", "low", "positions", "adapters")),
        *((name, ctypes.c_int) for name in ("rows", "columns", "tiles", "parts")),
        *((name, ctypes.c_int) for name in ("ranks", "first", "modules", "all_modules")),
        ("ends", ctypes.c_int * MAX_MODULES),
        *((name, ctypes.c_int) for name in ("add", "tiles_per_cta", "rank_segment")),
    ]


@dataclass(frozen=True)
class Spread:
    """How a product is spread over the device."""

    eights: int
    """Rows of x, in eights."""
    tiles: int
    """Of a warp."""
    depth: int
    """Chunks of each tile that a warp has on their way."""
    warps: int
    """Warps times tiles are even: each CTA of a cluster of 8 finishes a multiple of four outputs."""
    ctas: int
    """CTAs for which a multiprocessor has registers."""
    cluster: int = 1
    """CTAs that split the columns."""

    @property
    def cta_tiles(self) -> int:
        return self.warps * self.tiles

    def grid(self, tiles: int) -> int:
        return -(-tiles // self.cta_tiles) * self.cluster

    def load(self, tiles: int, chunks: int) -> tuple[int, int]:
        """Tiles times chunks that the busiest multiprocessor multiplies; and in how many CTAs.

        It takes as many as it can at once, even where others are left without.
        """
        ctas = max(self.ctas, -(-self.grid(tiles) // MULTIPROCESSORS))
        return ctas * self.cta_tiles * -(-chunks // self.cluster), ctas

    def shared_bytes(self, columns: int, rows: int, modules: int, rank_segment: int) -> int:
        width = -(-(columns // CHUNK) // self.cluster) * CHUNK
        sums, x = 4 * 8 * self.eights * self.cta_tiles * TILE, 2 * 8 * self.eights * (width + 8)
        return TABLE_BYTES + sums + x + rows * modules * (ENTRY_BYTES + 4 * rank_segment)

    @property
    def defines(self) -> Mapping[str, int]:
        """What the source is compiled with."""
        named = {"EIGHTS": self.eights, "TILES": self.tiles, "DEPTH": self.depth, "CTAS": self.ctas}
        return {**named, "THREADS": 32 * self.warps}


MULTIPROCESSORS = 132
SHARED_BYTES = 227 << 10
"""Shared memory of a multiprocessor."""
CTA_BYTES = 1024
"""Of it, what each CTA takes for itself."""
TABLE_BYTES = 256 * 128
ENTRY_BYTES = 32
RANK_SEGMENT = 64
"""Ranks whose low is in shared memory at a time."""
SPREADS = {
    1: [Spread(1, 2, 4, 8, 2), Spread(1, 2, 4, 10, 1)],
    2: [Spread(2, 2, 2, 14, 1), Spread(2, 2, 2, 10, 1)],
    4: [Spread(4, 1, 3, 14, 1), Spread(4, 2, 2, 10, 1)],
}
"""By eights of rows, what measurements on an H100 left; of equal loads the one of fewer CTAs is taken. More rows take
several launches.
"""


@cache
def _kernel(name: str, spread: Spread) -> Kernel:
    from lorarep_runtime.kernels.cuda import Kernel

    return Kernel(SOURCE, name, spread.defines)


@cache
def spread_for(tiles: int, columns: int, rows: int, modules: int, rank_segment: int) -> Spread:
    """The spread for a product, with as many of the rows at a time as x and sums leave shared memory for.

    Raises:
        ValueError: there is none.
    """
    for eights in (eights for eights in sorted(SPREADS, reverse=True) if eights == 1 or 4 * eights < rows):
        spreads = [replace(one, cluster=cluster) for one in SPREADS[eights] for cluster in (8, 4, 2, 1)]
        taken = min(rows, 8 * eights)
        fitting = [
            one
            for one in spreads
            if one.shared_bytes(columns, taken, modules, rank_segment) <= SHARED_BYTES // one.ctas - CTA_BYTES
        ]
        if fitting:
            # At most two CTAs a multiprocessor: beside them those of the next kernel can begin.
            full = 2 * MULTIPROCESSORS
            return min(fitting, key=lambda one: (one.grid(tiles) > full, one.load(tiles, columns // CHUNK)))
    raise ValueError(f"no spread for {columns} columns")


@dataclass(frozen=True)
class TiledGroup:
    """Weights of modules that read the same x, one under the other, in tiles."""

    tiles: Tensor
    """uint8 (tiles, chunks, 32, 16)"""
    scales: Tensor
    """fp32 (tiles, chunks, 8, 2)"""
    sizes: tuple[int, ...]
    """Outputs of each module, multiples of 16."""

    def product(
        self,
        x: Tensor,
        y: Tensor,
        low: Tensor,
        rows: Rows,
        first: int,
        *,
        bias: Tensor | None = None,
        add: bool = False,
    ) -> None:
        """y = c ⊙ (W x) + B (A x) + b for every row with its own adapter's c, B and b; added to y where `add`.

        Rows without a position keep their y. Starts while the kernel before ends.

        Args:
            x: bf16 (rows, in).
            y: bf16 (rows, outputs of all modules).
            low: fp32 (rows, parts, modules, ranks), partial sums of A x.
            first: number of the first module in entry tables.
            bias: bf16 (outputs), the base's own.
        """
        ranks = low.shape[3]
        segment = min(ranks, RANK_SEGMENT)
        columns, tiles = x.shape[1], len(self.tiles)
        ends = [*accumulate(self.sizes), *[tiles * TILE] * MAX_MODULES][:MAX_MODULES]
        at = 0
        while at < len(x):
            spread = spread_for(tiles, columns, len(x) - at, len(self.sizes), segment)
            count = min(len(x) - at, 8 * spread.eights)
            group = Group(
                weights=self.tiles.data_ptr(),
                scales=self.scales.data_ptr(),
                x=x[at:].data_ptr(),
                y=y[at:].data_ptr(),
                base_bias=None if bias is None else bias.data_ptr(),
                low=low[at:].data_ptr(),
                positions=rows.positions[at:].data_ptr(),
                adapters=rows.adapters[at:].data_ptr(),
                rows=count,
                columns=columns,
                tiles=tiles,
                parts=low.shape[1],
                ranks=ranks,
                first=first,
                modules=len(self.sizes),
                all_modules=rows.modules,
                ends=(ctypes.c_int * MAX_MODULES)(*ends),
                add=add,
                tiles_per_cta=spread.cta_tiles,
                rank_segment=segment,
            )
            _kernel("nf4_product", replace(spread, cluster=1))(
                spread.grid(tiles),
                32 * spread.warps,
                group,
                shared=spread.shared_bytes(columns, count, len(self.sizes), segment),
                cluster=spread.cluster,
                dependent=True,
            )
            at += count

    def matmul(self, x: Tensor) -> Tensor:
        """W x for many rows, by the library: bf16 (rows, in) to (rows, outputs of all modules)."""
        dense = torch.empty(sum(self.sizes), x.shape[1], dtype=torch.bfloat16, device=x.device)
        dequantize(self.tiles, self.scales, dense)
        return F.linear(x, dense)


def product_reference(
    weight: Tensor,
    x: Tensor,
    y: Tensor,
    low: Tensor,
    rows: PlainRows,
    first: int,
    sizes: Sequence[int],
    *,
    bias: Tensor | None = None,
    add: bool = False,
) -> None:
    """The same from a dense weight (outputs, in)."""
    plain = (x.float() @ weight.float().T).to(torch.float32)
    for row, _ in rows.walking():
        start = 0
        for module, size in enumerate(sizes):
            at = slice(start, start := start + size)
            value = plain[row, at]
            if (entry := rows.entry(row, first + module)) is not None:
                value = value if entry.c is None else value * entry.c.float()
                value = value + entry.B.float() @ low[row, :, module, : len(entry.A)].sum(0)
                value = value if entry.bias is None else value + entry.bias.float()
            if bias is not None:
                value = value + bias[at].float()
            y[row, at] = (value + y[row, at].float() if add else value).to(y.dtype)


def dequantize(tiles: Tensor, scales: Tensor, out: Tensor) -> None:
    """The weight (out, in) in bf16, as bitsandbytes dequantizes it: code times scale in fp32, rounded once."""
    units = tiles.shape[0] * tiles.shape[1]
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (tiles, scales, out)]
    kernel = _kernel("nf4_dequantize", SPREADS[1][0])
    kernel(-(-units // 8), 256, *pointers, ctypes.c_int(out.shape[1]), ctypes.c_longlong(units))
