"""The reference that lorarep's walk is compared with: a `transformers` model whose layers are copied in stack order."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PretrainedConfig

from lorarep_runtime.model.layer_walk import find_layers


def stacked(model: Any, stack: Sequence[int]) -> Any:
    """Replaces a model's layers with copies in stack order, and returns the model. Copies share their weights."""
    config = model.config.get_text_config()
    layers, path = find_layers(model)
    copies = []
    for position, layer in enumerate(stack):
        shared = {id(tensor): tensor for tensor in (*layers[layer].parameters(), *layers[layer].buffers())}
        copied = copy.deepcopy(layers[layer], shared)
        for module in copied.modules():
            for name in ("layer_idx", "layer_id"):
                if hasattr(module, name):
                    object.__setattr__(module, name, position)
        copies.append(copied)
    model.set_submodule(path, nn.ModuleList(copies))
    choose_layers(config, stack)
    return model


def choose_layers(config: PretrainedConfig, layers: Sequence[int]) -> None:
    """Changes a config to one of a model with these of its layers, in this order."""
    for name in per_layer_fields(config):
        values = getattr(config, name)
        setattr(config, name, [values[layer] for layer in layers])
    config.num_hidden_layers = len(layers)


def per_layer_fields(config: PretrainedConfig) -> list[str]:
    """Names of the lists in a config that hold one value for each layer, such as "layer_types"."""
    count = config.num_hidden_layers
    return [
        name
        for name, value in vars(config).items()
        if isinstance(value, list) and len(value) == count and ("layer" in name or count > MOST_OTHERS)
    ]


MOST_OTHERS = 8
"""Items of a list that is about something other than layers, such as end tokens or the names of classes."""
