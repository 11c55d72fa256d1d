"""What DoRA's norms need of a weight that many adapters share.

|w + b A|² = |w|² + b · (2 A w + A Aᵀ b) for a row w of W and b of B: no sum of W's shape is made.
"""

from __future__ import annotations

import torch
from torch import Tensor


def halves(a: Tensor) -> Tensor:
    """A (..., n, in) in fp32 as two in bf16 (..., 2 n, in), whose sum it is to 16 bits."""
    high = a.bfloat16()
    return torch.cat([high, (a - high).bfloat16()], dim=-2)


def row_squares(weight: Tensor) -> Tensor:
    """|w|² of the rows of W (out, in): fp32 (out)."""
    return torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32).square_()


def norm_products(weight: Tensor, a: Tensor) -> Tensor:
    """A Wᵀ (n, out) in fp32, from W (out, in), and A (n, in) in fp32."""
    if not weight.is_cuda or weight.dtype != torch.bfloat16:
        return a @ weight.float().T
    # Tensor cores read W as it is, which makes a product as short as reading it.
    return torch.mm(halves(a), weight.T, out_dtype=torch.float32).view(2, len(a), -1).sum(0)
