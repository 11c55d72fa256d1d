"""Attention of one new token of each row over the pages of its sequence, which several programs may split.

Pages are as in PagedAttention (Kwon et al., 2023), splits as in Flash-Decoding (Dao et al., 2023). `combine` merges
splits; whole sequences need no merging.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from lorarep_runtime.kernels.attention_config import Attention
from lorarep_runtime.kernels.decode.attention_kernel import attend_kernel
from lorarep_runtime.kernels.decode.combine import Partials
from lorarep_runtime.kernels.decode.shrink import shrink_options
from lorarep_runtime.kernels.entry_table import DecodeRows, ReferenceRows
from lorarep_runtime.kernels.rotary import rotated_reference

SIZES = ("WIDTH", "PART", "BLOCK", "MODULES", "FIRST", "COUNT", "RANKS", "RANK_BLOCK")
"""Sizes of shrunk, from `shrink_options`."""
BLOCKS = {128: (32, 1, False), 64: (32, 2, True), 0: (64, 4, True)}
"""Tokens of a block, warps, and whether blocks are loaded ahead: by the least rows of a step. The fastest on an H200.

With more rows, smaller programs are faster, of which more are resident at once.
"""
LEAST_CHUNK, MOST_CHUNKS = 128, 32
"""Least tokens of a chunk, a multiple of the tokens of a block, and most chunks of a sequence."""
LEAST_HEADS = 16
"""Rows of the smallest matrix product that tensor cores take."""


class Cache(NamedTuple):
    """The pages that hold the keys and values of the rows' sequences."""

    key_pages: Tensor
    """(pages, page_tokens, kv_heads, head_dim)"""
    value_pages: Tensor
    """(pages, page_tokens, kv_heads, head_dim)"""
    tables: Tensor
    """(sequences, positions, n) int32, the pages of each sequence at each position of its stack, in order."""
    sequences: Tensor
    """(rows) int32, the number of each row's sequence in the tables."""
    lengths: Tensor
    """(rows) int32, tokens of each row's sequence up to the row's own, which is included."""


def attend(
    layer: Attention,
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cache: Cache,
    partials: Partials,
    rows: DecodeRows,
    *,
    stored: bool = False,
    chunked: bool = False,
    pdl: bool = False,
) -> None:
    """Rotates the new token's query and key (Su et al., 2021), stores its key and value, and attends.

    Rounds as `transformers` does, except that scores stay in fp32. All tensors are contiguous; qkv, cos, sin, pages
    and norms have the dtype of the activations. What lies in pages beyond a sequence's length may be anything.

    Args:
        qkv: (rows, (heads + 2 · kv_heads) · head_dim): queries, keys, values.
        cos, sin: (rows, head_dim), of each row's new token.
        partials: written.
        stored: `store` has stored all keys and values before. Then several rows may be tokens of one sequence.
        chunked: a row's results, once merged, are bitwise the same for any number of rows and splits. Splits are 1, or
            as many as `chunks_of` says for the longest sequence.
        pdl: begin while the previous kernel ends (programmatic dependent launch).
    """
    _launch(layer, qkv, cos, sin, cache, partials, rows, partials.maxima.shape[2], stored, pdl, chunked=chunked)


def chunks_of(tokens: int) -> int:
    """Least splits, other than 1, of sequences of up to `tokens` tokens in chunks."""
    return MOST_CHUNKS if tokens > LEAST_CHUNK * MOST_CHUNKS // 2 else MOST_CHUNKS // 2


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
    stored: bool = False,
    pdl: bool = False,
) -> None:
    """`attend` and `combine_shrink` in one kernel, where no sequence is split.

    Args:
        qkv, cos, sin, stored, pdl: as for `attend`.
        out: (rows, heads · head_dim), in the dtype of the activations, written.
        shrunk: fp32 (rows, kv_heads, 1, ranks), written; a part is the heads that share a head of keys and values.
        first: number of the module that reads `out`.
    """
    options, part = shrink_options(shrunk, out.shape[1], rows, first), out.shape[1] // layer.kv_heads
    sizes = {name: options[name] for name in SIZES} | dict(PART=part, BLOCK=triton.next_power_of_2(part))
    _launch(layer, qkv, cos, sin, cache, None, rows, 1, stored, pdl, (out, shrunk, rows.adapters), sizes)


def _launch(
    layer: Attention,
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cache: Cache,
    partials: Partials | None,
    rows: DecodeRows,
    splits: int,
    stored: bool,
    pdl: bool,
    whole: Sequence[Tensor | None] = (None, None, None),
    sizes: Mapping[str, int | None] = dict.fromkeys(SIZES),
    *,
    chunked: bool = False,
) -> None:
    block_dim = triton.next_power_of_2(layer.head_dim)
    block, warps, ahead = BLOCKS[0] if chunked else next(b for rows, b in BLOCKS.items() if len(qkv) >= rows)
    attend_kernel[(len(qkv), layer.kv_heads, splits)](
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
        STORED=stored,
        WINDOW=layer.window,
        HEADS=layer.heads,
        KV_HEADS=layer.kv_heads,
        BLOCK_HEADS=max(LEAST_HEADS, triton.next_power_of_2(layer.heads // layer.kv_heads)),
        DIM=layer.head_dim,
        BLOCK_DIM=block_dim,
        PAGE=cache.key_pages.shape[1],
        BLOCK_TOKENS=block,
        CHUNK=LEAST_CHUNK if chunked else None,
        MOST_CHUNKS=MOST_CHUNKS,
        AHEAD=ahead,
        PDL=pdl,
        num_warps=warps * (2 if block_dim > 128 else 1),
        num_stages=1,  # the kernel loads ahead itself, or not at all
        launch_pdl=pdl,
    )


def attend_reference(
    layer: Attention, qkv: Tensor, cos: Tensor, sin: Tensor, cache: Cache, partials: Partials, rows: ReferenceRows
) -> None:
    """`attend` in torch, with all tokens in the first split."""
    for partial, neutral in zip(partials, (float("-inf"), 0, 0), strict=True):
        partial[[row for row, _ in rows.active()]] = neutral
    for row, position in rows.active():
        q, k, v = qkv[row].view(-1, layer.head_dim).split([layer.heads, layer.kv_heads, layer.kv_heads])
        q, k = (
            rotated_reference(x, norm, cos[row], sin[row], layer.eps)
            for x, norm in ((q, layer.q_norm), (k, layer.k_norm))
        )
        length = int(cache.lengths[row])
        page_tokens = cache.key_pages.shape[1]
        tokens = torch.arange(length, device=qkv.device)
        pages = cache.tables[int(cache.sequences[row]), position].long()[tokens // page_tokens]
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
