"""The engine's configuration. The command line fills it from flags, environment and YAML."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Quantization = Literal["none", "nf4", "int8"]
DType = Literal["auto", "float32", "bfloat16", "float16"]

PAGE_TOKENS = 16
"""Tokens in a page of the KV cache."""


@dataclass(frozen=True)
class BaseConfig:
    """The base to load, and its form in memory."""

    base: str
    """Hub repository id, or folder, of a causal language model."""
    revision: str | None = None
    """Branch, tag or commit of `base`; None is the repository's default branch."""
    quantization: Quantization = "none"
    """Quantization of the layers' linear weights. A checkpoint that is already quantized keeps its own."""
    double_quantization: bool = False
    """Whether NF4's scales are quantized as well (QLoRA, section 3)."""
    dtype: DType = "auto"
    """Dtype of activations, adapters and unquantized weights; "auto" is the checkpoint's own."""
    device: str = "auto"
    """A torch device; "auto" is the first accelerator, if there is one, else the CPU."""
    tensor_parallel: int = 1
    """Ranks that share each layer, one process and one device each; 1 is this process alone."""
    cache_dir: Path | None = None
    """Hub cache; None is huggingface_hub's default."""


@dataclass(frozen=True)
class AdapterLimits:
    """Limits of adapters, checked before anything is allocated."""

    max_rank: int = 512
    """Largest rank of any module."""
    max_positions: int = 512
    """Most positions of an adapter's stack."""
    max_untrusted_positions: int | None = None
    """Most positions of the stack of an adapter that no operator named; None is four times the base's layers."""
    allow_repositories: tuple[str, ...] = ()
    """Shell patterns of the repositories that LoadAdapter and requests may name; empty allows none."""
    device_bytes: int | None = None
    """Most device bytes of all adapters together; None is no limit: adapters leave when the device is full."""
    host_bytes: int = 0
    """Most host bytes of the copies of adapters that had to leave the device."""
    disk_bytes: int | None = None
    """Most bytes of adapters in the Hub cache; None is no limit."""


@dataclass(frozen=True)
class SchedulerConfig:
    """Limits of a step, of the queue and of the KV cache."""

    max_sequences: int | None = None
    """Most sequences in one step.

    None is 32 on a CPU; on an accelerator as many, of up to 256, as the KV pages have room for at 1,024 tokens each.
    """
    max_step_tokens: int | None = None
    """Most tokens in one step: decoding rows first, prompts fill the rest.

    None is 2,048 on an accelerator, which dequantizes every weight once for each prefill pass, and 512 on a CPU.
    """
    chunked_prefill: bool = True
    """Whether a prompt may be computed in several steps."""
    max_queued: int = 1024
    """Most waiting requests. Another one is refused."""
    max_running_per_adapter: int | None = None
    """Most running sequences of one adapter, or of one set of adapters; None is no limit."""
    max_queued_per_adapter: int | None = None
    """Most waiting requests for one adapter, or one set of adapters; None is no limit. Another one is refused."""
    max_sequence_tokens: int | None = None
    """Most tokens of prompt and answer together; None is what the base was trained for."""
    prefix_cache: bool = True
    """Whether full pages are found again by requests that begin alike, on the same stack with the same adapters."""
    kv_bytes: int | None = None
    """Bytes for KV pages; None takes what is left on an accelerator, 1 GiB on a CPU."""

    @property
    def max_prompts(self) -> int:
        """Most prompts of a request with several: all are for the same adapters, and all may have to wait."""
        return min(self.max_queued, self.max_queued_per_adapter or self.max_queued)


@dataclass(frozen=True)
class EngineConfig:
    """All that an engine is constructed from."""

    base: BaseConfig
    stacks: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Named stacks, each a sequence of the base's layers."""
    adapters: AdapterLimits = AdapterLimits()
    scheduler: SchedulerConfig = SchedulerConfig()
    deterministic: bool = False
    """Whether a request's tokens are bitwise the same whatever else is computed, also in 16 bits and on a GPU."""
