"""Rotary embeddings (RoPE, Su et al., 2021) of the heads of one token, which some models normalize before."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorarep_runtime.kernels.rms_norm import rms_norm_reference, scale_by_weight


def rotated_reference(x: Tensor, norm: Tensor | None, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """Rotates the heads of one token, with the roundings of `apply_rotary_pos_emb` of `transformers`.

    Args:
        x: (heads, head_dim).
        norm: (head_dim), weight of an RMSNorm of each head; None is none.
        cos, sin: (head_dim), of the token's place.
        eps: added to the mean square in the norm.

    Returns:
        (heads, head_dim), in the dtype of x.
    """
    if norm is not None:
        x = rms_norm_reference(x, norm, eps)
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


@triton.jit
def rotated(x, norm, cos, sin, eps, heads, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """Loads the heads of one token, applies the RMSNorm and rotates them, with the roundings of `rotated_reference`.

    Args:
        x: (heads) addresses of each head's DIM numbers.
        norm, cos, sin: addresses of DIM numbers; a norm of None is none.
        eps: added to the mean square in the norm.
        heads: (heads) bool, the heads to load.
        DIM: dimension of a head.
        BLOCK_DIM: least power of two that is not below DIM.

    Returns:
        (heads, BLOCK_DIM), in the dtype of cos; 0 in heads outside the mask and from DIM on.
    """
    dtype = cos.dtype.element_ty
    d = tl.arange(0, BLOCK_DIM)
    inside = d < DIM
    other = tl.where(d < DIM // 2, d + DIM // 2, d - DIM // 2)
    both = heads[:, None] & inside[None, :]
    straight = tl.load(x[:, None] + d[None, :], mask=both, other=0)
    crossed = tl.load(x[:, None] + other[None, :], mask=both, other=0)
    if norm is not None:
        wide = straight.to(tl.float32)
        factor = tl.rsqrt(tl.sum(wide * wide, 1) / DIM + eps)[:, None]
        straight = scale_by_weight(wide * factor, tl.load(norm + d, mask=inside, other=0)[None, :])
        weight = tl.load(norm + other, mask=inside, other=0)[None, :]
        crossed = scale_by_weight(crossed.to(tl.float32) * factor, weight)
    c = tl.load(cos + d, mask=inside, other=0).to(tl.float32)
    s = tl.load(sin + d, mask=inside, other=0).to(tl.float32)
    s = tl.where(d < DIM // 2, -s, s)
    by_cos = (straight.to(tl.float32) * c[None, :]).to(dtype)
    by_sin = (crossed.to(tl.float32) * s[None, :]).to(dtype)
    return (by_cos.to(tl.float32) + by_sin.to(tl.float32)).to(dtype)
