"""Engines on small bases, and requests for them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorarep_runtime.config import AdapterLimits, BaseConfig, EngineConfig, SchedulerConfig
from lorarep_runtime.engine.engine import Engine
from lorarep_runtime.request import Request, Sampling, Stopping

PROMPT = tuple((37 * i * i + 11) % 256 for i in range(20))


def engine_for(
    base: Path,
    quantization: str = "none",
    *,
    stacks: Mapping[str, tuple[int, ...]] | None = None,
    adapters: Mapping[str, Path] | None = None,
    limits: AdapterLimits | None = None,
    cache_dir: Path | None = None,
    ranks: int = 1,
    **scheduler: Any,
) -> Engine:
    """An fp32 engine on the CPU with adapters loaded under their names.

    Args:
        quantization: as the config's, or "nf4 twice" for double quantization.
    """
    kind, _, twice = quantization.partition(" ")
    engine = Engine(
        EngineConfig(
            base=BaseConfig(
                str(base),
                quantization=kind,
                double_quantization=bool(twice),
                dtype="float32",
                device="cpu",
                tensor_parallel=ranks,
                cache_dir=cache_dir,
            ),
            stacks=stacks or {},
            adapters=limits or AdapterLimits(),
            scheduler=SchedulerConfig(**{"kv_bytes": 64 << 20, **scheduler}),
        )
    )
    for name, folder in (adapters or {}).items():
        engine.adapters.load(name, str(folder), trusted=True)
    return engine


MIX_SECONDS = 20.0
"""Most seconds in which a mix is made."""


def greedy(prompt: tuple[int, ...] = PROMPT, new_tokens: int = 64) -> Request:
    return Request(prompt, stopping=Stopping(max_new_tokens=new_tokens, ignore_eos=True))


def sampled(seed: int, prompt: tuple[int, ...] = PROMPT, new_tokens: int = 16) -> Request:
    return Request(
        prompt,
        sampling=Sampling(temperature=0.9, top_k=40, top_p=0.95, repetition_penalty=1.1, seed=seed),
        stopping=Stopping(max_new_tokens=new_tokens),
    )


def assert_nothing_held(engine: Engine) -> None:
    """Every page and reference is back; those of a mix that nobody waits for any more, once it has been made."""
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.pages_used) == (0, 0, 0)
    end = time.monotonic() + MIX_SECONDS
    while held := [info.name for info in engine.adapters.list() if info.references]:
        assert time.monotonic() < end, held
        time.sleep(0.01)
