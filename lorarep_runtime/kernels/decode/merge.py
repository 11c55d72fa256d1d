"""The merge of attention over some tokens with attention over others (Flash-Decoding, Dao et al., 2023)."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def merge(maximum, total, value, own_maximum, own_total, own_value):
    """Attention to some tokens and to others, to both: maxima and totals (n), values (n) or (n, BLOCK_DIM).

    Nothing merged with something is exactly that. The products and sums are fixed, so that each kernel rounds alike.
    """
    larger = tl.maximum(maximum, own_maximum)
    fade = tl.where(maximum == float("-inf"), 0.0, tl.exp(maximum - larger))
    own_fade = tl.where(own_maximum == float("-inf"), 0.0, tl.exp(own_maximum - larger))
    total = tl.fma(total, fade, own_total * own_fade)
    if len(value.shape) == 2:
        value = tl.fma(value, tl.broadcast_to(fade[:, None], value.shape), own_value * own_fade[:, None])
    else:
        value = tl.fma(value, fade, own_value * own_fade)
    return larger, total, value
