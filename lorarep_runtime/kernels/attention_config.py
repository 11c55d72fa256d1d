"""The numbers of a layer's attention."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Attention:
    """What a layer's attention is."""

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    """Multiplies q · k."""
    window: int | None = None
    """Tokens that a query sees, itself included; None is all."""
    q_norm: Tensor | None = None
    """(head_dim), weight of an RMSNorm of every query (Qwen 3); None is none."""
    k_norm: Tensor | None = None
    """Likewise of every key."""
    eps: float = 1e-6
    """Of these norms."""
