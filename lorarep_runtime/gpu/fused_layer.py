"""Decoder layers of the Llama kind as a handful of kernels for rows of one new token each.

What `transformers` computes in such a layer (RMSNorm, rotary attention with grouped heads, gated MLP), with each row's
own adapter at its own position. On Hopper products carry the adapters in their epilogue; elsewhere they are a
library's and a kernel for the adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorarep_runtime.kernels.attention_config import Attention
from lorarep_runtime.kernels.decode.activation import gate_rows, gate_shrink
from lorarep_runtime.kernels.decode.attention import Cache, attend, attend_whole
from lorarep_runtime.kernels.decode.combine import Partials, combine_shrink
from lorarep_runtime.kernels.decode.expand import expand
from lorarep_runtime.kernels.decode.norm import norm_shrink
from lorarep_runtime.kernels.entry_table import DecodeRows
from lorarep_runtime.kernels.hopper.decode_gemm import PackedWeight
from lorarep_runtime.kernels.prefill.adapt_segments import SegmentTiles, adapt_segments
from lorarep_runtime.kernels.prefill.rotate_store import rotate_store
from lorarep_runtime.model.packed import PACKED_MODULES, PackedPart
from lorarep_runtime.model.weights import Weight

FAMILIES = {"llama", "mistral", "qwen2", "qwen3"}
"""`model_type` of the bases whose layers are of this kind."""
PROGRAMS = 256
"""Programs of a kernel that keep the device busy."""
MOST_KERNEL_ROWS = 64
MOST_GATED_ROWS = 1024
"""Rows of prompts whose gated MLP is computed at a time: it takes most memory, and more would be no faster."""
MOST_PARTS = 16
MOST_ATTENDED_RANKS = 8
"""For which attention makes A x itself; with more each of its programs would take long."""
MOST_SPLITS = 16
LONG_SEQUENCE = 2048
"""Tokens beyond which sequences are split into MORE_SPLITS times as many parts: the reading pays for the merging."""
MORE_SPLITS = 2


class Product(Protocol):
    """y = c ⊙ (W x) + B (A x) + b for the modules of a group, or that added to y; as `kernels.product`."""

    def product(
        self, x: Tensor, y: Tensor, shrunk: Tensor, rows: DecodeRows, first: int, *, bias: Tensor | None, add: bool
    ) -> None: ...

    def matmul(self, x: Tensor, y: Tensor) -> None:
        """y = W x for many rows: x (rows, in), y (rows, outputs of all modules)."""


class LibraryProduct:
    """For weights that have no kernel of their own."""

    def __init__(self, weights: Sequence[Weight]) -> None:
        self._weights = weights
        self._sizes = [weight.shape[0] for weight in weights]

    def product(
        self, x: Tensor, y: Tensor, shrunk: Tensor, rows: DecodeRows, first: int, *, bias: Tensor | None, add: bool
    ) -> None:
        _adapted(self.matmul, x, y, shrunk, self._sizes, rows, first, bias=bias, add=add)

    def matmul(self, x: Tensor, y: Tensor) -> None:
        for weight, to in zip(self._weights, y.split(self._sizes, 1), strict=True):
            to.copy_(weight.matmul(x))


class GroupProduct:
    """For weights that have one, which reads them once for every 32 rows: many rows have another."""

    def __init__(self, group: PackedWeight) -> None:
        self.group = group
        self.matmul = group.matmul

    def product(
        self, x: Tensor, y: Tensor, shrunk: Tensor, rows: DecodeRows, first: int, *, bias: Tensor | None, add: bool
    ) -> None:
        if len(x) <= MOST_KERNEL_ROWS:
            self.group.product(x, y, shrunk, rows, first, bias=bias, add=add)
        else:
            _adapted(self.matmul, x, y, shrunk, self.group.sizes, rows, first, bias=bias, add=add)


def _adapted(
    matmul: Callable[[Tensor, Tensor], None],
    x: Tensor,
    y: Tensor,
    shrunk: Tensor,
    sizes: Sequence[int],
    rows: DecodeRows,
    first: int,
    *,
    bias: Tensor | None,
    add: bool,
) -> None:
    plain = torch.empty_like(y) if add else y
    matmul(x, plain)
    expand(plain, shrunk, sizes, rows, first, bias=bias, residual=y if add else None)


@dataclass(frozen=True)
class Buffers:
    """What the layers of a walk write, for a number of rows; all but h may be overwritten by the next layer."""

    h: Tensor
    """(rows, hidden size), the residual stream."""
    x: Tensor
    qkv: Tensor
    out: Tensor
    gate_up: Tensor
    gated: Tensor
    shrunk: Sequence[Tensor]
    """Of each of GROUPS: fp32 (rows, parts, modules, ranks)."""
    partials: Partials

    def narrowed(self, rows: int, splits: int, shrunk: Sequence[Tensor], parts: Sequence[int]) -> Buffers:
        """The same memory for fewer rows, with other memory for `shrunk`, in so many parts."""

        def shaped(whole: Tensor, *shape: int) -> Tensor:
            return whole.flatten()[: torch.Size(shape).numel()].view(shape)

        return Buffers(
            self.h[:rows],
            self.x[:rows],
            self.qkv[:rows],
            self.out[:rows],
            self.gate_up[:rows],
            self.gated[:rows],
            [shaped(whole, rows, count, *whole.shape[2:]) for whole, count in zip(shrunk, parts, strict=True)],
            Partials(*(shaped(p, rows, p.shape[1], splits, *p.shape[3:]) for p in self.partials)),
        )


def parts_for(rows: int, width: int) -> int:
    """Parts of shrunk, of an x of `width`."""
    return min(MOST_PARTS, -(-width // (256 if rows <= 8 else 1024)))


def splits_for(rows: int, kv_heads: int, tokens: int) -> int:
    """Parts that each sequence is split into, the longest of which has so many tokens."""
    more = MORE_SPLITS if tokens > LONG_SEQUENCE else 1
    return max(1, min(more * MOST_SPLITS, more * PROGRAMS // (rows * kv_heads)))


def attention_shrinks(splits: int, kv_heads: int, ranks: int) -> bool:
    """Whether attention also makes A x of o, one part for each head of keys and values: where no sequence is split."""
    return splits == 1 and kv_heads <= MOST_PARTS and ranks <= MOST_ATTENDED_RANKS


@dataclass(frozen=True)
class FusedLayer:
    """One layer."""

    attention: Attention
    norms: tuple[Tensor, Tensor]
    eps: float
    products: Sequence[Product]
    """Of GROUPS."""
    biases: Sequence[Tensor | None]
    """Of GROUPS, the base's own."""
    firsts: Sequence[int]
    """Of GROUPS, the first module's number."""
    sizes: Sequence[Sequence[int]]
    """Of GROUPS, the outputs of each module."""

    def forward(self, b: Buffers, cos: Tensor, sin: Tensor, cache: Cache, rows: DecodeRows) -> None:
        """h += what the layer adds to it, for the rows that have a position. cos, sin: (rows, head_dim)."""
        pdl = b.h.is_cuda and torch.cuda.get_device_capability(b.h.device) >= (9, 0)
        qkv, o, gate_up, down = zip(self.products, b.shrunk, self.firsts, self.biases, strict=True)

        def product(group: tuple[Product, Tensor, int, Tensor | None], x: Tensor, y: Tensor, *, add: bool) -> None:
            product, shrunk, first, bias = group
            product.product(x, y, shrunk, rows, first, bias=bias, add=add)

        norm_shrink(b.h, self.norms[0], self.eps, b.x, qkv[1], rows, qkv[2], pdl=pdl)
        product(qkv, b.x, b.qkv, add=False)
        if attention_shrinks(b.partials.maxima.shape[2], self.attention.kv_heads, o[1].shape[3]):
            attend_whole(self.attention, b.qkv, cos, sin, cache, b.out, o[1], rows, o[2], pdl=pdl)
        else:
            attend(self.attention, b.qkv, cos, sin, cache, b.partials, rows, pdl=pdl)
            combine_shrink(b.partials, b.out, o[1], rows, o[2], pdl=pdl)
        product(o, b.out, b.h, add=True)
        norm_shrink(b.h, self.norms[1], self.eps, b.x, gate_up[1], rows, gate_up[2], pdl=pdl)
        product(gate_up, b.x, b.gate_up, add=False)
        gate_shrink(b.gate_up, b.gated, down[1], rows, down[2], pdl=pdl)
        product(down, b.gated, b.h, add=True)

    def prefill(
        self,
        h: Tensor,
        cos: Tensor,
        sin: Tensor,
        key_pages: Tensor,
        value_pages: Tensor,
        slots: Tensor,
        attend: Callable[[Tensor], Tensor],
        tiles: SegmentTiles | None,
    ) -> None:
        """h += what the layer adds to it, for many rows of prompts.

        Args:
            h: (rows, hidden size).
            cos, sin, key_pages, value_pages, slots: as for `rotate_store`.
            attend: from rotated queries (rows, heads, head_dim) to what they attend to.
            tiles: the rows that have adapters.
        """

        def linear(group: int, x: Tensor, first: int = 0) -> Tensor:
            y = x.new_empty(len(x), sum(self.sizes[group]))
            self.products[group].matmul(x, y)
            if tiles is not None:
                adapt_segments(x, y, self.sizes[group], tiles, self.firsts[group], first)
            bias = self.biases[group]
            return y if bias is None else y.add_(bias)

        def norm(rows: Tensor, weight: Tensor) -> Tensor:
            return F.rms_norm(rows, weight.shape, weight, self.eps)

        def queries() -> Tensor:
            qkv = linear(0, norm(h, self.norms[0]))
            return rotate_store(self.attention, qkv, cos, sin, key_pages, value_pages, slots)

        def gated(rows: Tensor, first: int) -> Tensor:
            return gate_rows(linear(2, norm(rows, self.norms[1]), first))

        h += linear(1, attend(queries()).flatten(1))
        first = 0
        for rows in h.tensor_split(-(-len(h) // MOST_GATED_ROWS)):
            rows += linear(3, gated(rows, first), first)
            first += len(rows)


def fuse(layer: nn.Module, weights: Mapping[str, Weight], modules: Sequence[str], config: Any) -> FusedLayer:
    """The kernels of a layer of one of FAMILIES.

    Args:
        layer: of `transformers`.
        weights: its shared weights, by module.
        modules: all linear modules, in the order of their numbers.
        config: the text model's.
    """
    attention: Any = layer.self_attn
    kv_heads, dim = config.num_key_value_heads, attention.head_dim
    normed = hasattr(attention, "q_norm")
    window = getattr(attention, "sliding_window", config.sliding_window if config.model_type == "mistral" else None)
    return FusedLayer(
        attention=Attention(
            heads=config.num_attention_heads,
            kv_heads=kv_heads,
            head_dim=dim,
            scale=attention.scaling,
            window=window,
            q_norm=attention.q_norm.weight if normed else None,
            k_norm=attention.k_norm.weight if normed else None,
            eps=config.rms_norm_eps,
        ),
        norms=(layer.input_layernorm.weight, layer.post_attention_layernorm.weight),  # type: ignore[arg-type, union-attr]
        eps=config.rms_norm_eps,
        products=[_product([weights[name] for name in group]) for group in PACKED_MODULES],
        biases=[_bias([layer.get_submodule(name).bias for name in group]) for group in PACKED_MODULES],  # type: ignore[misc]
        firsts=[modules.index(group[0]) for group in PACKED_MODULES],
        sizes=[[weights[name].shape[0] for name in group] for group in PACKED_MODULES],
    )


def _product(weights: Sequence[Weight]) -> Product:
    first = weights[0]
    return GroupProduct(first.group) if isinstance(first, PackedPart) else LibraryProduct(weights)


def _bias(biases: Sequence[Tensor | None]) -> Tensor | None:
    present = [bias for bias in biases if bias is not None]
    return torch.cat(present) if present else None
