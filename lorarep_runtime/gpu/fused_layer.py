"""Decoder layers of the Llama kind as a handful of kernels.

A fused layer computes the same as a layer of `transformers` (RMSNorm, rotary attention with grouped heads, gated MLP),
with each row's own adapter at its own position: for rows of one new token each, or for many rows of prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorarep_runtime.gpu.adapted_linear import AdaptedLinear, adapted_linear
from lorarep_runtime.gpu.buffers import LayerBuffers
from lorarep_runtime.gpu.rank_sums import RankSums
from lorarep_runtime.integers import ceil_div
from lorarep_runtime.kernels.attention_config import Attention
from lorarep_runtime.kernels.decode.activation import gate_rows, gate_shrink
from lorarep_runtime.kernels.decode.attention import Cache, attend, attend_whole
from lorarep_runtime.kernels.decode.combine import combine_shrink
from lorarep_runtime.kernels.decode.norm import norm_shrink
from lorarep_runtime.kernels.decode.store import store
from lorarep_runtime.kernels.entry_table import DecodeRows
from lorarep_runtime.kernels.prefill.adapt_segments import SegmentTiles, adapt_segments
from lorarep_runtime.kernels.prefill.rotate_store import rotate_store
from lorarep_runtime.model.packed import PACKED_MODULES
from lorarep_runtime.model.weights import Weight

if TYPE_CHECKING:
    from lorarep_runtime.model.base import Base

FAMILIES = {"llama", "mistral", "qwen2", "qwen3"}
"""`model_type` of the bases whose layers are of this kind."""
MOST_GATED_ROWS = 1024
"""Rows of prompts whose gated MLP is computed at a time: it takes most memory, and more would be no faster."""


@dataclass(frozen=True)
class Projection:
    """The packed linear modules of a layer that read the same x, such as q, k and v."""

    linear: AdaptedLinear
    bias: Tensor | None
    """(outputs of all modules), the base's own; None is 0."""
    first: int
    """Number of the first module in entry tables."""
    sizes: Sequence[int]
    """Outputs of each module."""

    def decode(self, x: Tensor, y: Tensor, shrunk: Tensor, rows: DecodeRows, *, add: bool = False) -> None:
        """The modules' adapted outputs for rows of one new token each; arguments as for `AdaptedLinear.decode`."""
        self.linear.decode(x, y, shrunk, rows, self.first, bias=self.bias, add=add)

    def prefill(self, x: Tensor, tiles: SegmentTiles | None, first_row: int = 0) -> Tensor:
        """The modules' adapted outputs (rows, outputs of all modules) for many rows of prompts.

        Args:
            x: (rows, in).
            tiles: the rows that have adapters.
            first_row: number, in the tiles, of x's first row.
        """
        y = x.new_empty(len(x), sum(self.sizes))
        self.linear.matmul(x, y)
        if tiles is not None:
            adapt_segments(x, y, self.sizes, tiles, self.first, first_row)
        return y if self.bias is None else y.add_(self.bias)


@dataclass(frozen=True)
class FusedLayer:
    """One layer of a base: its weights and norms, and the order of its kernels."""

    attention: Attention
    norms: tuple[Tensor, Tensor]
    """(hidden size) each, the weights before attention and before the MLP."""
    eps: float
    """Added to the mean square in both norms."""
    projections: Sequence[Projection]
    """One for each of PACKED_MODULES: queries, keys and values; o; gate and up; down."""
    sums: RankSums | None = None
    """How the outputs of o and down become whole, where several ranks share the layer."""

    def forward(self, b: LayerBuffers, cos: Tensor, sin: Tensor, cache: Cache, rows: DecodeRows) -> None:
        """h += f(h) for the rows that have a position, where f is the layer. Each row is one new token.

        Args:
            cos, sin: (rows, head_dim), of each row's new token.
        """
        # Programmatic dependent launch: a kernel starts while the one before it ends.
        pdl = b.h.is_cuda and torch.cuda.get_device_capability(b.h.device) >= (9, 0)
        after_sums = pdl and self.sums is None
        qkv, o, gate_up, down = self.projections
        qkv_shrunk, o_shrunk, gate_up_shrunk, down_shrunk = b.shrunk

        norm_shrink(b.h, self.norms[0], self.eps, b.x, qkv_shrunk, rows, qkv.first, pdl=after_sums)
        qkv.decode(b.x, b.qkv, qkv_shrunk, rows)
        given = self.attention, b.qkv, cos, sin, cache
        if b.shares_sequences:
            store(*given, rows, pdl=pdl)
        if b.attention_shrinks:
            attend_whole(*given, b.out, o_shrunk, rows, o.first, stored=b.shares_sequences, pdl=pdl)
        else:
            attend(*given, b.partials, rows, stored=b.shares_sequences, chunked=b.deterministic, pdl=pdl)
            combine_shrink(b.partials, b.out, o_shrunk, rows, o.first, pdl=pdl)
        self._add(o, b.out, b.h, o_shrunk, rows)
        norm_shrink(b.h, self.norms[1], self.eps, b.x, gate_up_shrunk, rows, gate_up.first, pdl=after_sums)
        gate_up.decode(b.x, b.gate_up, gate_up_shrunk, rows)
        gate_shrink(b.gate_up, b.gated, down_shrunk, rows, down.first, pdl=pdl)
        self._add(down, b.gated, b.h, down_shrunk, rows)

    def _add(self, projection: Projection, x: Tensor, h: Tensor, shrunk: Tensor, rows: DecodeRows) -> None:
        """h += the projection's outputs, of all ranks."""
        if self.sums is None:
            projection.decode(x, h, shrunk, rows, add=True)
            return
        term = self.sums.begin(h)
        projection.decode(x, term, shrunk, rows, add=True)
        self.sums.end(term, h)

    def prefill(
        self,
        h: Tensor,
        cos: Tensor,
        sin: Tensor,
        key_pages: Tensor,
        value_pages: Tensor,
        slots: Tensor,
        attend: Callable[[Tensor, Tensor, Tensor], Tensor],
        tiles: SegmentTiles | None,
    ) -> None:
        """h += f(h) for many rows of prompts, where f is the layer.

        Args:
            h: (rows, hidden size).
            cos, sin, key_pages, value_pages, slots: as for `rotate_store`.
            attend: from rotated queries (rows, heads, head_dim), and the rows' keys and values (rows, kv_heads,
                head_dim), to the attention's output of the queries' shape.
            tiles: the rows that have adapters.
        """
        # Functions, so that the tensors of one are freed before the next takes memory.
        qkv, o, gate_up, down = self.projections

        def norm(rows: Tensor, weight: Tensor) -> Tensor:
            return F.rms_norm(rows, weight.shape, weight, self.eps)

        def attended() -> Tensor:
            outputs = qkv.prefill(norm(h, self.norms[0]), tiles)
            return attend(*rotate_store(self.attention, outputs, cos, sin, key_pages, value_pages, slots))

        def gated(rows: Tensor, first_row: int) -> Tensor:
            return gate_rows(gate_up.prefill(norm(rows, self.norms[1]), tiles, first_row))

        def whole(outputs: Tensor) -> Tensor:
            return outputs if self.sums is None else self.sums.of_prompts(outputs)

        h += whole(o.prefill(attended().flatten(1), tiles))
        first_row = 0
        for rows in h.tensor_split(ceil_div(len(h), MOST_GATED_ROWS)):
            rows += whole(down.prefill(gated(rows, first_row), tiles, first_row))
            first_row += len(rows)


def fuse_layers(base: Base, sums: RankSums | None = None, *, deterministic: bool = False) -> Sequence[FusedLayer]:
    """All layers of a base of one of FAMILIES.

    Args:
        sums: of the ranks that share the base, where there are several.
        deterministic: as for `adapted_linear`.
    """
    modules, config = list(base.modules), base.config.get_text_config()
    return [
        _fuse(layer, weights, modules, config, sums, deterministic)
        for layer, weights in zip(base.walk.layers, base.weights, strict=True)
    ]


def _fuse(
    layer: nn.Module,
    weights: Mapping[str, Weight],
    modules: Sequence[str],
    config: Any,
    sums: RankSums | None,
    deterministic: bool,
) -> FusedLayer:
    """One layer.

    Args:
        layer: of `transformers`.
        weights: its shared weights, by module; of a rank, its parts.
        modules: all linear modules, in the order of their numbers.
        config: the text model's.
        sums, deterministic: as for `fuse_layers`.
    """
    attention: Any = layer.self_attn
    dim = attention.head_dim
    heads, kv_heads = (weights[f"self_attn.{name}_proj"].shape[0] // dim for name in "qk")
    normed = hasattr(attention, "q_norm")
    window = getattr(attention, "sliding_window", config.sliding_window if config.model_type == "mistral" else None)
    return FusedLayer(
        attention=Attention(
            heads=heads,
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
        projections=[
            Projection(
                linear=adapted_linear([weights[name] for name in names], deterministic=deterministic),
                bias=_bias([layer.get_submodule(name).bias for name in names]),  # type: ignore[misc]
                first=modules.index(names[0]),
                sizes=[weights[name].shape[0] for name in names],
            )
            for names in PACKED_MODULES
        ],
        sums=sums,
    )


def _bias(biases: Sequence[Tensor | None]) -> Tensor | None:
    present = [bias for bias in biases if bias is not None]
    return torch.cat(present) if present else None
