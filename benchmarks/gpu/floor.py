"""The floor of a decoding step: the bytes that it reads, and the bandwidth that a copy reaches."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import torch

from lorarep_runtime.config import PAGE_TOKENS
from lorarep_runtime.engine.engine import Engine
from lorarep_runtime.model.plan import merge


def floor_bytes(engine: Engine, names: Sequence[str], tokens: int) -> int:
    """Bytes that a step reads: its plan's weights, all adapters, each row's keys and values.

    Args:
        names: each row's adapter, or its stack if it has none.
        tokens: context length of each row.
    """
    stacks = [engine.stacks[name] if name in engine.stacks else engine.adapters.get(name).stack for name in names]
    plan = merge(tuple(sorted(set(stacks))))
    adapters = sum(engine.adapters.get(name).bytes for name in set(names) if name not in engine.stacks)
    keys = sum(len(stack) for stack in stacks) * tokens * token_bytes(engine)
    return weight_bytes(engine, [visit.layer for visit in plan.visits]) + adapters + keys


def token_bytes(engine: Engine) -> int:
    """Bytes of keys and values of one token at one position."""
    base = engine.base
    return base.kv_shape.page_bytes(base.dtype) // PAGE_TOKENS


def weight_bytes(engine: Engine, stack: Sequence[int]) -> int:
    """Bytes of the weights of all layers in the stack, and of the head."""
    layers = [sum(t.nbytes for w in layer.values() for t in (*w.data, *w.constants)) for layer in engine.base.weights]
    return sum(layers[i] for i in stack) + engine.base.model.get_output_embeddings().weight.nbytes


def copy_bandwidth(device: str) -> float:
    """Bytes read and written a second by a copy of 1 GiB."""
    source = torch.empty((1 << 30) if device == "cuda" else (1 << 27), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(10):
        if device == "cuda":
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
            target.copy_(source)
            after.record()
            torch.cuda.synchronize()
            seconds.append(before.elapsed_time(after) / 1e3)
        else:
            began = time.perf_counter()
            target.copy_(source)
            seconds.append(time.perf_counter() - began)
    return 2 * source.nbytes / statistics.median(seconds)
