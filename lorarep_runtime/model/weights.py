"""The weights of linear layers, quantized or not, on any device.

bitsandbytes is imported where something is quantized: that takes seconds, most of them for a compiler that is not used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorarep_runtime.config import Quantization

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState


class Weight(Protocol):
    """The matrix of a linear layer, (out, in), however it is held."""

    quantization: Quantization
    shape: tuple[int, int]
    data: tuple[Tensor, ...]
    """The tensors that hold the values."""
    constants: tuple[Tensor, ...]
    """The tensors that quantization adds to them."""

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The matrix (out, in) in `dtype`; a view of the weight itself where that is possible."""

    def matmul(self, x: Tensor) -> Tensor:
        """x (rows, in) to x Wᵀ (rows, out), in x's dtype."""


FEW_ROWS = range(2, 7)
"""Numbers of rows for which BLAS reads an fp32 weight as the left factor faster than oneDNN reads it."""


def matmul(x: Tensor, weight: Tensor) -> Tensor:
    """x (rows, in) to x Wᵀ (rows, out) for a weight (out, in)."""
    if x.is_cuda or x.dtype != torch.float32 or not torch.backends.mkldnn.is_available():
        return F.linear(x, weight)
    if x.shape[0] in FEW_ROWS:
        return (weight @ x.T).T.contiguous()
    # torch.compile calls this, too; eager torch has BLAS do fp32, up to twice as slowly.
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return y


class DenseWeight:
    """A weight that is not quantized, in the dtype of the activations."""

    quantization: Quantization = "none"

    def __init__(self, weight: Tensor) -> None:
        self.shape = (weight.shape[0], weight.shape[1])
        self.data: tuple[Tensor, ...] = (weight,)
        self.constants: tuple[Tensor, ...] = ()

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        return self.data[0].to(dtype)

    def matmul(self, x: Tensor) -> Tensor:
        return matmul(x, self.data[0])


class NF4Weight:
    """4-bit NormalFloat blocks (QLoRA, Dettmers et al., 2023) in bitsandbytes' layout."""

    quantization: Quantization = "nf4"

    def __init__(self, packed: Tensor, state: QuantState) -> None:
        """
        Args:
            packed: out · in / 2 bytes, of any dtype: a checkpoint's `bnb_4bit_quant_storage` says which.
            state: bitsandbytes' constants.
        """
        self.shape = (state.shape[0], state.shape[1])
        self.data: tuple[Tensor, ...] = (packed.view(torch.uint8).view(-1, 1),)
        self.constants: tuple[Tensor, ...] = (state.absmax, state.code)
        if state.nested:
            self.constants += (state.offset, state.state2.absmax, state.state2.code)
        self.state = state

    def scales(self) -> Tensor:
        """The scale of each block, fp32 (out · in / block size), as bitsandbytes makes them of quantized ones."""
        if not self.state.nested:
            return self.state.absmax
        from bitsandbytes.functional import dequantize_blockwise

        scales: Tensor = dequantize_blockwise(self.state.absmax, self.state.state2) + self.state.offset
        return scales

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(self.data[0], self.state).to(dtype)

    def matmul(self, x: Tensor) -> Tensor:
        if x.is_cuda:
            from bitsandbytes import matmul_4bit

            return matmul_4bit(x, self.data[0], self.state)
        # bitsandbytes' own CPU matmul may repack the weight in place, after which nothing else can read it.
        return matmul(x, self.dequantize(x.dtype))


class Int8Weight:
    """8-bit rows, each with its absolute maximum (LLM.int8(), Dettmers et al., 2022), in bitsandbytes' layout."""

    quantization: Quantization = "int8"

    def __init__(self, rows: Tensor, absmax: Tensor) -> None:
        self.shape = (rows.shape[0], rows.shape[1])
        self.data: tuple[Tensor, ...] = (rows,)
        self.constants: tuple[Tensor, ...] = (absmax,)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        # Scaled in fp32 and rounded once.
        scale = self.constants[0].float().mul(1 / 127).unsqueeze(1)
        return (self.data[0] * scale).to(dtype)

    def matmul(self, x: Tensor) -> Tensor:
        return matmul(x, self.dequantize(x.dtype))


def shared_weight(module: nn.Module) -> Weight:
    """The weight of a loaded linear module, without copying it.

    Raises:
        TypeError: for a linear module of another kind.
    """
    if type(module) is nn.Linear:
        return DenseWeight(module.weight.data)
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    if isinstance(module, Linear4bit):
        return NF4Weight(module.weight.data, module.weight.quant_state)
    if isinstance(module, Linear8bitLt):
        return Int8Weight(module.weight.data, module.weight.SCB)
    raise TypeError(f"{type(module).__name__} is not a linear layer that can be shared")
