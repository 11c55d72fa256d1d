"""RMSNorm (Zhang and Sennrich, 2019) for kernels and their torch references."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def rms_norm_reference(h: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of h (..., n) over its last dimension, with weight (n) and the roundings of `transformers`."""
    normed = h.float() * torch.rsqrt(h.float().square().mean(-1, keepdim=True) + eps)
    return weight * normed.to(h.dtype)


@triton.jit
def scale_by_weight(normed, weight):
    """The last product of an RMSNorm: normed numbers, fp32, times the weight, in the weight's dtype.

    Both factors are rounded to the weight's dtype first, as in `transformers`.
    """
    return (normed.to(weight.dtype).to(tl.float32) * weight.to(tl.float32)).to(weight.dtype)
