"""Stores the keys and values of a step's new tokens, for steps in which several rows are tokens of one sequence."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lorarep_runtime.kernels.attention_config import Attention
from lorarep_runtime.kernels.decode.attention import Cache
from lorarep_runtime.kernels.decode.shrink import await_previous
from lorarep_runtime.kernels.entry_table import DecodeRows, ReferenceRows
from lorarep_runtime.kernels.rotary import rotated, rotated_reference


def store(
    layer: Attention, qkv: Tensor, cos: Tensor, sin: Tensor, cache: Cache, rows: DecodeRows, *, pdl: bool = False
) -> None:
    """Rotates the new tokens' keys (Su et al., 2021) and stores keys and values, as `attend` does without `stored`.

    Args:
        qkv, cos, sin, pdl: as for `attend`.
    """
    _store[(len(qkv),)](
        qkv,
        layer.k_norm,
        cos,
        sin,
        *cache,
        rows.positions,
        cache.tables.shape[1],
        cache.tables.shape[2],
        layer.eps,
        HEADS=layer.heads,
        KV_HEADS=layer.kv_heads,
        BLOCK_HEADS=triton.next_power_of_2(layer.kv_heads),
        DIM=layer.head_dim,
        BLOCK_DIM=triton.next_power_of_2(layer.head_dim),
        PAGE=cache.key_pages.shape[1],
        PDL=pdl,
        launch_pdl=pdl,
    )


def store_reference(layer: Attention, qkv: Tensor, cos: Tensor, sin: Tensor, cache: Cache, rows: ReferenceRows) -> None:
    page_tokens = cache.key_pages.shape[1]
    for row, position in rows.active():
        _, k, v = qkv[row].view(-1, layer.head_dim).split([layer.heads, layer.kv_heads, layer.kv_heads])
        token = int(cache.lengths[row]) - 1
        page = int(cache.tables[int(cache.sequences[row]), position, token // page_tokens])
        cache.key_pages[page, token % page_tokens] = rotated_reference(k, layer.k_norm, cos[row], sin[row], layer.eps)
        cache.value_pages[page, token % page_tokens] = v


@triton.jit(do_not_specialize=["positions", "depth", "pages"])  # each kind of number would be compiled anew
def _store(
    qkv,
    k_norm,
    cos,
    sin,
    key_pages,
    value_pages,
    tables,
    sequences,
    lengths,
    positions,
    depth,
    pages,
    eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    position = tl.load(positions + row)
    new = tl.load(lengths + row) - 1
    table = tables + (tl.load(sequences + row).to(tl.int64) * depth + position) * pages
    page = tl.load(table + new // PAGE, mask=position >= 0, other=0).to(tl.int64)
    await_previous(PDL)
    if position < 0:
        return
    head = tl.arange(0, BLOCK_HEADS)
    d = tl.arange(0, BLOCK_DIM)
    inside = (head < KV_HEADS)[:, None] & (d < DIM)[None, :]
    at = head[:, None] * DIM + d[None, :]
    qkv += row * (HEADS + 2 * KV_HEADS) * DIM + HEADS * DIM
    keys = rotated(qkv + head * DIM, k_norm, cos + row * DIM, sin + row * DIM, eps, head < KV_HEADS, DIM, BLOCK_DIM)
    stored = (page * PAGE + new % PAGE) * KV_HEADS * DIM + at
    tl.store(key_pages + stored, keys, mask=inside)
    tl.store(value_pages + stored, tl.load(qkv + KV_HEADS * DIM + at, mask=inside), mask=inside)
