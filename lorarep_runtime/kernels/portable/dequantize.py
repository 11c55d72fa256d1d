"""NF4 weights dequantized by Triton, for products that a library computes."""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorarep_runtime.kernels.launch import DirectLaunch
from lorarep_runtime.kernels.portable.nf4 import CODES, TILE


def dequantize_nf4(words: Tensor, scales: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """The weight (out, in), code times scale in fp32, rounded once, as bitsandbytes dequantizes it.

    Args:
        words, scales: of `nf4.arrange`.
        columns: of the weight, a multiple of 64.
        dtype: of the result.
    """
    tiles, chunks = words.shape[:2]
    out = torch.empty(tiles * TILE, columns, dtype=dtype, device=words.device)
    _launch((tiles, chunks, 1), (dtype, columns), words, scales, _codes(words.device), out, columns, num_warps=4)
    return out


@cache
def _codes(device: torch.device) -> Tensor:
    return torch.tensor(CODES, device=device)


@triton.jit
def _dequantize(words, scales, codes, out, columns):
    tile, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o, k = tl.arange(0, 16), tl.arange(0, 32)
    word = tl.load(words + (tile * tl.num_programs(1) + chunk) * 512 + o[:, None] * 32 + k[None, :]).to(tl.int32)
    scales += (tile * tl.num_programs(1) + chunk) * 32 + o
    out += (tile * 16 + o)[:, None] * columns + chunk * 128 + k[None, :]
    for i in tl.static_range(4):
        number = tl.load(codes + ((word >> 4 * i) & 15)) * tl.load(scales + i // 2 * 16)[:, None]
        inside = (chunk * 128 + 32 * i + k < columns)[None, :]
        tl.store(out + 32 * i, number.to(out.dtype.element_ty), mask=inside)


_launch = DirectLaunch(_dequantize)
