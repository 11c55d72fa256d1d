"""The Triton kernel of decode attention: a program has a row, a head of keys and values, and a split.

With CHUNK, sums do not depend on the number of splits: a sequence is summed in chunks whose length is a function of its
own length alone, and chunks are merged one after the other by `merge`, here or in `combine`.

With AHEAD, keys and values are loaded a block ahead, and page numbers two. Without it fewer registers are needed, so
that more programs hide each other's loads.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lorarep_runtime.kernels.decode.merge import merge
from lorarep_runtime.kernels.decode.shrink import (
    await_previous,
    entries_of_row,
    load_ranks,
    part_columns,
    write_shrunk,
)
from lorarep_runtime.kernels.rotary import rotated


@triton.jit
def _load_block(
    key_pages,
    value_pages,
    block_pages,
    head,
    start,
    stop,
    d,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    """Keys and values (BLOCK_TOKENS, BLOCK_DIM) of tokens from `start` on, in their pages; 0 at and beyond `stop`."""
    t = start + tl.arange(0, BLOCK_TOKENS)
    at = ((block_pages.to(tl.int64) * PAGE + t % PAGE) * KV_HEADS + head) * DIM
    mask = (t < stop)[:, None] & (d < DIM)[None, :]
    at = at[:, None] + d[None, :]
    return tl.load(key_pages + at, mask=mask, other=0), tl.load(value_pages + at, mask=mask, other=0)


@triton.jit
def _pages(table, start, stop, PAGE: tl.constexpr, BLOCK_TOKENS: tl.constexpr):
    """Pages (BLOCK_TOKENS) of the tokens from `start` on."""
    t = start + tl.arange(0, BLOCK_TOKENS)
    return tl.load(table + t // PAGE, mask=t < stop, other=0)


@triton.jit(do_not_specialize=["positions", "depth", "pages", "splits"])  # each kind of number would be compiled anew
def attend_kernel(
    qkv,
    q_norm,
    k_norm,
    cos,
    sin,
    key_pages,
    value_pages,
    tables,
    sequences,
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
    RANK_BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
    STORED: tl.constexpr,
    WINDOW: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    CHUNK: tl.constexpr,
    MOST_CHUNKS: tl.constexpr,
    AHEAD: tl.constexpr,
    PDL: tl.constexpr,
):
    row, kv_head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    group: tl.constexpr = HEADS // KV_HEADS
    position = tl.load(positions + row)
    length = tl.load(lengths + row)
    table = tables + (tl.load(sequences + row).to(tl.int64) * depth + position) * pages
    # This split's tokens: whole pages from the first that the query sees, shared out evenly.
    visible = 0 if WINDOW is None else tl.maximum(length - WINDOW, 0)
    first_page = visible // PAGE
    chunk = 0
    if CHUNK is None:
        share = tl.cdiv(tl.cdiv(length, PAGE) - first_page, splits) * PAGE
    else:
        # One chunk, or all.
        even = tl.cdiv(length - first_page * PAGE, MOST_CHUNKS)
        chunk = tl.maximum(CHUNK, tl.cdiv(even, BLOCK_TOKENS) * BLOCK_TOKENS)
        share = chunk * tl.where(splits == 1, MOST_CHUNKS, 1)
    start = first_page * PAGE + split * share
    stop = tl.where(position < 0, start, tl.minimum(start + share, length))
    # The new token is the last; it is taken from qkv, not from its page.
    new = length - 1
    cached = tl.minimum(stop, new)
    # Chunks begin with it in the first one: that exists for every length.
    has_new = (start <= new) & (new < stop) if CHUNK is None else split == 0
    d = tl.arange(0, BLOCK_DIM)
    if STORED:
        await_previous(PDL)  # it has stored the tokens of other rows of this sequence
    # Else tokens were stored in earlier steps: no need to wait for the kernel before to load them.
    if AHEAD:
        block_pages = _pages(table, start, cached, PAGE, BLOCK_TOKENS)
        k, v = _load_block(
            key_pages, value_pages, block_pages, kv_head, start, cached, d, KV_HEADS, DIM, PAGE, BLOCK_TOKENS
        )
        block_pages = _pages(table, start + BLOCK_TOKENS, cached, PAGE, BLOCK_TOKENS)
    if WHOLE:
        columns, inside = part_columns(kv_head, WIDTH, PART, BLOCK)
        addresses, ranks = entries_of_row(adapters, row, position, MODULES, FIRST, COUNT)
        dtype = out.dtype.element_ty
        a, there = load_ranks(addresses, ranks, 0, columns, inside, dtype, WIDTH, COUNT, RANKS, RANK_BLOCK)
    if not STORED:
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

    if not STORED:
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
    if CHUNK is not None:
        whole_maximum = tl.zeros([BLOCK_HEADS], tl.float32) + float("-inf")
        whole_total = tl.zeros([BLOCK_HEADS], tl.float32)
        whole_value = tl.zeros([BLOCK_HEADS, BLOCK_DIM], tl.float32)
    for block in range(start, cached, BLOCK_TOKENS):
        if AHEAD:
            keys, vals, next_block = k, v, block + BLOCK_TOKENS
            k, v = _load_block(
                key_pages,
                value_pages,
                block_pages,
                kv_head,
                next_block,
                cached,
                d,
                KV_HEADS,
                DIM,
                PAGE,
                BLOCK_TOKENS,
            )
            block_pages = _pages(table, block + 2 * BLOCK_TOKENS, cached, PAGE, BLOCK_TOKENS)
        else:
            block_pages = _pages(table, block, cached, PAGE, BLOCK_TOKENS)
            keys, vals = _load_block(
                key_pages, value_pages, block_pages, kv_head, block, cached, d, KV_HEADS, DIM, PAGE, BLOCK_TOKENS
            )
        t = block + tl.arange(0, BLOCK_TOKENS)
        if CHUNK is not None:  # noqa: SIM102, one is known when the kernel is compiled
            if (block > start) & ((block - start) % chunk == 0):
                whole_maximum, whole_total, whole_value = merge(
                    whole_maximum, whole_total, whole_value, maximum, total, value
                )
                maximum = tl.zeros([BLOCK_HEADS], tl.float32) + float("-inf")
                total = tl.zeros([BLOCK_HEADS], tl.float32)
                value = tl.zeros([BLOCK_HEADS, BLOCK_DIM], tl.float32)
        scores = tl.dot(q, tl.trans(keys), input_precision="ieee") * scale
        scores = tl.where(((t >= visible) & (t < cached))[None, :], scores, float("-inf"))
        larger = tl.maximum(maximum, tl.max(scores, 1))
        fade = tl.exp(maximum - larger)
        weights = tl.exp(scores - larger[:, None])
        total = total * fade + tl.sum(weights, 1)
        value = value * fade[:, None] + tl.dot(weights.to(vals.dtype), vals, input_precision="ieee")
        maximum = larger
    if CHUNK is not None:
        maximum, total, value = merge(whole_maximum, whole_total, whole_value, maximum, total, value)
    to = at[:, None] * DIM + d[None, :]
    known = in_group[:, None] & (d < DIM)[None, :]
    if WHOLE:
        tl.store(out + to, (value / total[:, None]).to(dtype), mask=known)
        if tl.max(ranks, 0) > 0:
            tl.debug_barrier()  # a thread has other columns now
            x = tl.load(out + row * WIDTH + columns, mask=inside, other=0)
            write_shrunk(shrunk, x, a, there, addresses, ranks, columns, inside, WIDTH, COUNT, RANKS, RANK_BLOCK)
    else:
        tl.store(maxima + at, maximum, mask=in_group)
        tl.store(sums + at, total, mask=in_group)
        tl.store(values + to, value, mask=known)
