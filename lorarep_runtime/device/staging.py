"""Copies of small tensors to the device that wait for nothing."""

from __future__ import annotations

import torch
from torch import Tensor


def staged(values: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor in pinned memory for a `non_blocking` copy to a GPU. One from pageable memory waits for the stream.

    The tensor may be freed before its copy is done. torch does not reuse its pinned memory until the streams that copy
    from it have come that far (ATen/cuda/CachingHostAllocator.h). Each call allocates, so no copy is overwritten.
    """
    return values.pin_memory() if device.type == "cuda" else values


def moved(values: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor's values on a device. The copy is in the order of the current stream; the caller does not wait."""
    return staged(values, device).to(device, non_blocking=True)
