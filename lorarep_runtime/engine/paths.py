"""Which code computes each part of a base, and why no faster one does: for the log at start."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import torch

from lorarep_runtime.kernels.gemms import gemms_for
from lorarep_runtime.kernels.hopper.packed_weight import PackedWeight
from lorarep_runtime.model.base import Base
from lorarep_runtime.model.packed import PACKED_MODULES, PackedPart, obstacle
from lorarep_runtime.model.weights import Weight


def paths_of(base: Base) -> Iterator[str]:
    """A line for steps and prompts, and one for the products of each kind with the base's weights."""
    slower = _layers_obstacle(base)
    if slower is None:
        yield "steps and prompts: captured graphs and sliced passes of kernels for whole layers"
    else:
        yield f"steps and prompts: the layers of transformers; not captured, because {slower}"
    found = Counter(_product(name, weight, base.dtype) for layer in base.weights for name, weight in layer.items())
    for product, count in found.items():
        yield f"products of {count} weights: {product}"


def _layers_obstacle(base: Base) -> str | None:
    if base.device.type != "cuda":
        return f"the device is a {base.device.type.upper()}"
    from lorarep_runtime.gpu.decoder import decode_obstacle  # imports triton

    return decode_obstacle(base)


def _product(name: str, weight: Weight, dtype: torch.dtype) -> str:
    """The code that multiplies with a weight.

    Args:
        name: path of its module in the layer.
        dtype: of the activations.
    """
    if isinstance(weight, PackedPart):
        if isinstance(weight.packed, PackedWeight):
            return "kernels for Hopper"
        return f"portable kernels; not Hopper's, because {gemms_for(weight.data[0].device, dtype).reason}"
    slower = obstacle(weight, dtype)
    if slower is None:
        known = any(name in names for names in PACKED_MODULES)
        slower = "modules that read the same input differ" if known else f"{name} is no module of Llama's"
    return f"a library; no kernels, because {slower}"
