"""Small tensors on their way to the device."""

from __future__ import annotations

import torch
from torch import Tensor


def staged(values: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor as a `non_blocking` copy to a device wants it: out of pageable memory it would wait for the stream.

    The tensor may go before its copy is done. torch hands its pinned memory to nobody before the streams that copy from
    it have come that far (ATen/cuda/CachingHostAllocator.h); so every copy gets memory of its own here, and none is
    overwritten.
    """
    return values.pin_memory() if device.type == "cuda" else values


def moved(values: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor's values on a device, in the order of its stream, without a wait for what it does."""
    return staged(values, device).to(device, non_blocking=True)
