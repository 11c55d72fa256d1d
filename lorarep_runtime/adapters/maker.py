"""Makes adapters on the device: from their files, from others, and from copies in another memory."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from lorarep_runtime.adapters.compile import Sharing, compile_adapter
from lorarep_runtime.adapters.header import Header
from lorarep_runtime.adapters.mixing import mix_adapters
from lorarep_runtime.adapters.peft_config import MATCHING_SECONDS, AdapterConfig
from lorarep_runtime.adapters.weights_file import WeightsFile
from lorarep_runtime.model.base import Base
from lorarep_runtime.model.compiled_adapter import Adapter, Layout, copied_to, storage_bytes
from lorarep_runtime.model.stack import Stack
from lorarep_runtime.progress import Progress


@dataclass(frozen=True)
class Source:
    """Checked files, as they are compiled."""

    weights: WeightsFile
    config: AdapterConfig
    header: Header
    layout: Layout
    stack: Stack
    """The stack that the weights are for."""


class AdapterMaker:
    """Makes adapters of one base, in the calling thread. Thread-safe."""

    def __init__(self, base: Base) -> None:
        self.base = base

    def size(self, layout: Layout) -> int:
        """Bytes that an adapter takes on the device, of several on each of them."""
        shard = self.base.shard
        return storage_bytes(layout if shard is None else shard.cut.layout(layout), self.base.dtype)

    def compile(self, source: Source, progress: Progress | None, sharing: Sharing | None = None) -> Adapter:
        """Compiles checked files onto the base's device. Raises as `compile_adapter`."""
        return compile_adapter(
            source.weights,
            # Its patterns get their time anew: it may have waited since the check.
            replace(source.config, deadline=time.monotonic() + MATCHING_SECONDS),
            source.header,
            source.layout,
            source.stack,
            prefix=self.base.prefix,
            modules=tuple(self.base.modules),
            norm_terms=self.base.norm_terms,
            dtype=self.base.dtype,
            device=self.base.device,
            sharing=sharing,
            progress=progress,
        )

    def mix(self, parts: Sequence[tuple[Adapter, float]]) -> Adapter:
        """One adapter of several. Raises as `mix_adapters`."""
        return mix_adapters(parts, tuple(self.base.modules))

    def copy(self, adapter: Adapter, device: torch.device) -> Adapter:
        """A copy in another memory, as `copied_to`."""
        return copied_to(adapter, device)
