"""Attention of the rows of one visit to pages of keys and values."""

from __future__ import annotations

from torch import Tensor

from lorarep_runtime.kernels.eager.attention import Scores, paged_attention, prompt_attention
from lorarep_runtime.model.batch import Prompt, View
from lorarep_runtime.model.kv_cache import pages_of


def attend_pages(
    view: View,
    q: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    tables: Tensor,
    scores: Scores,
) -> Tensor:
    """Attention of the rows of a view to the pages of their spans, which hold their own keys and values already.

    Args:
        q: (rows, heads, key_dim).
        key_pages, value_pages: (pages, page_tokens, kv_heads, key_dim) and (…, value_dim).
        tables: (spans, n) int64, the pages of each span at this visit.

    Returns:
        (rows, heads, value_dim).
    """

    def attend(rows: Tensor, tables: Tensor, lengths: Tensor) -> Tensor:
        return paged_attention(rows.unsqueeze(1), key_pages, value_pages, tables, lengths, scores).squeeze(1)

    if not view.prompts:
        return attend(q, tables, view.lengths)

    def attend_prompt(prompt: Prompt) -> Tensor:
        return prompt_attention(
            q[prompt.start : prompt.stop],
            key_pages,
            value_pages,
            tables[prompt.span, : pages_of(prompt.length)],
            prompt.length,
            prompt.bounds,
            scores,
        )

    if len(view.prompts) == 1 and not len(view.decodes):
        return attend_prompt(view.prompts[0])
    out = q.new_empty(*q.shape[:-1], value_pages.shape[-1])
    if len(view.decodes):
        out[view.decode_rows] = attend(
            q[view.decode_rows], tables[view.decodes, : view.decode_pages], view.lengths[view.decodes]
        )
    for prompt in view.prompts:
        out[prompt.start : prompt.stop] = attend_prompt(prompt)
    return out
