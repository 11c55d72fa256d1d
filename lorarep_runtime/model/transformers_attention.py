"""The attention function that `transformers` calls: it hands queries, keys and values to the walk."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lorarep_runtime.errors import FailedPrecondition
from lorarep_runtime.kernels.eager.attention import Scores
from lorarep_runtime.model.layer_walk import walk_of

ATTENTION = "lorarep"
"""Name under which `transformers` finds lorarep's attention. It has no mask function: the walk applies windows."""
NO_EFFECT = {
    "dropout",
    "position_ids",
    "use_cache",
    "cache_position",
    "output_attentions",
    "is_causal",
    "logits_to_keep",
}
"""Arguments that models give to their attention and that change nothing here."""


def register_attention() -> None:
    """Has `transformers` find lorarep's attention by its name, in the whole process.

    The libraries that models are made of are imported for it, which takes seconds.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, _attention)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The attention function of `transformers`: (1, heads, rows, key_dim) in, (1, rows, heads, value_dim) out.

    Raises:
        FailedPrecondition: the model wants something of its attention that pages cannot give.
    """
    unknown = [
        name for name, given in others.items() if name not in NO_EFFECT and given is not None and given is not False
    ]
    if not getattr(module, "is_causal", True):
        raise FailedPrecondition(f"{type(module).__name__} attends to later tokens, too (is_causal)", field="base")
    if attention_mask is not None or unknown:
        wanted = ", ".join(unknown) or "a mask of its own"
        raise FailedPrecondition(
            f"{type(module).__name__} wants {wanted}, which paged attention does not know", field="base"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    out = walk_of(module).attend(q, k, v, Scores(scale, sliding_window, softcap, s_aux))
    return out.unsqueeze(0), None
