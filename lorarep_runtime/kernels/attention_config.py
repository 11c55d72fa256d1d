"""The settings of a decoder layer's attention, as kernels take them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Attention:
    """Heads, scale, window and norms of the attention of one decoder layer."""

    heads: int
    """Query heads."""
    kv_heads: int
    """Heads of keys and values; each serves heads / kv_heads query heads."""
    head_dim: int
    """Numbers of a head."""
    scale: float
    """Factor of q · k."""
    window: int | None = None
    """Tokens that a query sees, itself included; None is all."""
    q_norm: Tensor | None = None
    """(head_dim), weight of an RMSNorm of every query (Qwen 3); None is none."""
    k_norm: Tensor | None = None
    """(head_dim), weight of an RMSNorm of every key (Qwen 3); None is none."""
    eps: float = 1e-6
    """Added to the mean square in the RMSNorms of queries and keys."""
