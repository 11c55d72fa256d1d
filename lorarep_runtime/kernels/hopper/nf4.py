"""NF4 weights as the kernels read them.

bitsandbytes packs an NF4 weight (out, in) row by row, two numbers a byte, the first in the high half, with an fp32
scale for each 64 (QLoRA, Dettmers et al., 2023). The kernels read the same bytes and scales in tiles: not one bit of a
value changes, and the weight is held once.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from lorarep_runtime.kernels.hopper.nvrtc import Kernel

SOURCE = Path(__file__).with_suffix(".cu")
TILE = 16
"""Outputs, rows of a weight, in a tile."""
CHUNK = 64
"""Columns in a chunk, which share an NF4 scale."""


def arrange(packed: Tensor, scales: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """An NF4 weight from bitsandbytes' order to tiles.

    Args:
        packed: uint8, out · in / 2 bytes.
        scales: fp32, out · in / 64.
        shape: (out, in), multiples of 16 and 64.

    Returns:
        uint8 (tiles, chunks, 32 lanes, 16) and fp32 (tiles, chunks, 8, 2): lane 4g + t of a warp gives tensor
        cores the columns 2t, 2t + 1, 2t + 8 and 2t + 9 of each 16 of a chunk, for the rows g and g + 8 of a tile.
    """
    out, into = shape
    tiles, chunks = out // TILE, into // CHUNK
    bytes_ = packed.view(tiles, 2, 8, chunks, 4, 2, 4).permute(0, 3, 2, 6, 1, 4, 5)
    return (
        bytes_.reshape(tiles, chunks, 32, 16).contiguous(),
        scales.view(tiles, 2, 8, chunks).permute(0, 3, 2, 1).contiguous(),
    )


@cache
def dequantize_kernel() -> Kernel:
    from lorarep_runtime.kernels.hopper.nvrtc import Kernel

    return Kernel(SOURCE, "nf4_dequantize")


def dequantize(tiles: Tensor, scales: Tensor, out: Tensor) -> None:
    """The weight (out, in) in bf16, as bitsandbytes dequantizes it: code times scale in fp32, rounded once."""
    units = tiles.shape[0] * tiles.shape[1]
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (tiles, scales, out)]
    dequantize_kernel()(-(-units // 8), 256, *pointers, ctypes.c_int(out.shape[1]), ctypes.c_longlong(units))


@cache
def squares_kernel() -> Kernel:
    from lorarep_runtime.kernels.hopper.nvrtc import Kernel

    return Kernel(SOURCE, "nf4_squares")


def squares(tiles: Tensor, scales: Tensor, out: Tensor) -> None:
    """The sum of squares of each row of the weight: fp32 (out)."""
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (tiles, scales, out)]
    squares_kernel()(len(tiles), 256, *pointers, ctypes.c_int(tiles.shape[1]))
