"""Shared linear layers: one weight, quantized or not, under whatever adapter each row brings.

A bitsandbytes module keeps its own bytes here; nothing is converted. Activations are never quantized: LLM.int8() picks
its outlier columns from the whole batch, so that one request's tokens would depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import bitsandbytes as bnb
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorarep_runtime.config import Quantization
from lorarep_runtime.kernels import nf4

GROUPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
"""Modules that read the same x, in layers of the Llama kind."""


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
"""Where BLAS reads an fp32 weight from its other side faster than oneDNN reads it."""


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x (rows, in) to x Wᵀ (rows, out) for a weight (out, in)."""
    if x.is_cuda or x.dtype != torch.float32 or not torch.backends.mkldnn.is_available():
        return F.linear(x, weight)
    if x.shape[0] in FEW_ROWS:
        return (weight @ x.T).T.contiguous()
    # What torch.compile calls; eager torch has BLAS do fp32, up to twice as slowly.
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return y


class DenseWeight:
    """A weight in the dtype of the activations."""

    quantization: Quantization = "none"

    def __init__(self, weight: Tensor) -> None:
        self.shape = (weight.shape[0], weight.shape[1])
        self.data: tuple[Tensor, ...] = (weight,)
        self.constants: tuple[Tensor, ...] = ()

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        return self.data[0].to(dtype)

    def matmul(self, x: Tensor) -> Tensor:
        return product(x, self.data[0])


class NF4Weight:
    """4-bit NormalFloat blocks (QLoRA, Dettmers et al., 2023) in bitsandbytes' layout."""

    quantization: Quantization = "nf4"

    def __init__(self, packed: Tensor, state: bnb.functional.QuantState) -> None:
        self.shape = (state.shape[0], state.shape[1])
        self.data: tuple[Tensor, ...] = (packed,)
        self.constants: tuple[Tensor, ...] = (state.absmax, state.code)
        if state.nested:
            self.constants += (state.offset, state.state2.absmax, state.state2.code)
        self.state = state

    @property
    def can_be_tiled(self) -> bool:
        """Whether `kernels.nf4` knows the weight's kind."""
        state, (out, into) = self.state, self.shape
        return (
            self.data[0].is_cuda
            and torch.cuda.get_device_capability(self.data[0].device) >= (9, 0)
            and state.dtype == torch.bfloat16
            and not state.nested
            and state.blocksize == nf4.CHUNK
            and out % nf4.TILE == 0
            and into % nf4.CHUNK == 0
        )

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        return bnb.functional.dequantize_4bit(self.data[0], self.state).to(dtype)

    def matmul(self, x: Tensor) -> Tensor:
        if x.is_cuda:
            return bnb.matmul_4bit(x, self.data[0], self.state)
        # bitsandbytes' own CPU product may repack the weight in place, after which nothing else can read it.
        return product(x, self.dequantize(x.dtype))


class NF4TilesWeight:
    """The same values in tiles, as `kernels.nf4` multiplies them: some of the rows of a group of modules."""

    quantization: Quantization = "nf4"

    def __init__(self, group: nf4.TiledGroup, module: int) -> None:
        tiles = [size // nf4.TILE for size in group.sizes]
        at = slice(sum(tiles[:module]), sum(tiles[: module + 1]))
        self.group = group
        self.shape = (group.sizes[module], group.tiles.shape[1] * nf4.CHUNK)
        self.data: tuple[Tensor, ...] = (group.tiles[at],)
        self.constants: tuple[Tensor, ...] = (group.scales[at],)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        dense = torch.empty(self.shape, dtype=torch.bfloat16, device=self.data[0].device)
        nf4.dequantize(self.data[0], self.constants[0], dense)
        return dense.to(dtype)

    def matmul(self, x: Tensor) -> Tensor:
        return product(x, self.dequantize(x.dtype))


def tiled(weights: Sequence[Weight], dtype: torch.dtype) -> Sequence[Weight]:
    """The weights of modules that read the same x, rearranged into one group of tiles if there is a kernel for it.

    Args:
        dtype: of the activations.
    """
    found = [weight for weight in weights if isinstance(weight, NF4Weight) and weight.can_be_tiled]
    if dtype != torch.bfloat16 or len(found) < len(weights):
        return weights
    parts = [nf4.arrange(weight.data[0], weight.constants[0], weight.shape) for weight in found]
    group = nf4.TiledGroup(
        torch.cat([tiles for tiles, _ in parts]),
        torch.cat([scales for _, scales in parts]),
        tuple(weight.shape[0] for weight in found),
    )
    return [NF4TilesWeight(group, i) for i in range(len(found))]


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
        return product(x, self.dequantize(x.dtype))


def shared_weight(module: nn.Module) -> Weight:
    """The weight of a loaded linear module, without copying it.

    Raises:
        TypeError: for a linear module of another kind.
    """
    if isinstance(module, bnb.nn.Linear4bit):
        return NF4Weight(module.weight.data, module.weight.quant_state)
    if isinstance(module, bnb.nn.Linear8bitLt):
        return Int8Weight(module.weight.data, module.weight.SCB)
    if type(module) is nn.Linear:
        return DenseWeight(module.weight.data)
    raise TypeError(f"{type(module).__name__} is not a linear layer that can be shared")


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
