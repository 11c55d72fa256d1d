"""Attention of the rows of one visit to pages of keys and values."""

from __future__ import annotations

import torch
from torch import Tensor

from lorarep_runtime.kernels.eager.attention import Scores, flash_attention, gathered, has_flash, paged_attention
from lorarep_runtime.model.batch import View
from lorarep_runtime.model.kv_cache import pages_of


def attend_pages(
    view: View,
    q: Tensor,
    own: tuple[Tensor, Tensor],
    key_pages: Tensor,
    value_pages: Tensor,
    tables: Tensor,
    scores: Scores,
    *,
    alone: bool = False,
) -> Tensor:
    """Attention of the rows of a view to the pages of their spans, which hold their own keys and values already.

    Args:
        q: (rows, heads, key_dim).
        own: the rows' own keys (rows, kv_heads, key_dim) and values (rows, kv_heads, value_dim).
        key_pages, value_pages: (pages, page_tokens, kv_heads, key_dim) and (…, value_dim).
        tables: (spans, n) int64, the pages of each span at this visit.
        alone: computes each row by itself, so that its result is bitwise the same whatever others there are.

    Returns:
        (rows, heads, value_dim).
    """

    pages = key_pages, value_pages
    if not alone and view.prompts and has_flash(q, value_pages, scores):
        if view.is_whole:
            return flash_attention(q, *own, view.row_bounds, view.row_bounds, scores)
        slots = view.keys.slots(tables)
        keys, values = gathered(key_pages, slots), gathered(value_pages, slots)
        return flash_attention(q, keys, values, view.row_bounds, view.keys.bounds, scores)

    def attend(rows: Tensor, tables: Tensor, lengths: Tensor) -> Tensor:
        return paged_attention(rows, *pages, tables, lengths, scores)

    if alone:
        rows = [
            attend(row[None, None], tables[span : span + 1, : pages_of(tokens)], torch.tensor([tokens]).to(q.device))[0]
            for row, (span, tokens) in zip(q, view.rows_alone, strict=True)
        ]
        return torch.cat(rows)
    if not view.prompts:
        return attend(q.unsqueeze(1), tables, view.lengths).squeeze(1)
    out = q.new_empty(*q.shape[:-1], value_pages.shape[-1])
    if len(view.decodes):
        one = q[view.decode_rows].unsqueeze(1), tables[view.decodes, : view.decode_pages], view.lengths[view.decodes]
        out[view.decode_rows] = attend(*one).squeeze(1)
    for prompt in view.prompts:
        mine, span = slice(prompt.start, prompt.stop), slice(prompt.span, prompt.span + 1)
        out[mine] = attend(q[mine].unsqueeze(0), tables[span, : pages_of(prompt.length)], view.lengths[span])[0]
    return out
