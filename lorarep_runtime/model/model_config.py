"""Questions that a base's `transformers` config answers, before any weight is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    PretrainedConfig,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from lorarep_runtime.config import BaseConfig, Quantization
from lorarep_runtime.errors import FailedPrecondition, InvalidArgument, first_line, shown
from lorarep_runtime.model.kv_cache import KVShape

UNIFORM_ATTENTION = {"full_attention", "sliding_attention"}
"""Attention kinds whose keys and values can be paged; others keep state of another form."""


def read_model_config(folder: Path) -> PretrainedConfig:
    """The config of a base.

    Args:
        folder: with its config.json.

    Raises:
        FailedPrecondition: `transformers` cannot read it, or some layers have no keys and values to page, or have
            fields of their own.
    """
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        text = config.get_text_config()
    # A config is anybody's, and what each family's code raises over it cannot be known.
    except Exception as error:
        raise FailedPrecondition(f"transformers cannot read its config: {first_line(error)}", field="base") from error
    if (name := getattr(config, "transformers_weights", None)) is not None:
        raise FailedPrecondition(
            f"{shown(name)} in place of model.safetensors or its index is not supported", field="transformers_weights"
        )
    foreign = set(getattr(text, "layer_types", None) or ()) - UNIFORM_ATTENTION
    if foreign:
        raise FailedPrecondition(f"layer_types {sorted(foreign)} have no keys and values to page", field="base")
    if getattr(text, "is_heterogeneous", False):
        raise FailedPrecondition(
            "per_layer_config, which gives layers fields of their own, is not supported", field="base"
        )
    return config


def model_class(config: PretrainedConfig) -> Any:
    """The class of `transformers` that loads a base as a model of texts, or of texts and images.

    Raises:
        FailedPrecondition: there is none.
    """
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForCausalLM
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForImageTextToText
    raise FailedPrecondition(f"transformers has no causal model for the type {config.model_type!r}", field="base")


def quantization_of(model: PretrainedConfig, config: BaseConfig) -> tuple[Quantization, BitsAndBytesConfig | None]:
    """How a base's weights will be held, and the config that makes `transformers` quantize them.

    The latter is None where the checkpoint is quantized already or nothing is to be quantized.

    Raises:
        InvalidArgument: the wanted quantization is not the checkpoint's own, or its options do not go together.
        FailedPrecondition: the checkpoint is quantized in a way that lorarep does not read.
    """
    own = getattr(model, "quantization_config", None)
    if own is not None:
        return _own_quantization(own if isinstance(own, dict) else own.to_dict(), config), None
    if config.double_quantization and config.quantization != "nf4":
        raise InvalidArgument(f"goes with nf4, not with {config.quantization!r}", field="double_quantization")
    if config.quantization == "int8":
        return "int8", BitsAndBytesConfig(load_in_8bit=True)
    if config.quantization == "nf4":
        return "nf4", BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=config.double_quantization
        )
    return "none", None


def _own_quantization(own: dict[str, object], config: BaseConfig) -> Quantization:
    """The quantization of a checkpoint that is quantized already, whose config of it is `own`."""
    four, eight = (own.get(f"load_in_{bits}bit") or own.get(f"_load_in_{bits}bit") for bits in (4, 8))
    kind: Quantization = "nf4" if four else "int8"
    # As in transformers, older checkpoints of bitsandbytes name no method.
    method = own.get("quant_method") or ("bitsandbytes" if four or eight else None)
    if method != "bitsandbytes" or not (four or eight) or (four and own.get("bnb_4bit_quant_type") != "nf4"):
        said = {key: own[key] for key in ("quant_method", "bnb_4bit_quant_type") if key in own}
        raise FailedPrecondition(f"quantized as {shown(said)}, which lorarep does not read", field="base")
    if config.double_quantization and not own.get("bnb_4bit_use_double_quant"):
        raise InvalidArgument(
            "the checkpoint is quantized already, and its scales are not", field="double_quantization"
        )
    if config.quantization not in ("none", kind):
        raise InvalidArgument(f"{config.quantization!r}, but the checkpoint is {kind!r} already", field="quantization")
    return kind


LENGTHS = ("max_position_embeddings", "max_seq_len", "seq_length")
"""Names of the tokens of the longest sequence that a base was trained on."""
UNLIMITED = {"bloom": 2048}
"""Tokens of the longest sequence of families that compute any, and whose configs need not say it: as in training."""


def trained_tokens(config: PretrainedConfig) -> int:
    """Tokens of the longest sequence that a base serves.

    A rotary embedding that changes its frequencies past a length changes them for every sequence of a batch. Such a
    base is served up to that length, where each sequence has the frequencies that it has alone.

    Raises:
        FailedPrecondition: the config does not say it.
    """
    text = config.get_text_config()
    name = next((name for name in LENGTHS if getattr(text, name, None) is not None), None)
    limit = UNLIMITED.get(text.model_type, 0) if name is None else 0
    limit = limit or _number(text, name or LENGTHS[0])
    rope = getattr(text, "rope_parameters", None) or {}
    for parameters in [rope, *(v for v in rope.values() if isinstance(v, dict))]:
        if parameters.get("rope_type") in ("dynamic", "longrope"):
            limit = min(limit, parameters.get("original_max_position_embeddings") or limit)
    return limit


def kv_shape(config: PretrainedConfig) -> KVShape:
    """The shape of a base's keys and values.

    Raises:
        FailedPrecondition: the config does not say them.
    """
    text = config.get_text_config()
    heads = _number(text, "num_attention_heads")
    if rotated := getattr(text, "qk_rope_head_dim", None):  # DeepSeek's latent attention
        return KVShape(heads, _number(text, "qk_nope_head_dim") + rotated, _number(text, "v_head_dim"))
    kv_heads: int = getattr(text, "num_key_value_heads", None) or heads
    if getattr(text, "new_decoder_architecture", False):  # Falcon
        kv_heads = _number(text, "num_kv_heads")
    elif getattr(text, "multi_query", False):  # Falcon, GPTBigCode
        kv_heads = 1
    head_dim: int = getattr(text, "head_dim", None) or _number(text, "hidden_size") // heads
    return KVShape(kv_heads, head_dim, head_dim)


def _number(config: PretrainedConfig, name: str) -> int:
    found = getattr(config, name, None)
    if not isinstance(found, int) or found <= 0:
        raise FailedPrecondition(
            f"its config.json has no {name}, or {shown(found)}, which has to be a number above 0", field="base"
        )
    return found
