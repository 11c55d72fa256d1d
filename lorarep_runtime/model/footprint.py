"""The memory that a base and its sequences take, from the base's config alone. No weight is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PretrainedConfig

from lorarep_runtime.config import Quantization
from lorarep_runtime.integers import ceil_div
from lorarep_runtime.model.adapted_ends import ends_of
from lorarep_runtime.model.experts import adaptable_parameters
from lorarep_runtime.model.form import Ends, ParameterShape
from lorarep_runtime.model.kv_cache import pages_of
from lorarep_runtime.model.layer_walk import find_layers
from lorarep_runtime.model.linear import linear_shapes, straighten
from lorarep_runtime.model.model_config import kv_shape, model_class

NF4_BLOCK = 64
"""Weights that share a scale."""
NF4_CODES = 16
"""Values that a 4-bit weight can have."""
NESTED_BLOCK = 256
"""Scales that share a scale under double quantization."""
NESTED_CODES = 256
"""Values that a scale can have under double quantization."""
FP32 = 4
"""Bytes of an fp32 number."""


@dataclass(frozen=True)
class Footprint:
    """The sizes of a base before it is loaded."""

    parameters: int
    """Numbers of the unquantized model."""
    stored_elements: int
    """Numbers that are held for the parameters: two 4-bit parameters are one byte."""
    categories: Mapping[str, int]
    """Bytes by their use: base_weights, quantization_constants, embeddings_and_head and workspace."""
    layer_modules: Sequence[Mapping[str, tuple[int, int]]]
    """For each layer (out, in) of its linear modules, by their paths there."""
    layer_parameters: Sequence[Mapping[str, ParameterShape]]
    """For each layer the parameters of experts and routers that adapters may adapt on a CPU."""
    prefix: str
    """Path of the list of layers, such as "model.layers"."""
    dtype: torch.dtype
    """The dtype of activations and of all weights that are not quantized."""
    ends: Ends
    """The head and the embedding that adapters may adapt on a CPU."""
    family: str
    """`model_type` of the base's config."""
    page_bytes: int
    """Bytes of the keys and values of 16 tokens at one position."""

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return len(self.layer_modules)

    @property
    def total(self) -> int:
        """Bytes of the base, without adapters, keys and values."""
        return sum(self.categories.values())

    def kv_bytes(self, positions: int, tokens: int) -> int:
        """Bytes of the keys and values of a sequence, in whole pages."""
        return positions * pages_of(tokens) * self.page_bytes

    def sequences(self, memory: int, adapters: int, positions: int, tokens: int) -> int:
        """How many sequences fit together with the base and its adapters.

        Args:
            memory: bytes of the device.
            adapters: bytes of the adapters.
            positions: of the stack of each sequence.
            tokens: of each sequence.
        """
        return max(0, (memory - self.total - adapters) // self.kv_bytes(positions, tokens))


def footprint(
    config: PretrainedConfig, quantization: BitsAndBytesConfig | None, dtype: torch.dtype | None = None
) -> Footprint:
    """Counts the memory that a `Base` of some config will hold.

    Args:
        quantization: the checkpoint's own, or the one that it will be quantized with.
        dtype: of everything that is not quantized; None is the config's, or fp32 where the config names none.
    """
    dtype = dtype or getattr(config, "dtype", None) or torch.float32
    with torch.device("meta"):
        model: Any = model_class(config).from_config(config, dtype=dtype, attn_implementation="eager")
    layers, prefix = find_layers(model)
    for layer in layers:
        straighten(layer)
    head = model.get_output_embeddings()
    vocabulary = {id(p): p for p in (*model.get_input_embeddings().parameters(), *head.parameters())}
    quantized = {
        id(m.weight): m.weight
        for m in model.modules()
        if quantization is not None and isinstance(m, nn.Linear) and m is not head
    }
    parameters = {id(p): p for p in model.parameters()}
    rest = [p for key, p in parameters.items() if key not in vocabulary and key not in quantized]
    kind = quantization_kind(quantization)
    double = quantization is not None and quantization.bnb_4bit_use_double_quant
    packed = {key: ceil_div(p.numel(), 2) if kind == "nf4" else p.numel() for key, p in quantized.items()}
    return Footprint(
        parameters=sum(p.numel() for p in parameters.values()),
        stored_elements=sum(packed.get(key, p.numel()) for key, p in parameters.items()),
        categories={
            "base_weights": sum(packed.values()) + _bytes(rest),
            "quantization_constants": sum(_constants(p, kind, double) for p in quantized.values()),
            "embeddings_and_head": _bytes(vocabulary.values()),
            "workspace": _bytes({id(b): b for b in model.buffers()}.values()),
        },
        layer_modules=[linear_shapes(layer) for layer in layers],
        layer_parameters=[adaptable_parameters(layer) for layer in layers],
        prefix=prefix,
        dtype=dtype,
        ends=ends_of(model),  # a CPU's: a GPU refuses adapters of them
        family=config.model_type,
        page_bytes=kv_shape(config).page_bytes(dtype),
    )


def quantization_kind(quantization: BitsAndBytesConfig | None) -> Quantization:
    """The name that lorarep has for a quantization of bitsandbytes."""
    if quantization is None:
        return "none"
    return "nf4" if quantization.load_in_4bit else "int8"


def _constants(weight: Tensor, kind: Quantization, double: bool) -> int:
    """Bytes of the constants that bitsandbytes holds for a quantized weight (out, in).

    Args:
        double: whether NF4's scales are quantized too.
    """
    if kind == "int8":
        return FP32 * weight.shape[0]
    blocks = ceil_div(weight.numel(), NF4_BLOCK)
    if not double:
        return FP32 * (blocks + NF4_CODES)
    # A byte for each scale; the scales' mean, their own scales, and two tables of codes.
    return blocks + FP32 * (1 + ceil_div(blocks, NESTED_BLOCK) + NESTED_CODES + NF4_CODES)


def _bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
