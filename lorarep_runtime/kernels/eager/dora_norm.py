"""Terms of DoRA's norms (Liu et al., 2024) that need a base's weight W, which many adapters share.

A row w of W and the row b of B give |w + b A|² = |w|² + b · (2 A w + A Aᵀ b). So W + B A is never in memory.
"""

from __future__ import annotations

import torch
from torch import Tensor


def halves(a: Tensor) -> Tensor:
    """Splits A, fp32 (..., n, in), into two bf16 matrices (..., 2 n, in). Their sum has 16 significant bits of A."""
    high = a.bfloat16()
    return torch.cat([high, (a - high).bfloat16()], dim=-2)


def row_squares(weight: Tensor) -> Tensor:
    """The squared norms |w|² of the rows of W (out, in): fp32 (out)."""
    return torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32).square_()


def norm_products(weight: Tensor, a: Tensor) -> Tensor:
    """The products A Wᵀ of DoRA's norms, fp32 (n, out), from A, fp32 (n, in), and W (out, in)."""
    if not weight.is_cuda or weight.dtype != torch.bfloat16:
        return a @ weight.float().T
    # Tensor cores read W in bf16, without an fp32 copy. The product then takes as long as one read of W.
    return torch.mm(halves(a), weight.T, out_dtype=torch.float32).view(2, len(a), -1).sum(0)
