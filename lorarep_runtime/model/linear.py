"""Shared linear layers: one weight, quantized or not, under whatever adapter each row brings.

A bitsandbytes module's own bytes are here, in another order at most; nothing is converted. Activations are never
quantized: LLM.int8() picks its outlier columns from the whole batch, so that one request's tokens would depend on its
neighbours.

bitsandbytes is imported where something is quantized: that takes seconds, most of them for a compiler that nobody asks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor, nn

from lorarep_runtime.model.weights import Weight

if TYPE_CHECKING:
    pass


Adapt = Callable[[str, Tensor, Tensor, Tensor | None], Tensor]
"""(module, x (rows, in), W x (rows, out), base bias (out) or None) to the adapted output (rows, out)."""


class SharedLinear(nn.Module):
    """y = c ⊙ (W x) + B (A x) + b, with W from the base and the rest from the adapter of each row."""

    def __init__(self, weight: Weight, bias: nn.Parameter | None, name: str, adapt: Adapt) -> None:
        super().__init__()
        self.shared = weight
        self.bias = bias
        self.name = name
        self.adapt = adapt

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        y = self.adapt(self.name, rows, self.shared.matmul(rows), self.bias)
        return y.view(*x.shape[:-1], y.shape[-1])
