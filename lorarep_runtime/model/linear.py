"""Shared linear layers: one weight, quantized or not, and each row's own adapter.

Weights keep the bytes of their bitsandbytes modules, in another order at most; nothing is converted. Activations are
never quantized: LLM.int8() picks its outlier columns from the whole batch, so that one request's tokens would depend on
its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorarep_runtime.model.weights import Weight

Adapt = Callable[[str, Tensor, Tensor, Tensor | None], Tensor]
"""(module, x (rows, in), W x (rows, out), base bias (out) or None) to the adapted output (rows, out)."""

AddUp = Callable[[Tensor], None]
"""Replaces a tensor, of which each rank has a term, by the sum over the ranks."""


BLOCK_ROWS = 16
"""Rows that are multiplied at a time where results must not depend on how many there are."""


class SharedLinear(nn.Module):
    """y = c ⊙ (W x) + B (A x) + b, with W from the base and the rest from the adapter of each row."""

    def __init__(
        self, weight: Weight, bias: nn.Parameter | None, name: str, adapt: Adapt, add_up: AddUp | None = None
    ) -> None:
        """
        Args:
            weight: W, which all positions share.
            bias: (out), the base's own.
            name: path of the module in its layer.
            adapt: from W x to y.
            add_up: adds the other ranks' terms of y, where they hold some.
        """
        super().__init__()
        self.shared = weight
        self.multiply: Callable[[Tensor], Tensor] = weight.matmul
        """x (rows, in) to W x (rows, out)."""
        self.bias = bias
        self.name = name
        self.adapt = adapt
        self.add_up = add_up

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) to y (..., out)."""
        rows = x.reshape(-1, x.shape[-1])
        y = self.adapt(self.name, rows, self.multiply(rows), self.bias)
        if self.add_up is not None:
            self.add_up(y)
        return y.view(*x.shape[:-1], y.shape[-1])


def multiply_in_blocks(module: nn.Module) -> None:
    """Has a linear module multiply always as many rows at a time.

    Libraries sum in another order for another number of rows. So a row's result is bitwise the same for any.
    """
    if isinstance(module, SharedLinear):
        module.multiply = partial(_in_blocks, module.multiply)
    else:
        module.forward = partial(_in_blocks, module.forward)


def compute_row_by_row(module: nn.Module) -> None:
    """Has a module of one tensor (..., rows, n) to another compute one row at a time."""
    module.forward = partial(_row_by_row, module.forward)


def _row_by_row(forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.cat([forward(row) for row in x.flatten(0, -2).split(1)]).view(x.shape)


def _in_blocks(multiply: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    rows = x.flatten(0, -2)
    filled = F.pad(rows, (0, 0, 0, -len(rows) % BLOCK_ROWS))
    y = torch.cat([multiply(block) for block in filled.split(BLOCK_ROWS)])[: len(rows)]
    return y.view(*x.shape[:-1], y.shape[-1])


def straighten(layer: nn.Module) -> None:
    """Replaces linear modules of a layer that are a family's own with plain ones.

    GPT-2's Conv1D has its weight transposed. FalconLinear computes W x + b, and rounds before it adds b.
    """
    from transformers.pytorch_utils import Conv1D

    for name, module in list(layer.named_modules()):
        is_transposed = isinstance(module, Conv1D)
        if is_transposed or type(module).__name__ == "FalconLinear":
            weight = module.weight.data.T.contiguous() if is_transposed else module.weight.data
            plain = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
            plain.weight = nn.Parameter(weight, requires_grad=False)
            plain.bias = module.bias
            layer.set_submodule(name, plain)


def linear_modules(layer: nn.Module) -> dict[str, nn.Linear]:
    """The modules of a layer that compute W x + b, by their paths there. A family's own classes may compute more."""
    known = {"torch", "bitsandbytes"}
    return {
        name: module
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear) and type(module).__module__.partition(".")[0] in known
    }


def linear_shapes(layer: nn.Module) -> dict[str, tuple[int, int]]:
    """(out, in) of each linear module of a layer, by its path there."""
    return {name: (module.out_features, module.in_features) for name, module in linear_modules(layer).items()}
