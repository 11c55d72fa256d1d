"""Prompts under way: their forward pass is taken a slice at a time where other sequences decode meanwhile."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import Protocol

import torch
from torch import Tensor

from lorarep_runtime.device.timer import DeviceTimer
from lorarep_runtime.engine.sampler import Sampled, sample
from lorarep_runtime.engine.sequence import Sequence
from lorarep_runtime.model.base import Base
from lorarep_runtime.model.batch import Batch
from lorarep_runtime.model.kv_cache import PagePool

SHARE = 0.55
"""Of a decoding step's time, what a slice beside it may take."""


class Forward(Protocol):
    """A forward pass over a batch; `prefill.Prefill` is one."""

    @property
    def left(self) -> int:
        """Steps that have not been launched."""

    def advance(self, steps: int) -> None:
        """Launches the next ones."""

    def logits(self, rows: Tensor) -> Tensor:
        """After the last one: fp32 logits (n, vocab) of rows, (n) int64."""


class WholeForward:
    """Through the base's own layers, at once."""

    left = 0

    def __init__(self, base: Base, pool: PagePool, batch: Batch) -> None:
        self._base, self._pool, self._batch = base, pool, batch

    def advance(self, steps: int) -> None: ...

    def logits(self, rows: Tensor) -> Tensor:
        return self._base.forward(self._batch, self._pool, rows)


class SlicePacer:
    """How many steps of a pass go beside a decoding step."""

    def __init__(self) -> None:
        self.decoding: float | None = None
        """Milliseconds of the last decoding step."""
        self._step: float | None = None
        self._slices: deque[tuple[int, DeviceTimer]] = deque()

    def steps(self) -> int:
        """As many as take SHARE of the decoding step's time; one until both have been measured."""
        while self._slices and (taken := self._slices[0][1].milliseconds) is not None:
            self._step = taken / self._slices.popleft()[0]
        if self.decoding is None or not self._step:
            return 1
        return max(1, int(self.decoding * SHARE / self._step))

    def slice(self, steps: int, watch: DeviceTimer) -> None:
        """Takes note of a slice of so many steps."""
        self._slices.append((steps, watch))


class PrefillPass:
    """Some sequences' next tokens on their way through the layers. Their adapters are theirs until it is over."""

    def __init__(self, chosen: Seq[tuple[Sequence, int]], pool: PagePool, forward: Callable[[Batch], Forward]):
        """
        Args:
            chosen: sequences, and how many of their tokens to compute.
        """
        self._pool = pool
        self.sequences = [sequence for sequence, _ in chosen]
        self._counts = [count for _, count in chosen]
        self.sampled: list[tuple[Sequence, Sampled]] | None = None
        """Once it is over, the sequences whose last token was among those, with their next one."""
        self._ended: list[Sequence] = []
        self._batch = Batch([sequence.span(count) for sequence, count in chosen], pool.key_pages.device)
        self._forward = forward(self._batch)

    def advance(self, steps: int | None, pace: SlicePacer) -> None:
        """Launches the next steps, None for all that are left; after the last one, samples."""
        left = self._forward.left
        if steps is not None and left:
            count = min(steps, left)
            watch = DeviceTimer(self._batch.device)
            self._forward.advance(count)
            watch.stop()
            pace.slice(count, watch)
        else:
            self._forward.advance(left)
        if not self._forward.left:
            self.sampled = self._sampled()

    def _sampled(self) -> list[tuple[Sequence, Sampled]]:
        ends = [int(self._batch.starts[k + 1]) - 1 for k in range(len(self.sequences))]
        ready = [
            (self.sequences[i], end)
            for i, end in zip(self._batch.order, ends, strict=True)
            if self.sequences[i].remaining == self._counts[i]
        ]
        rows = torch.tensor([row for _, row in ready], dtype=torch.int64, device=self._batch.device)
        # Also where no logits are wanted: the base's own layers are walked there.
        logits = self._forward.logits(rows)
        for sequence, count in zip(self.sequences, self._counts, strict=True):
            sequence.computed += count
        if not ready:
            return []
        sequences = [sequence for sequence, _ in ready]
        return list(zip(sequences, sample(logits, [s.sampler for s in sequences]), strict=True))

    def end(self, sequence: Sequence) -> None:
        """One of its sequences has ended before it: gives its pages back. The steps to come write elsewhere."""
        k = self._batch.order.index(self.sequences.index(sequence))
        rows = slice(int(self._batch.starts[k]), int(self._batch.starts[k + 1]))
        self._batch.slots[:, rows] = self._pool.spare_slot
        sequence.table.release()
        self._ended.append(sequence)

    @property
    def is_deserted(self) -> bool:
        """Whether nobody waits for it any more."""
        return len(self._ended) == len(self.sequences)

    def give_back(self, *, wait: bool = True) -> None:
        """Releases the adapters of sequences that ended meanwhile.

        Args:
            wait: for the device, which may still be reading the adapters.
        """
        if self._ended and wait and self._batch.device.type == "cuda":
            torch.cuda.current_stream(self._batch.device).synchronize()
        while self._ended:
            self._ended.pop().lease.release()
