"""RMSNorm as kernels and their references share it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def rms_norm_reference(h: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension."""
    normed = h.float() * torch.rsqrt(h.float().square().mean(-1, keepdim=True) + eps)
    return weight * normed.to(h.dtype)


@triton.jit
def scale_by_weight(normed, weight):
    """The end of RMSNorm: `normed` in fp32 times the weight, rounded as in `transformers` to the weight's dtype."""
    return (normed.to(weight.dtype).to(tl.float32) * weight.to(tl.float32)).to(weight.dtype)
