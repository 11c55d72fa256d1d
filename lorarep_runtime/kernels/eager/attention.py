"""Attention over pages by torch (PagedAttention, Kwon et al., 2023). Sequences of any lengths share a batch.

Keys and values lie in pages of `page_tokens` tokens each; a table lists the pages of each sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

WITHOUT_PLANS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""torch's attention backends without cuDNN. cuDNN compiles a plan for each new shape, which takes 0.1 s or longer."""

flash_forward = torch.ops.aten._flash_attention_forward
"""What torch.nn.attention.varlen calls, whose own layers take longer on the host than short prompts on the device."""

Bias = Callable[[int], Tensor]
"""From a number of tokens to (heads, tokens) fp32, for the keys at the first places of a sequence."""


class Scores(NamedTuple):
    """How queries score keys."""

    scale: float
    """Factor of q · k."""
    window: int | None
    """Tokens that a query sees, itself included; None is all."""
    softcap: float | None = None
    """Bounds scores to ±softcap by tanh (Gemma 2); None is none."""
    sinks: Tensor | None = None
    """(heads), a further score of each head, which takes its part of the softmax and has no value (gpt-oss); None is
    none."""
    bias: Bias | None = None
    """What is added to each key's score, by its place (ALiBi, Press et al., 2022); None is 0."""


def write_pages(keys: Tensor, values: Tensor, key_pages: Tensor, value_pages: Tensor, slots: Tensor) -> None:
    """Stores the keys and values of new tokens in their pages.

    Args:
        keys, values: (rows, kv_heads, key_dim) and (rows, kv_heads, value_dim), one token a row.
        key_pages, value_pages: (pages, page_tokens, kv_heads, key_dim) and (…, value_dim).
        slots: (rows) int64, page · page_tokens + the token's place in the page.
    """
    key_pages.flatten(0, 1).index_copy_(0, slots, keys)
    value_pages.flatten(0, 1).index_copy_(0, slots, values)


class Bounds(NamedTuple):
    """Where the queries or the keys of each of some sequences begin, one after the other."""

    starts: Tensor
    """(sequences + 1) int32, 0 first and the number of all last."""
    most: int
    """Most of a sequence."""


def flash_attention(
    queries: Tensor, keys: Tensor, values: Tensor, rows: Bounds, tokens: Bounds, scores: Scores
) -> Tensor:
    """Causal attention of the last tokens of each sequence to the whole sequence, for any numbers of both at once.

    torch's FlashAttention-2 (Dao, 2023) computes it, where `has_flash`.

    Args:
        queries: (rows, heads, head_dim), the last tokens of each sequence, one sequence after the other.
        keys, values: (tokens, kv_heads, head_dim), of all tokens of each sequence.
        rows, tokens: bounds of the queries and of the keys.

    Returns:
        (rows, heads, head_dim).
    """
    window = -1 if scores.window is None else scores.window - 1
    out: Tensor
    out, *_ = flash_forward(
        *(queries, keys, values, rows.starts, tokens.starts, rows.most, tokens.most),
        dropout_p=0.0,
        is_causal=scores.window is None,
        return_debug_mask=False,
        scale=scores.scale,
        window_size_left=window,
        window_size_right=0,
    )
    return out


def gathered(pages: Tensor, slots: Tensor) -> Tensor:
    """Keys or values (tokens, kv_heads, head_dim) of tokens out of their pages.

    Args:
        pages: (pages, page_tokens, kv_heads, head_dim).
        slots: (tokens) int64, page · page_tokens + place in the page.
    """
    return pages.flatten(2).flatten(0, 1).index_select(0, slots).view(-1, *pages.shape[2:])


def has_flash(queries: Tensor, value_pages: Tensor, scores: Scores) -> bool:
    """Whether torch has FlashAttention for queries (..., head_dim), values (..., value_dim) and their scores."""
    return (
        queries.is_cuda
        and queries.dtype in (torch.bfloat16, torch.float16)
        and torch.cuda.get_device_capability(queries.device) >= (8, 0)
        and queries.shape[-1] == value_pages.shape[-1] <= 256
        and queries.shape[-1] % 8 == 0
        and scores.softcap is None
        and scores.sinks is None
        and scores.bias is None
    )


def paged_attention(
    queries: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    tables: Tensor,
    lengths: Tensor,
    scores: Scores,
) -> Tensor:
    """Causal attention of the last tokens of each sequence to the whole sequence, with grouped heads.

    Several query heads share a key head (Ainslie et al., 2023). The softmax is fp32, as in `transformers`' eager
    attention.

    Args:
        queries: (sequences, rows, heads, key_dim), the last `rows` tokens of each sequence.
        key_pages, value_pages: (pages, page_tokens, kv_heads, key_dim) and (…, value_dim). Pages that a table names
            hold finite numbers; a NaN would spread to the outputs of that sequence.
        tables: (sequences, n) int64, the pages of each sequence in order. Entries behind its length are any pages.
        lengths: (sequences) int64, tokens of each sequence, queries included.

    Returns:
        (sequences, rows, heads, value_dim), in the dtype of the queries.
    """
    scale, window, softcap, sinks, bias = scores
    sequences, rows, heads, key_dim = queries.shape
    kv_heads = key_pages.shape[2]
    tokens = tables.shape[1] * key_pages.shape[1]

    def gathered(pages: Tensor) -> Tensor:
        """The keys or values of all tables' pages: (sequences, kv_heads, tokens, key_dim or value_dim)."""
        # index_select copies whole pages, several times as fast as advanced indexing copies elements.
        rows = pages.flatten(1).index_select(0, tables.flatten())
        return rows.view(sequences, tokens, kv_heads, -1).transpose(1, 2)

    keys, values = gathered(key_pages), gathered(value_pages)
    key = torch.arange(tokens, device=queries.device)
    query = (lengths - rows).view(-1, 1, 1) + torch.arange(rows, device=queries.device).view(1, -1, 1)
    seen = key <= query
    if window is not None:
        seen &= key > query - window
    if softcap is None and sinks is None and bias is None:
        with sdpa_kernel(WITHOUT_PLANS) if queries.is_cuda else nullcontext():
            return F.scaled_dot_product_attention(
                queries.transpose(1, 2), keys, values, attn_mask=seen[:, None], scale=scale, enable_gqa=True
            ).transpose(1, 2)
    # Query heads that share a key head become rows of one product: (sequences, kv_heads, rows · group, key_dim).
    group = heads // kv_heads
    q = queries.view(sequences, rows, kv_heads, group, key_dim).permute(0, 2, 1, 3, 4).flatten(2, 3)
    found = torch.matmul(q, keys.transpose(2, 3)).mul_(scale).view(sequences, kv_heads, rows, group, tokens)
    if softcap is not None:
        found = found.div_(softcap).tanh_().mul_(softcap)
    if bias is not None:
        found = found + bias(tokens).view(kv_heads, 1, group, tokens)
    found.masked_fill_(~seen[:, None, :, None, :], float("-inf"))
    if sinks is not None:
        own = sinks.to(found.dtype).view(kv_heads, 1, group, 1).expand(*found.shape[:-1], 1)
        found = torch.cat([found, own], dim=-1)
    weights = found.softmax(-1, dtype=torch.float32)[..., :tokens].to(queries.dtype)
    out = torch.matmul(weights.flatten(2, 3), values)
    return out.view(sequences, kv_heads, rows, group, -1).permute(0, 2, 1, 3, 4).flatten(2, 3)
