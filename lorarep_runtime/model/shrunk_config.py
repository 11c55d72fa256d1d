"""Configs of small models of a base's family: few layers, few heads, and narrow feed-forward layers."""

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
WIDTHS = ("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner", "d_ff")
"""How the names of inner widths end."""
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""Names of the number of experts."""
SPECIAL_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id")


def shrunk_configs(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    """Configs with ever fewer fields shrunk: in some families other fields depend on those.

    Heads keep their dimension, so all that rotary embeddings say about it still fits.
    """
    for fields in ((_shrink_heads, _shrink_widths), (_shrink_heads,), (_shrink_widths,), ()):
        whole = copy.deepcopy(config)
        text: Any = whole.get_text_config()
        if hasattr(whole, "quantization_config"):
            del whole.quantization_config
        _shrink_layers(text)
        _shrink_vocabulary(text)
        if getattr(text, "sliding_window", None):
            text.sliding_window = min(text.sliding_window, WINDOW)
        for shrink in fields:
            shrink(text)
        yield whole


def _shrink_layers(text: Any) -> None:
    """Keeps the first layer of each kind, and the first ones of all."""
    kinds: dict[str, int] = {}
    names = per_layer_fields(text)
    for layer in range(text.num_hidden_layers):
        kinds.setdefault(repr([getattr(text, name)[layer] for name in names]), layer)
    first = [*range(min(LAYERS, text.num_hidden_layers))]
    choose_layers(text, sorted({*first, *list(kinds.values())[:LAYERS]}))


def _shrink_vocabulary(text: Any) -> None:
    text.vocab_size = min(text.vocab_size, VOCAB)
    for name in SPECIAL_TOKENS:
        if isinstance(token := getattr(text, name, None), int) and token >= text.vocab_size:
            setattr(text, name, text.vocab_size - 1)


def _shrink_heads(text: Any) -> None:
    heads = text.num_attention_heads
    if heads <= HEADS:
        return
    kv_heads = getattr(text, "num_key_value_heads", None)
    # A multiple of 16, as products of experts need it, where the dimension of heads is a field of its own.
    text.hidden_size = round_up(text.hidden_size * HEADS // heads, 1 if text.hidden_size % heads == 0 else 16)
    text.num_attention_heads = HEADS
    if kv_heads:
        text.num_key_value_heads = HEADS if kv_heads == heads else min(kv_heads, HEADS // 2)


def _shrink_widths(text: Any) -> None:
    for name, value in list(vars(text).items()):
        if name.endswith(WIDTHS) and (value is None or isinstance(value, int)):
            setattr(text, name, min(value or WIDTH, WIDTH))
    chosen = getattr(text, "num_experts_per_tok", None)
    if not chosen or (getattr(text, "n_group", None) or 1) > 1:  # groups divide the experts
        return
    for name in EXPERTS:
        if experts := getattr(text, name, None):
            setattr(text, name, min(experts, 2 * chosen))
