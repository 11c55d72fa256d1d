"""Weights of modules that read the same x, packed into one for the kernels of `kernels.hopper`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lorarep_runtime.config import Quantization
from lorarep_runtime.device.arena import Arena
from lorarep_runtime.device.gil import give_way
from lorarep_runtime.kernels.eager import dora_norm as dora
from lorarep_runtime.kernels.hopper import int8, nf4
from lorarep_runtime.kernels.hopper.decode_gemm import PackedWeight, compile_products
from lorarep_runtime.kernels.hopper.launch_config import HOPPER
from lorarep_runtime.kernels.hopper.nf4 import CHUNK, TILE
from lorarep_runtime.model.weights import Int8Weight, NF4Weight, Weight

if TYPE_CHECKING:
    pass


PACKED_MODULES = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
"""Modules that read the same x, in layers of the Llama kind."""


class PackedPart:
    """The same values as part of a group, as `kernels.product` multiplies them: those of one of its modules."""

    def __init__(self, group: PackedWeight, module: int, quantization: Quantization) -> None:
        self.group = group
        self.quantization = quantization
        self.own = own = group.rows(module)
        self.shape = (own.sizes[0], own.columns)
        self.data: tuple[Tensor, ...] = (own.weights,)
        self.constants: tuple[Tensor, ...] = () if own.scales is None else (own.scales,)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        return self.own.dense(dtype)

    def matmul(self, x: Tensor) -> Tensor:
        y = x.new_empty(len(x), self.shape[0])
        self.own.matmul(x, y)
        return y


def row_squares(weight: Weight, dtype: torch.dtype) -> Tensor:
    """As `dora.row_squares`. dtype: of what is multiplied with the weight."""
    return weight.own.row_squares() if isinstance(weight, PackedPart) else dora.row_squares(_exact(weight, dtype))


def norm_products(weights: Sequence[Weight], a: Tensor, dtype: torch.dtype) -> Tensor:
    """As `dora.norm_products`, of weights of one shape, each with its own A.

    Args:
        weights: n, some of them the same.
        a: fp32 (n, ranks, in).
        dtype: of what is multiplied with them.

    Returns:
        fp32 (n, ranks, out).
    """
    count, ranks, _ = a.shape
    out = weights[0].shape[0]
    own = [weight.own for weight in weights if isinstance(weight, PackedPart) and weight.own.bits == 4]
    if own:
        # As few launches as can be: they are what takes time.
        both, products = dora.halves(a), a.new_empty(count, 2 * ranks, out)
        for group, x, y in zip(own, both, products, strict=True):
            give_way()
            group.matmul(x, y)
        return products.view(count, 2, ranks, out).sum(1)
    products = a.new_empty(count, ranks, out)
    places: dict[int, list[int]] = defaultdict(list)
    for i, weight in enumerate(weights):
        places[id(weight)].append(i)
    for shared in places.values():  # what is dequantized, once
        give_way()
        weight, rows = weights[shared[0]], a[shared].flatten(0, 1)
        if isinstance(weight, PackedPart):
            found = weight.own.norm_products(rows)
        else:
            found = dora.norm_products(_exact(weight, dtype), rows)
        products[shared] = found.view(len(shared), ranks, out)
    return products


def _exact(weight: Weight, dtype: torch.dtype) -> Tensor:
    """The matrix in bf16 where that holds its values, else in fp32."""
    exact = dtype == torch.bfloat16 and weight.quantization != "int8"
    return weight.dequantize(torch.bfloat16 if exact else torch.float32)


def pack_layers(
    layers: Sequence[dict[str, Weight]], dtype: torch.dtype, pool: torch.cuda.MemPool | None = None
) -> None:
    """Puts the weights of modules that read the same x one under the other in a group, where there is a kernel for it.

    Args:
        layers: the weights of each layer, by module, which are replaced.
        dtype: of the activations.
        pool: where the groups are to lie.
    """
    if dtype != torch.bfloat16:
        return
    groups = [(layer, names) for layer in layers for names in PACKED_MODULES if layer.keys() >= set(names)]
    groups = [(layer, names) for layer, names in groups if all(_has_kernel(layer[name]) for name in names)]
    if not groups:
        return
    weights = [layer[name] for layer, names in groups for name in names]
    device = weights[0].data[0].device
    data = Arena([weight.data[0] for weight in weights], device, pool)
    scales = Arena([scale for weight in weights for scale in weight.constants[:1]], device, pool)
    for layer, names in groups:
        group = pack([layer[name] for name in names], data.cat, scales.cat)
        for i, name in enumerate(names):
            layer[name] = PackedPart(group, i, layer[name].quantization)


Cat = Callable[[tuple[Tensor, ...]], Tensor]


def pack(weights: Sequence[Weight], cat: Cat = torch.cat, cat_scales: Cat = torch.cat) -> PackedWeight:
    """A copy of weights of one kind, one under the other, by what copies their numbers and their scales."""
    kind = weights[0].quantization
    parts = [(weight.data[0], *weight.constants[:1]) for weight in weights]
    if kind == "nf4":
        parts = [nf4.arrange(packed, scales, w.shape) for (packed, scales), w in zip(parts, weights, strict=True)]
    elif kind == "int8":
        parts = [(int8.arrange(rows), *scales) for rows, *scales in parts]
    data, *scales = zip(*parts, strict=True)
    sizes = tuple(w.shape[0] for w in weights)
    return PackedWeight(BITS[kind], cat(data), cat_scales(scales[0]) if scales else None, sizes)


BITS: Mapping[Quantization, int] = {"nf4": 4, "int8": 8, "none": 16}


@contextmanager
def kernels_compiled(kind: Quantization, dtype: torch.dtype | None, device: torch.device) -> Iterator[None]:
    """Has the kernels for a kind of weight compiled while it is loaded: neither waits for the other.

    Args:
        dtype: of the activations, if it is known.
    """
    if dtype != torch.bfloat16 or not _is_hopper(device):
        yield
        return
    from lorarep_runtime.kernels.prefill.adapt_segments import compile_tiles  # of Triton, which a CPU need not have

    with ThreadPoolExecutor(2) as pool:
        compiled = pool.submit(compile_products, [BITS[kind]]), pool.submit(compile_tiles, dtype)
        yield
    for one in compiled:
        one.result()


def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == HOPPER


def _has_kernel(weight: Weight) -> bool:
    """Whether `kernels.product` knows the weight's kind."""
    data, (out, into) = weight.data[0], weight.shape
    if not _is_hopper(data.device) or out % TILE or into % CHUNK:
        return False
    if isinstance(weight, NF4Weight):
        state = weight.state
        return state.dtype == torch.bfloat16 and not state.nested and state.blocksize == CHUNK
    return isinstance(weight, Int8Weight) or data.dtype == torch.bfloat16
