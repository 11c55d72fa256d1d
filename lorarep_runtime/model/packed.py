"""Weights of modules that read the same x, packed into one for the kernels of `hopper` or `portable`."""

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
from lorarep_runtime.kernels.gemms import gemms_for
from lorarep_runtime.kernels.hopper import int8, nf4
from lorarep_runtime.kernels.hopper.nf4 import CHUNK, TILE
from lorarep_runtime.kernels.hopper.packed_weight import PackedWeight, compile_gemms
from lorarep_runtime.kernels.portable import nf4 as portable_nf4
from lorarep_runtime.model.weights import Int8Weight, NF4Weight, Weight

if TYPE_CHECKING:
    from lorarep_runtime.kernels.portable.packed_weight import PortableWeight

PACKED_MODULES = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
"""Modules that read the same x, in layers of the Llama kind."""
BITS: Mapping[Quantization, int] = {"nf4": 4, "int8": 8, "none": 16}
"""Bits of a packed weight's numbers."""
Cat = Callable[[tuple[Tensor, ...]], Tensor]
"""Copies tensors into one, one after the other, as torch.cat does."""


class PackedPart:
    """A Weight that is one module's part of a packed weight, whose memory it shares."""

    def __init__(self, packed: PackedWeight | PortableWeight, module: int, quantization: Quantization) -> None:
        """
        Args:
            module: index among the packed modules.
        """
        self.packed = packed
        self.quantization = quantization
        self.own: PackedWeight | PortableWeight = packed.module(module)
        """This module's rows of the packed weight."""
        own = self.own
        self.shape = (own.sizes[0], own.columns)
        self.data: tuple[Tensor, ...] = (own.weights,)
        self.constants: tuple[Tensor, ...] = () if own.scales is None else (own.scales,)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        return self.own.dense(dtype)

    def matmul(self, x: Tensor) -> Tensor:
        y = x.new_empty(len(x), self.shape[0])
        self.own.matmul(x, y)
        return y


def pack_layers(
    layers: Sequence[dict[str, Weight]], dtype: torch.dtype, pool: torch.cuda.MemPool | None = None
) -> None:
    """Packs the weights of modules that read the same x, where there is a kernel for them.

    Args:
        layers: the weights of each layer, by module, which are replaced by PackedParts.
        dtype: of the activations.
        pool: the memory that the packed weights take.
    """
    found = [(layer, names) for layer in layers for names in PACKED_MODULES if layer.keys() >= set(names)]
    found = [(layer, names) for layer, names in found if all(_has_kernel(layer[name], dtype) for name in names)]
    # A checkpoint may leave some modules unquantized.
    found = [(layer, names) for layer, names in found if len({layer[name].quantization for name in names}) == 1]
    if not found:
        return
    weights = [layer[name] for layer, names in found for name in names]
    device = weights[0].data[0].device
    portable = gemms_for(device, dtype).kind == "portable"
    sizes = [_sizes(weight, portable=portable) for weight in weights]
    data = Arena([numbers for numbers, *_ in sizes], device, pool)
    scales = Arena([scale for _, *own in sizes for scale in own], device, pool)
    for layer, names in found:
        packed = (pack_portable if portable else pack)([layer[name] for name in names], data.cat, scales.cat)
        for i, name in enumerate(names):
            layer[name] = PackedPart(packed, i, layer[name].quantization)


def pack(weights: Sequence[Weight], cat: Cat = torch.cat, cat_scales: Cat = torch.cat) -> PackedWeight:
    """A packed copy of weights of one kind, one under the other, for the kernels of `kernels.hopper`.

    Args:
        cat, cat_scales: copy the weights' numbers and their scales.
    """
    kind = weights[0].quantization
    parts = [(weight.data[0], *_scales(weight)) for weight in weights]
    if kind == "nf4":
        parts = [nf4.arrange(numbers, scales, w.shape) for (numbers, scales), w in zip(parts, weights, strict=True)]
    elif kind == "int8":
        parts = [(int8.arrange(rows), *scales) for rows, *scales in parts]
    data, *scales = zip(*parts, strict=True)
    sizes = tuple(w.shape[0] for w in weights)
    return PackedWeight(BITS[kind], cat(data), cat_scales(scales[0]) if scales else None, sizes)


def pack_portable(weights: Sequence[Weight], cat: Cat = torch.cat, cat_scales: Cat = torch.cat) -> PortableWeight:
    """As `pack`, for the kernels of `kernels.portable`."""
    from lorarep_runtime.kernels.portable.packed_weight import PortableWeight  # of Triton, which a CPU need not have

    kind, (_, columns) = weights[0].quantization, weights[0].shape
    parts = [(weight.data[0], *_scales(weight)) for weight in weights]
    if kind == "nf4":
        parts = [
            portable_nf4.arrange(numbers, scales, w.shape) for (numbers, scales), w in zip(parts, weights, strict=True)
        ]
    data, *scales = zip(*parts, strict=True)
    sizes = tuple(w.shape[0] for w in weights)
    return PortableWeight(BITS[kind], cat(data), cat_scales(scales[0]) if scales else None, sizes, columns)


def _scales(weight: Weight) -> Sequence[Tensor]:
    """The fp32 scales that kernels read: one tensor, or none. Quantized ones become what they stand for."""
    return [weight.scales()] if isinstance(weight, NF4Weight) else weight.constants[:1]


def _sizes(weight: Weight, *, portable: bool) -> Sequence[Tensor]:
    """Tensors of the sizes that a packed weight's numbers and its scales, if there are any, have."""
    if portable and isinstance(weight, NF4Weight):
        return portable_nf4.sizes(weight.shape)
    return [weight.data[0], *_scales(weight)]


def _has_kernel(weight: Weight, dtype: torch.dtype) -> bool:
    """Whether there is a kernel that can multiply with a weight once it is packed.

    Args:
        dtype: of the activations.
    """
    return obstacle(weight, dtype) is None


def obstacle(weight: Weight, dtype: torch.dtype) -> str | None:
    """Why there is no kernel that multiplies with a weight; None where there is one, or where it is packed.

    Args:
        dtype: of the activations.
    """
    if isinstance(weight, PackedPart):
        return None
    data, (out, into) = weight.data[0], weight.shape
    gemms = gemms_for(data.device, dtype)
    if gemms.kind == "library":
        return gemms.reason
    if out % TILE or into % CHUNK:
        return f"{out} outputs of {into} columns are no multiples of {TILE} and {CHUNK}"
    if isinstance(weight, NF4Weight):
        state = weight.state
        if state.blocksize != CHUNK:
            return f"its NF4 blocks have {state.blocksize} numbers, and not {CHUNK}"
        exact = (dtype,) if gemms.kind == "hopper" else (dtype, torch.float32)
        return None if state.dtype in exact else f"it was quantized from {state.dtype}"
    if isinstance(weight, Int8Weight) or data.dtype == dtype:
        return None
    return f"it is of {data.dtype}"


@contextmanager
def kernels_compiled(kind: Quantization, dtype: torch.dtype | None, device: torch.device) -> Iterator[None]:
    """Has the kernels for a kind of weight compiled while weights are loaded within: neither waits for the other.

    Args:
        dtype: of the activations; None where it is not known yet, then nothing is compiled.
    """
    if dtype is None or gemms_for(device, dtype).kind != "hopper":
        yield
        return
    from lorarep_runtime.kernels.prefill.adapt_segments import compile_tiles  # of Triton, which a CPU need not have

    with ThreadPoolExecutor(2) as pool:
        compiled = pool.submit(compile_gemms, [BITS[kind]]), pool.submit(compile_tiles, dtype)
        yield
    for one in compiled:
        one.result()


def row_squares(weight: Weight, dtype: torch.dtype) -> Tensor:
    """|w|² of each row of a weight, fp32 (out), as `kernels.eager.dora_norm.row_squares` sums them.

    Args:
        dtype: of the activations that the weight is multiplied with.
    """
    return weight.own.row_squares() if isinstance(weight, PackedPart) else dora.row_squares(_exact(weight, dtype))


def norm_products(weights: Sequence[Weight], a: Tensor, dtype: torch.dtype) -> Tensor:
    """A Wᵀ of weights of one shape, each with its own A, as `kernels.eager.dora_norm.norm_products` computes it.

    Args:
        weights: n, some of them the same.
        a: fp32 (n, ranks, in).
        dtype: of the activations that the weights are multiplied with.

    Returns:
        fp32 (n, ranks, out).
    """
    count, ranks, _ = a.shape
    out = weights[0].shape[0]
    own = [weight.own for weight in weights if isinstance(weight, PackedPart) and weight.own.bits == 4]
    if len(own) == count:
        # As few launches as can be: they take most of the time.
        both, products = dora.halves(a), a.new_empty(count, 2 * ranks, out)
        for packed, x, y in zip(own, both, products, strict=True):
            give_way()
            packed.matmul(x, y)
        return products.view(count, 2, ranks, out).sum(1)
    products = a.new_empty(count, ranks, out)
    places: dict[int, list[int]] = defaultdict(list)
    for i, weight in enumerate(weights):
        places[id(weight)].append(i)
    for same in places.values():  # each weight is dequantized once
        give_way()
        weight, rows = weights[same[0]], a[same].flatten(0, 1)
        if isinstance(weight, PackedPart):
            found = weight.own.norm_products(rows)
        else:
            found = dora.norm_products(_exact(weight, dtype), rows)
        products[same] = found.view(len(same), ranks, out)
    return products


def _exact(weight: Weight, dtype: torch.dtype) -> Tensor:
    """The matrix of a weight in bf16 where that holds its values, else in fp32."""
    exact = dtype == torch.bfloat16 and weight.quantization != "int8"
    return weight.dequantize(torch.bfloat16 if exact else torch.float32)
