"""Configs of small models of a base's family: few layers, few heads, few experts, and narrow feed-forward layers."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from transformers import PretrainedConfig

from lorarep_runtime.integers import round_up
from lorarep_runtime.model.physical_stack import choose_layers, per_layer_fields

LAYERS = 4
"""Layers of a small model: families alternate kinds of layers by up to four."""
HEADS = 4
WIDTH = 64
"""Inner width of a feed-forward layer."""
VOCAB = 320
WINDOW = 8
"""Tokens of a sliding window."""
CHOSEN = 2
"""Experts that a token is given to."""
GROUPS = 2
"""Groups of experts, of which one is chosen from."""
WIDTHS = ("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner", "d_ff", "expert_dim")
"""How the names of inner widths end."""
KEY_HEADS = ("num_key_value_heads", "num_kv_heads")
"""Names of the number of key heads."""
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""Names of the number of experts."""
EXPERTS_CHOSEN = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_k", "num_experts_per_token")
"""Names of the number of experts that a token is given to."""
SPECIAL_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id")
DEPTHS = ("num_hidden_layers", "num_layers", "encoder_layers", "depth", "layers")
"""Names of the number of layers of encoders of images and sounds."""


def shrunk_configs(config: PretrainedConfig, layers: int = LAYERS) -> Iterator[PretrainedConfig]:
    """Configs with ever fewer fields shrunk: in some families other fields depend on those.

    Heads keep their dimension, so all that rotary embeddings say about it still fits.

    Args:
        config: of the whole base; it is not changed.
        layers: how many of the first layers stay.
    """
    for shrinks in ((_shrink_heads, _shrink_widths), (_shrink_heads,), (_shrink_widths,), ()):
        whole = copy.deepcopy(config)
        text: Any = whole.get_text_config()
        if hasattr(whole, "quantization_config"):
            del whole.quantization_config
        _shrink_layers(text, layers)
        _shrink_vocabulary(text)
        if getattr(text, "sliding_window", None):
            text.sliding_window = min(text.sliding_window, WINDOW)
        for shrink in shrinks:
            shrink(text)
        if whole is not text and _shrink_widths in shrinks:
            _shrink_widths(whole)
        for encoder in _encoders(whole, text):
            _shrink_vocabulary(encoder)
            _shrink_encoder(encoder)
            for shrink in shrinks:
                shrink(encoder)
        yield whole


def _shrink_layers(text: Any, count: int) -> None:
    """Keeps the first layers, and the first one of each kind that lists in the config tell apart."""
    kinds: dict[str, int] = {}
    names = per_layer_fields(text)
    for layer in range(text.num_hidden_layers):
        kinds.setdefault(repr([getattr(text, name)[layer] for name in names]), layer)
    first = range(min(count, text.num_hidden_layers))
    choose_layers(text, sorted({*first, *list(kinds.values())[:LAYERS]}))


def _shrink_vocabulary(config: Any) -> None:
    for name, value in list(vars(config).items()):
        if name.startswith("vocab_size") and isinstance(value, int):
            setattr(config, name, min(value, VOCAB))
    for name in SPECIAL_TOKENS:
        vocab = getattr(config, "vocab_size", None)
        if vocab and isinstance(token := getattr(config, name, None), int) and token >= vocab:
            setattr(config, name, vocab - 1)


def _shrink_heads(config: Any) -> None:
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int) or heads <= HEADS:
        return
    # A multiple of 16, as products of experts need it, where the dimension of heads is a field of its own.
    config.hidden_size = round_up(config.hidden_size * HEADS // heads, 1 if config.hidden_size % heads == 0 else 16)
    config.num_attention_heads = HEADS
    for name in KEY_HEADS:
        if kv_heads := getattr(config, name, None):
            setattr(config, name, HEADS if kv_heads == heads else min(kv_heads, HEADS // 2))


def _shrink_widths(config: Any) -> None:
    for name, value in list(vars(config).items()):
        if name.endswith(WIDTHS) and (value is None or isinstance(value, int)):
            setattr(config, name, min(value or WIDTH, WIDTH))
    _shrink_experts(config)


def _shrink_experts(config: Any) -> None:
    chosen = next((name for name in EXPERTS_CHOSEN if getattr(config, name, None)), None)
    if chosen is None:
        return
    setattr(config, chosen, min(getattr(config, chosen), CHOSEN))
    groups = 1
    if (getattr(config, "n_group", None) or 1) > 1:
        groups = config.n_group = GROUPS
        config.topk_group = 1
    for name in EXPERTS:
        if experts := getattr(config, name, None):
            setattr(config, name, min(experts, 2 * groups * CHOSEN))


def _encoders(config: Any, text: Any) -> Iterator[Any]:
    """The configs of parts that see no text."""
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if isinstance(part, PretrainedConfig) and part is not text:
            if text not in (getattr(part, inner, None) for inner in part.sub_configs):
                yield part
            yield from _encoders(part, text)


def _shrink_encoder(config: Any) -> None:
    for name in DEPTHS:
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, 1)
    # Qwen2-VL's embed_dim is the width of its layers, and its hidden_size that of the decoder.
    name = "embed_dim" if isinstance(getattr(config, "embed_dim", None), int) else "hidden_size"
    heads, width = getattr(config, "num_heads", None), getattr(config, name, None)
    if isinstance(heads, int) and isinstance(width, int) and heads > HEADS and width % heads == 0:
        config.num_heads = HEADS
        setattr(config, name, width // heads * HEADS)
