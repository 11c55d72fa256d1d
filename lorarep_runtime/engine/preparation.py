"""What a process does to its device before the first step: each rank's process the same."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from typing import NamedTuple

import psutil
import torch

from lorarep_runtime.adapters.compile import load_kernels
from lorarep_runtime.engine.overlap import StepDecoder
from lorarep_runtime.engine.paths import paths_of
from lorarep_runtime.errors import FailedPrecondition
from lorarep_runtime.kernels.hopper.packed_weight import PackedWeight
from lorarep_runtime.model.base import Base
from lorarep_runtime.model.kv_cache import PagePool
from lorarep_runtime.model.packed import PackedPart
from lorarep_runtime.model.stack import Stack
from lorarep_runtime.model.weights import Weight
from lorarep_runtime.progress import Progress

log = logging.getLogger(__name__)


class DecoderSizes(NamedTuple):
    """What the steps of a decoder have room for."""

    max_sequences: int
    """Most sequences of a step."""
    max_tokens: int
    """Most tokens of a sequence."""
    max_pages: int
    """Most pages of a sequence at each of its positions."""
    deterministic: bool = False
    """Whether each row is computed bitwise the same, whatever other rows there are."""


def prepare_device(base: Base) -> None:
    """Loads the kernels that loads of adapters use, before the KV pages take the rest of the memory."""
    if base.device.type != "cuda":
        return
    from lorarep_runtime.gpu.warm_up import prepare_device

    prepare_device(base.device, lambda: load_kernels(base.norm_terms, base.held_layer_modules, base.dtype, base.device))


def free_bytes(base: Base) -> int:
    """Bytes of the device that nothing has taken; on a CPU, those of the whole machine."""
    if base.device.type != "cuda":
        return psutil.virtual_memory().available
    return torch.cuda.mem_get_info(base.device)[0]


def make_decoder(
    base: Base,
    pool: PagePool,
    sizes: DecoderSizes,
    stacks: Collection[Stack],
    max_rank: int,
    progress: Progress | None = None,
) -> StepDecoder | None:
    """The captured decode steps of stacks, where the base and its device have kernels for them, and None elsewhere.

    Args:
        stacks: those whose steps are captured now.
        max_rank: largest rank of an adapter.
        progress: told of graphs, as stage "capture".

    Raises:
        FailedPrecondition: the base cannot be deterministic on its device.
    """
    for line in paths_of(base):
        log.info(line)
    if base.device.type != "cuda":
        return None
    from lorarep_runtime.gpu.decoder import Decoder, can_decode  # imports triton
    from lorarep_runtime.gpu.warm_up import warm_up

    if sizes.deterministic and not (can_decode(base) and all(map(_is_deterministic, base.weights))):
        raise FailedPrecondition(
            "on accelerators it takes a Hopper GPU and a base of the Llama kind in bfloat16, plain, in int8, or in NF4",
            field="deterministic",
        )
    if not can_decode(base):
        return None
    decoder = Decoder(base, pool, *sizes)
    warm_up(decoder, stacks, max_rank, progress)
    return decoder


def _is_deterministic(weights: Mapping[str, Weight]) -> bool:
    """Whether all of a layer's weights have kernels whose sums have one order for any number of rows."""
    return all(isinstance(w, PackedPart) and isinstance(w.packed, PackedWeight) for w in weights.values())
