"""Attention of the families whose modules compute it themselves, in place of asking `transformers`' interface for it.

Such a module keeps its projections and its way of dividing them into heads. What lies between them is paged attention.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lorarep_runtime.kernels.eager.attention import Bias, Scores
from lorarep_runtime.model.layer_walk import walk_of
from lorarep_runtime.model.transformers_attention import ATTENTION

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def own_attention(config: PretrainedConfig) -> str | None:
    """The name of the attention of `transformers` that a base has to be made with; None is any."""
    own = _FAMILIES.get(config.get_text_config().model_type)
    return None if own is None else own.made_with


def take_attention(model: PreTrainedModel) -> bool:
    """Has the attention modules of a model compute over pages, if their family's compute by themselves.

    Args:
        model: as `transformers` has made it, with `own_attention`.

    Returns:
        Whether its layers return hidden states in a tuple. Those of other families may, and theirs are not asked.
    """
    own = _FAMILIES.get(model.config.get_text_config().model_type)
    if own is None:
        return False
    if not own.reads_mask:
        model.config.get_text_config()._attn_implementation = ATTENTION
    for module in model.modules():
        if type(module).__name__ == own.module:
            module.forward = partial(own.forward, module)
    return own.in_tuples


def _attend(module: Any, q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> Tensor:
    """(1, rows, heads, dim) each, to (1, rows, heads · dim)."""
    return walk_of(module).attend(q[0], k[0], v[0], scores).flatten(1).unsqueeze(0)


def _bloom(module: Any, hidden_states: Tensor, residual: Tensor, **_: Any) -> tuple[Tensor, None]:
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    q, k, v = (x.transpose(1, 2) for x in module._reshape(module.query_key_value(hidden_states)))
    bias = _alibi(build_alibi_tensor, q)
    return module.dense(_attend(module, q, k, v, Scores(module.inv_norm_factor, None, bias=bias))) + residual, None


def _falcon(
    module: Any,
    hidden_states: Tensor,
    alibi: Tensor | None,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    from transformers.models.falcon.modeling_falcon import apply_rotary_pos_emb, build_alibi_tensor

    q, k, v = module._split_heads(module.query_key_value(hidden_states))
    if module.new_decoder_architecture:  # which repeats each key head for its query heads
        k, v = (x[:, :, :: module.num_heads // module.num_kv_heads] for x in (k, v))
    scale, bias = module.inv_norm_factor, None
    if alibi is not None:
        bias = _alibi(build_alibi_tensor, q, scale)
    else:
        assert position_embeddings is not None
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings, unsqueeze_dim=2)
    return module.dense(_attend(module, q, k, v, Scores(scale, None, bias=bias))), None


def _gpt_neo(module: Any, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
    window = module.config.window_size if module.attention_type == "local" else None
    return _projected(module, hidden_states, Scores(1.0, window)), None


def _xglm(module: Any, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
    return _projected(module, hidden_states, Scores(module.scaling, None)), None


def _projected(module: Any, hidden_states: Tensor, scores: Scores) -> Tensor:
    q, k, v = (
        projection(hidden_states).unflatten(-1, (module.num_heads, module.head_dim))
        for projection in (module.q_proj, module.k_proj, module.v_proj)
    )
    out: Tensor = module.out_proj(_attend(module, q, k, v, scores))
    return out


def _mpt(module: Any, hidden_states: Tensor, position_bias: Tensor, **_: Any) -> tuple[Tensor, None]:
    projected = module.Wqkv(hidden_states)
    if module.clip_qkv:
        projected = projected.clamp(min=-module.clip_qkv, max=module.clip_qkv)
    q, k, v = (x.unflatten(-1, (module.n_heads, module.head_dim)) for x in projected.chunk(3, dim=2))

    def bias(tokens: int) -> Tensor:
        # By the distance from the last place; between two keys of one query that is the same difference.
        return -position_bias[:, 0, -2:-1] * torch.arange(tokens, device=q.device)

    return module.out_proj(_attend(module, q, k, v, Scores(module.softmax_scale, None, bias=bias))), None


def _alibi(build: Callable[..., Tensor], q: Tensor, scale: float = 1.0) -> Bias:
    """A family's own biases, as it rounds them.

    Args:
        build: from a mask (1, tokens), heads and dtype to (heads, 1, tokens).
        q: (1, rows, heads, dim).
    """

    def bias(tokens: int) -> Tensor:
        mask = torch.ones(1, tokens, dtype=torch.int64, device=q.device)
        return build(mask, q.shape[2], q.dtype)[:, 0].float() * scale

    return bias


class _Own(NamedTuple):
    module: str
    """Class of the attention modules."""
    forward: Callable[..., tuple[Tensor, None]]
    """What takes the place of their own."""
    made_with: str = "eager"
    """Name of the attention that they have to be made with."""
    in_tuples: bool = True
    """Whether layers return hidden states in a tuple."""
    reads_mask: bool = False
    """Whether the model computes with a mask before its layers, which otherwise is not made."""


_FAMILIES = {
    "bloom": _Own("BloomAttention", _bloom),
    "falcon": _Own("FalconAttention", _falcon, "sdpa"),  # its "eager" adds the biases of ALiBi twice
    "gpt_neo": _Own("GPTNeoSelfAttention", _gpt_neo),
    "mpt": _Own("MptAttention", _mpt, reads_mask=True),
    "xglm": _Own("XGLMAttention", _xglm, in_tuples=False),
}
"""By `model_type`."""
