"""Attention of one new token of each row over its pages, each sequence split among several programs.

Pages as in Kwon et al. (2023), the split as in Flash-Decoding (Dao et al., 2023). Splits are merged by `combine`; where
sequences are whole there is nothing to merge.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorarep_runtime.kernels.attention_config import Attention
from lorarep_runtime.kernels.decode.combine import Partials
from lorarep_runtime.kernels.decode.shrink import (
    await_previous,
    group_of_row,
    load_ranks,
    part_columns,
    shrink_options,
    write_shrunk,
)
from lorarep_runtime.kernels.entry_table import DecodeRows, ReferenceRows
from lorarep_runtime.kernels.rotary import rotated, rotated_reference

BLOCK_TOKENS: tl.constexpr = tl.constexpr(64)
"""Tokens that a program loads at once."""
SIZES = ("WIDTH", "PART", "BLOCK", "MODULES", "FIRST", "COUNT", "RANKS", "LANES")
"""What `shrink_options` says of shrunk."""
LEAST_HEADS = 16
"""Rows of the smallest matrix product that tensor cores take."""


class Cache(NamedTuple):
    """Where the keys and values of the rows are."""

    key_pages: Tensor
    """(pages, page_tokens, kv_heads, head_dim)"""
    value_pages: Tensor
    """(pages, page_tokens, kv_heads, head_dim)"""
    tables: Tensor
    """(rows, positions, n) int32, the pages of each row's sequence at each position of its stack, in order."""
    lengths: Tensor
    """(rows) int32, tokens of each row's sequence, the new one included."""


def attend(
    layer: Attention,
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cache: Cache,
    partials: Partials,
    rows: DecodeRows,
    *,
    pdl: bool = False,
) -> None:
    """Rotates the new token's query and key (Su et al., 2021), stores its key and value, and attends.

    Rounds as `transformers` does, except that scores stay in fp32. All tensors are contiguous; qkv, cos, sin, pages
    and norms have the dtype of the activations. What lies in pages beyond a sequence's length may be anything.

    Args:
        qkv: (rows, (heads + 2 · kv_heads) · head_dim): queries, keys, values.
        cos, sin: (rows, head_dim), of each row's new token.
        partials: written.
        pdl: begin while the kernel before ends (`shrunk`).
    """
    _launch(layer, qkv, cos, sin, cache, partials, rows, partials.maxima.shape[2], pdl)


def attend_whole(
    layer: Attention,
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cache: Cache,
    out: Tensor,
    shrunk: Tensor,
    rows: DecodeRows,
    first: int,
    *,
    pdl: bool = False,
) -> None:
    """The same where no sequence is split, with what `combine_shrink` does then: one kernel instead of two.

    Args:
        shrunk: fp32 (rows, kv_heads, 1, ranks): a part is what a head of keys and values is attended to by.
    """
    options, part = shrink_options(shrunk, out.shape[1], rows, first), out.shape[1] // layer.kv_heads
    sizes = {name: options[name] for name in SIZES} | dict(PART=part, BLOCK=triton.next_power_of_2(part))
    _launch(layer, qkv, cos, sin, cache, None, rows, 1, pdl, (out, shrunk, rows.adapters), sizes)


def _launch(
    layer: Attention,
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cache: Cache,
    partials: Partials | None,
    rows: DecodeRows,
    splits: int,
    pdl: bool,
    whole: Sequence[Tensor | None] = (None, None, None),
    sizes: Mapping[str, int | None] = dict.fromkeys(SIZES),
) -> None:
    block_dim = triton.next_power_of_2(layer.head_dim)
    _attend[(len(qkv), layer.kv_heads, splits)](
        qkv,
        layer.q_norm,
        layer.k_norm,
        cos,
        sin,
        *cache,
        *(partials or (None, None, None)),
        *whole,
        rows.positions,
        cache.tables.shape[1],
        cache.tables.shape[2],
        layer.scale,
        layer.eps,
        splits,
        **sizes,
        WHOLE=partials is None,
        WINDOW=layer.window,
        HEADS=layer.heads,
        KV_HEADS=layer.kv_heads,
        BLOCK_HEADS=max(LEAST_HEADS, triton.next_power_of_2(layer.heads // layer.kv_heads)),
        DIM=layer.head_dim,
        BLOCK_DIM=block_dim,
        PAGE=cache.key_pages.shape[1],
        PDL=pdl,
        num_warps=8 if block_dim > 128 else 4,
        num_stages=1,  # the kernel loads ahead itself
        launch_pdl=pdl,
    )


def attend_reference(
    layer: Attention, qkv: Tensor, cos: Tensor, sin: Tensor, cache: Cache, partials: Partials, rows: ReferenceRows
) -> None:
    """All tokens in the first split."""
    for partial, neutral in zip(partials, (float("-inf"), 0, 0), strict=True):
        partial[[row for row, _ in rows.walking()]] = neutral
    for row, position in rows.walking():
        q, k, v = qkv[row].view(-1, layer.head_dim).split([layer.heads, layer.kv_heads, layer.kv_heads])
        q, k = (
            rotated_reference(x, norm, cos[row], sin[row], layer.eps)
            for x, norm in ((q, layer.q_norm), (k, layer.k_norm))
        )
        length = int(cache.lengths[row])
        page_tokens = cache.key_pages.shape[1]
        tokens = torch.arange(length, device=qkv.device)
        pages = cache.tables[row, position].long()[tokens // page_tokens]
        cache.key_pages[pages[-1], tokens[-1] % page_tokens] = k
        cache.value_pages[pages[-1], tokens[-1] % page_tokens] = v
        seen = slice(0 if layer.window is None else max(0, length - layer.window), None)
        at = (pages[seen], tokens[seen] % page_tokens)
        group = layer.heads // layer.kv_heads
        keys, values = (p[at].float().repeat_interleave(group, 1) for p in (cache.key_pages, cache.value_pages))
        scores = torch.einsum("hd,thd->ht", q.float(), keys) * layer.scale
        maxima = scores.amax(1)
        weights = (scores - maxima[:, None]).exp()
        partials.maxima[row, :, 0], partials.sums[row, :, 0] = maxima, weights.sum(1)
        partials.values[row, :, 0] = torch.einsum("ht,thd->hd", weights, values)


@triton.jit
def _load_block(
    key_pages, value_pages, table, head, start, stop, KV_HEADS: tl.constexpr, DIM: tl.constexpr, d, PAGE: tl.constexpr
):
    """Keys and values (BLOCK_TOKENS, BLOCK_DIM) of tokens from `start` on; 0 at and beyond `stop`."""
    t = start + tl.arange(0, BLOCK_TOKENS)
    page = tl.load(table + t // PAGE, mask=t < stop, other=0).to(tl.int64)
    at = ((page * PAGE + t % PAGE) * KV_HEADS + head) * DIM
    mask = (t < stop)[:, None] & (d < DIM)[None, :]
    at = at[:, None] + d[None, :]
    return tl.load(key_pages + at, mask=mask, other=0), tl.load(value_pages + at, mask=mask, other=0)


@triton.jit(do_not_specialize=["positions", "depth", "pages", "splits"])  # each kind of number would be compiled anew
def _attend(
    qkv,
    q_norm,
    k_norm,
    cos,
    sin,
    key_pages,
    value_pages,
    tables,
    lengths,
    maxima,
    sums,
    values,
    out,
    shrunk,
    adapters,
    positions,
    depth,
    pages,
    scale,
    eps,
    splits,
    WIDTH: tl.constexpr,
    PART: tl.constexpr,
    BLOCK: tl.constexpr,
    MODULES: tl.constexpr,
    FIRST: tl.constexpr,
    COUNT: tl.constexpr,
    RANKS: tl.constexpr,
    LANES: tl.constexpr,
    WHOLE: tl.constexpr,
    WINDOW: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    PDL: tl.constexpr,
):
    row, kv_head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    group: tl.constexpr = HEADS // KV_HEADS
    position = tl.load(positions + row)
    length = tl.load(lengths + row)
    table = tables + (row * depth + position) * pages
    # This split's tokens: whole pages from the first that the query sees, shared out evenly.
    visible = 0 if WINDOW is None else tl.maximum(length - WINDOW, 0)
    first_page = visible // PAGE
    share = tl.cdiv(tl.cdiv(length, PAGE) - first_page, splits) * PAGE
    start = first_page * PAGE + split * share
    stop = tl.where(position < 0, start, tl.minimum(start + share, length))
    # The new token is the last; it is taken from qkv, not from its page.
    new = length - 1
    cached = tl.minimum(stop, new)
    has_new = (start <= new) & (new < stop)
    d = tl.arange(0, BLOCK_DIM)
    # Earlier tokens were stored in earlier steps: no need to wait for the kernel before to load them.
    k, v = _load_block(key_pages, value_pages, table, kv_head, start, cached, KV_HEADS, DIM, d, PAGE)
    if WHOLE:
        columns, inside = part_columns(kv_head, WIDTH, PART, BLOCK)
        addresses, ranks = group_of_row(adapters, row, position, MODULES, FIRST, COUNT)
        dtype = out.dtype.element_ty
        a, there = load_ranks(addresses, ranks, 0, columns, inside, dtype, WIDTH, COUNT, RANKS, LANES)
    await_previous(PDL)
    if position < 0:
        return
    head = tl.arange(0, BLOCK_HEADS)
    in_group = head < group
    at = (row * HEADS + kv_head * group + head) * splits + split
    if not WHOLE:  # noqa: SIM102, one is known when the kernel is compiled
        if start >= stop:
            tl.store(maxima + at, float("-inf"), mask=in_group)
            tl.store(sums + at, 0.0, mask=in_group)
            return
    qkv += row * (HEADS + 2 * KV_HEADS) * DIM
    cos += row * DIM
    sin += row * DIM
    q = rotated(qkv + (kv_head * group + head) * DIM, q_norm, cos, sin, eps, in_group, DIM, BLOCK_DIM)
    one = tl.arange(0, 1)
    new_k = rotated(qkv + (HEADS + kv_head + one) * DIM, k_norm, cos, sin, eps, one == 0, DIM, BLOCK_DIM)
    new_v = tl.load(qkv + (HEADS + KV_HEADS + kv_head) * DIM + d, mask=d < DIM, other=0)[None, :]

    page = tl.load(table + new // PAGE).to(tl.int64)
    stored = (((page * PAGE + new % PAGE) * KV_HEADS + kv_head) * DIM + d)[None, :]
    written = (d < tl.where(has_new, DIM, 0))[None, :]
    tl.store(key_pages + stored, new_k, mask=written)
    tl.store(value_pages + stored, new_v, mask=written)

    # Online softmax (Milakov and Gimelshein, 2018), which begins with the new token in the split that has it.
    score = tl.sum(q.to(tl.float32) * new_k.to(tl.float32), 1) * scale
    maximum = tl.where(has_new, score, float("-inf"))
    total = tl.zeros([BLOCK_HEADS], tl.float32) + tl.where(has_new, 1.0, 0.0)
    value = tl.zeros([BLOCK_HEADS, BLOCK_DIM], tl.float32) + tl.where(has_new, new_v.to(tl.float32), 0.0)
    for block in range(start, cached, BLOCK_TOKENS):
        keys, vals = k, v
        k, v = _load_block(key_pages, value_pages, table, kv_head, block + BLOCK_TOKENS, cached, KV_HEADS, DIM, d, PAGE)
        t = block + tl.arange(0, BLOCK_TOKENS)
        scores = tl.dot(q, tl.trans(keys), input_precision="ieee") * scale
        scores = tl.where(((t >= visible) & (t < cached))[None, :], scores, float("-inf"))
        larger = tl.maximum(maximum, tl.max(scores, 1))
        fade = tl.exp(maximum - larger)
        weights = tl.exp(scores - larger[:, None])
        total = total * fade + tl.sum(weights, 1)
        value = value * fade[:, None] + tl.dot(weights.to(vals.dtype), vals, input_precision="ieee")
        maximum = larger
    to = at[:, None] * DIM + d[None, :]
    known = in_group[:, None] & (d < DIM)[None, :]
    if WHOLE:
        tl.store(out + to, (value / total[:, None]).to(dtype), mask=known)
        if tl.max(ranks, 0) > 0:
            tl.debug_barrier()  # a thread has other columns now
            x = tl.load(out + row * WIDTH + columns, mask=inside, other=0)
            write_shrunk(shrunk, x, a, there, addresses, ranks, columns, inside, WIDTH, COUNT, RANKS, LANES)
    else:
        tl.store(maxima + at, maximum, mask=in_group)
        tl.store(sums + at, total, mask=in_group)
        tl.store(values + to, value, mask=known)
