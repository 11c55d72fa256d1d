"""int8 weights as the kernels read them.

bitsandbytes holds an int8 weight (out, in) row by row, with an fp32 scale for each row (LLM.int8(), Dettmers et al.,
2022). The kernels read the same bytes in tiles, as NF4's: not one bit of a value changes, and the weight is held once.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lorarep_runtime.kernels.hopper.nf4 import CHUNK, TILE

if TYPE_CHECKING:
    from lorarep_runtime.kernels.hopper.nvrtc import Kernel

SOURCE = Path(__file__).with_suffix(".cu")


def arrange(rows: Tensor) -> Tensor:
    """An int8 weight from bitsandbytes' order to tiles.

    Args:
        rows: int8 (out, in), multiples of 16 and 64.

    Returns:
        int8 (tiles, chunks, 2, 32 lanes, 16): lane 4g + t of a warp gives tensor cores the columns 2t,
        2t + 1, 2t + 8 and 2t + 9 of each 16 of a chunk, for the rows g and g + 8 of a tile.
    """
    tiles, chunks = rows.shape[0] // TILE, rows.shape[1] // CHUNK
    numbers = rows.view(tiles, 2, 8, chunks, 4, 2, 4, 2).permute(0, 3, 1, 2, 6, 4, 5, 7)
    return numbers.reshape(tiles, chunks, 2, 32, 16).contiguous()


def rows_of(tiles: Tensor) -> Tensor:
    """An int8 weight from tiles back to bitsandbytes' order, int8 (out, in)."""
    count, chunks = tiles.shape[:2]
    numbers = tiles.view(count, chunks, 2, 8, 4, 4, 2, 2).permute(0, 2, 3, 1, 5, 6, 4, 7)
    return numbers.reshape(count * TILE, chunks * CHUNK)


@cache
def dequantize_kernel() -> Kernel:
    from lorarep_runtime.kernels.hopper.nvrtc import Kernel

    return Kernel(SOURCE, "int8_dequantize")


def dequantize(tiles: Tensor, scales: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The weight (out, in), scaled in fp32 and rounded once. Without scales, its numbers, which bf16 holds exactly.

    Args:
        scales: fp32 (out), the value of 127 in each row.
    """
    if not tiles.is_cuda or dtype != torch.bfloat16:
        rows = rows_of(tiles)
        return rows.to(dtype) if scales is None else (rows * (scales * (1 / 127)).unsqueeze(1)).to(dtype)
    count, chunks = tiles.shape[:2]
    out = torch.empty(count * TILE, chunks * CHUNK, dtype=dtype, device=tiles.device)
    pointers = [ctypes.c_void_p(0 if t is None else t.data_ptr()) for t in (tiles, scales, out)]
    numbers = ctypes.c_int(chunks * CHUNK), ctypes.c_longlong(count * chunks)
    dequantize_kernel()(-(-count * chunks // 8), 256, *pointers, *numbers)
    return out
