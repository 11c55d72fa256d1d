"""Attention over pages, and the function that `transformers` calls for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lorarep_runtime.errors import FailedPrecondition
from lorarep_runtime.kernels.eager.attention import paged_attention, prompt_attention, varlen_attention
from lorarep_runtime.model.batch import Prompt, View
from lorarep_runtime.model.kv_cache import pages_of

if TYPE_CHECKING:
    from lorarep_runtime.model.layer_walk import Walk

ATTENTION = "lorarep"
"""Name under which `transformers` finds lorarep's attention. It has no mask function: windows are applied here."""
NO_EFFECT = {"dropout", "position_ids", "use_cache", "cache_position", "output_attentions", "is_causal"}
"""Arguments that models give to their attention and that change nothing here."""


def attend_pages(
    view: View,
    q: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    tables: Tensor,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Attention of the rows of a view to the pages of their spans, which hold their own keys and values already.

    Args:
        q: (rows, heads, head_dim).
        key_pages, value_pages: (pages, page_tokens, kv_heads, head_dim).
        tables: (spans, n) int64, the pages of each span at this visit.
        scale: multiplies q · k.
        window: tokens that a query sees, itself included; None is all.
        softcap: bound of the scores, by a tanh; None is none.

    Returns:
        (rows, heads, head_dim).
    """

    def attend(rows: Tensor, tables: Tensor, lengths: Tensor) -> Tensor:
        return paged_attention(
            rows.unsqueeze(1), key_pages, value_pages, tables, lengths, scale=scale, window=window, softcap=softcap
        ).squeeze(1)

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
            scale=scale,
            window=window,
            softcap=softcap,
        )

    if len(view.prompts) == 1 and not len(view.decodes):
        return attend_prompt(view.prompts[0])
    out = torch.empty_like(q)
    if len(view.decodes):
        out[view.decode_rows] = attend(
            q[view.decode_rows], tables[view.decodes, : view.decode_pages], view.lengths[view.decodes]
        )
    for prompt in view.prompts:
        out[prompt.start : prompt.stop] = attend_prompt(prompt)
    return out


def register_attention() -> None:
    """Has `transformers` find lorarep's attention by its name, in the whole process.

    The libraries that models and attention are made of are imported for it, which takes seconds.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, _attention)
    if torch.cuda.is_available():
        varlen_attention()


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    walk: Walk,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The attention function of `transformers`: (1, heads, rows, head_dim) in, (1, rows, heads, head_dim) out.

    Raises:
        FailedPrecondition: the model wants something of its attention that pages cannot give.
    """
    unknown = [name for name, given in others.items() if name not in NO_EFFECT and given is not None]
    if attention_mask is not None or unknown or not getattr(module, "is_causal", True):
        wanted = ", ".join(unknown) or "a mask of its own"
        raise FailedPrecondition(
            f"{type(module).__name__} wants {wanted}, which paged attention does not know", field="base"
        )
    out = walk.attend(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=sliding_window,
        softcap=softcap,
    )
    return out.unsqueeze(0), None
