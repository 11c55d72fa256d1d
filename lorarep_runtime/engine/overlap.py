"""Decoding steps in flight: launched, and read only after the next one has been, so that the device never waits."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lorarep_runtime.config import PAGE_TOKENS
from lorarep_runtime.device.timer import DeviceTimer
from lorarep_runtime.engine.sampler import Sampled, choose, is_plain, sample
from lorarep_runtime.engine.scheduler import Scheduler
from lorarep_runtime.engine.sequence import Sequence
from lorarep_runtime.model.base import Base
from lorarep_runtime.model.kv_cache import PagePool

if TYPE_CHECKING:
    from lorarep_runtime.gpu.decoder import Decoder


AHEAD = PAGE_TOKENS // 2
"""Tokens for which pages are taken where there is time."""


class LaunchedStep:
    """A decoding step that has been launched and not been read."""

    def __init__(
        self,
        sequences: Seq[Sequence],
        launch: Callable[[], tuple[Tensor, Tensor]],
        device: torch.device,
        *,
        unread: int,
    ) -> None:
        """
        Args:
            launch: as `Decoder.step`.
            unread: how many steps of these sequences have been launched and not been read.
        """
        self.sequences = sequences
        self._ended: list[Sequence] = []
        self.is_plain = all(is_plain(s.sampler) and s.request.logprobs is None for s in sequences)
        """Whether its tokens are chosen without a look at those before, and are all that is wanted."""
        self._watch = DeviceTimer(device)
        tokens, self._logits = launch()
        if self.is_plain:
            choose(tokens, self._logits, [s.sampler for s in sequences], unread=unread)
            self._tokens = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=tokens.is_cuda)
            self._tokens.copy_(tokens, non_blocking=True)
        self._watch.stop()

    @property
    def milliseconds(self) -> float | None:
        """That the device took; None before it has been read."""
        return self._watch.milliseconds

    def sampled(self) -> list[tuple[Sequence, Sampled]]:
        """Waits for the sequences' next tokens. Before the next step is launched, unless it is plain."""
        if not self.is_plain:
            return list(zip(self.sequences, sample(self._logits, [s.sampler for s in self.sequences]), strict=True))
        self._watch.wait()
        return [(s, Sampled(t, None)) for s, t in zip(self.sequences, self._tokens.tolist(), strict=True)]

    def end(self, sequence: Sequence) -> None:
        """One of its sequences has ended before it was read."""
        self._ended.append(sequence)

    def give_back(self) -> None:
        """Releases the adapters of sequences that ended meanwhile. Only once it has been read."""
        while self._ended:
            self._ended.pop().lease.release()


class StepOverlap:
    """The decoder and its step in flight. The engine's thread alone touches it."""

    def __init__(self, decoder: Decoder | None, scheduler: Scheduler) -> None:
        self.decoder = decoder
        """None where all sequences go through the base's own layers."""
        self._scheduler = scheduler
        self.under_way: LaunchedStep | None = None
        """A plain one, whose sequences are all that were scheduled."""

    def release(self, sequence: Sequence) -> None:
        """Gives back what a sequence that has ended computed with, but not from under a step that still reads it."""
        if self.under_way is not None and sequence in self.under_way.sequences:
            self.under_way.end(sequence)
        else:
            sequence.lease.release()

    def divide(self, chosen: Seq[tuple[Sequence, int]]) -> tuple[list[Sequence], list[tuple[Sequence, int]]]:
        """The sequences that the decoder takes, and the others with how many of their tokens to compute."""
        decoding = [s for s, _ in chosen if self.decoder is not None and s.computed and s.remaining == 1]
        return decoding, [(s, count) for s, count in chosen if s not in decoding]

    def launch(self, sequences: Seq[Sequence]) -> LaunchedStep:
        """Launches a step for sequences that decode."""
        assert self.decoder is not None
        self.decoder.set_rows([sequence.span(1) for sequence in sequences])
        return self._launch(sequences, unread=0)

    def go_on(self, flight: LaunchedStep, *, at_leisure: bool = False) -> LaunchedStep | None:
        """Launches the next step of the same rows before the tokens of this one are read, if it can be.

        Args:
            at_leisure: whether there is time to take pages before they are wanted, so that later steps need not.
        """
        return self._launch(flight.sequences, unread=1) if self._may_go_on(flight.sequences, at_leisure) else None

    def _may_go_on(self, sequences: Seq[Sequence], at_leisure: bool) -> bool:
        """Whether they are all that would be scheduled; takes the pages that their next tokens want."""
        scheduler, pool = self._scheduler, self._scheduler.pool
        if sum(s not in scheduler.computing for s in scheduler.running) != len(sequences) or scheduler.can_admit:
            return False
        if any(s not in scheduler.running or s.new_tokens + 2 > s.request.stopping.max_new_tokens for s in sequences):
            return False
        soon = (AHEAD, 1) if at_leisure else (1,)
        if not any(pool.grow([(s.table, min(s.computed + n, s.most_computed)) for s in sequences]) for n in soon):
            return False
        assert self.decoder is not None
        self.decoder.set_pages()
        return True

    def _launch(self, sequences: Seq[Sequence], *, unread: int) -> LaunchedStep:
        assert self.decoder is not None
        flight = LaunchedStep(sequences, self.decoder.step, self._scheduler.pool.key_pages.device, unread=unread)
        for sequence in sequences:
            sequence.computed += 1
        return flight


def decoder_for(base: Base, pool: PagePool, max_sequences: int, max_tokens: int) -> Decoder | None:
    """Kernels for decoding, where the base and its device have them."""
    if base.device.type != "cuda":
        return None
    from lorarep_runtime.gpu.decoder import Decoder, can_decode  # imports triton

    return Decoder(base, pool, max_sequences, max_tokens) if can_decode(base) else None
