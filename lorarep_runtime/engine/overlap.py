"""Overlapped decode steps: the next one is launched before the last one's tokens are read. The device never waits."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Seq
from typing import Protocol

from torch import Tensor

from lorarep_runtime.config import PAGE_TOKENS
from lorarep_runtime.engine.launched_step import LaunchedStep
from lorarep_runtime.engine.prefill_pass import Forward
from lorarep_runtime.engine.scheduler import Scheduler
from lorarep_runtime.engine.sequence import Sequence
from lorarep_runtime.failpoints import failpoint
from lorarep_runtime.model.batch import Batch, Span

AHEAD = PAGE_TOKENS // 2
"""Number of tokens for which pages are taken early where there is time."""


class StepDecoder(Protocol):
    """Decode steps of one new token for each row, and prefill passes; `gpu.decoder.Decoder` is one."""

    def set_rows(self, spans: Seq[Span], /) -> None:
        """Sets the rows of the steps to come. Each span is one token."""

    def set_pages(self) -> None:
        """Takes in the pages that the rows' page tables have got since."""

    def step(self) -> tuple[Tensor, Tensor]:
        """Launches a step of the rows, each one token longer than in the step before.

        Returns:
            The likeliest next tokens (rows) int64, and fp32 logits (rows, vocab). The next step reads its tokens from
            the first one, and overwrites both.
        """

    def prefill(self, batch: Batch, /) -> Forward:
        """A forward pass over prompts, which decode steps may interrupt."""

    def tensors(self) -> Seq[Tensor]:
        """All tensors that are kept from one step to the next."""


class StepOverlap:
    """The decoder and its pending step. The step loop's thread alone touches it."""

    def __init__(self, decoder: StepDecoder | None, scheduler: Scheduler) -> None:
        self.decoder = decoder
        """None where all sequences go through the base's own layers."""
        self._scheduler = scheduler
        self._device = scheduler.pool.key_pages.device
        self.pending: LaunchedStep | None = None
        """A step that has not been read. Its sequences are all that were scheduled to decode."""

    def divide(self, chosen: Iterable[tuple[Sequence, int]]) -> tuple[list[Sequence], list[tuple[Sequence, int]]]:
        """Divides scheduled sequences among the decoder and the prefill pass.

        Returns:
            The sequences that the decoder takes, and the others with the number of their tokens to compute.
        """
        decoding: list[Sequence] = []
        rest: list[tuple[Sequence, int]] = []
        for sequence, count in chosen:
            if self.decoder is not None and sequence.computed and sequence.remaining == 1:
                decoding.append(sequence)
            else:
                rest.append((sequence, count))
        return decoding, rest

    def launch(self, sequences: Seq[Sequence]) -> None:
        """Launches a step of sequences that decode, which is pending then."""
        failpoint("forward")
        assert self.decoder is not None
        self.decoder.set_rows([sequence.span(1) for sequence in sequences])
        self.pending = LaunchedStep(sequences, self.decoder.step, self._device, unread=0)

    def take_pending(self) -> LaunchedStep:
        """The pending step, for its reader. None is pending afterwards."""
        assert self.pending is not None
        step, self.pending = self.pending, None
        return step

    def go_on(self, step: LaunchedStep, *, has_time: bool) -> bool:
        """Launches the next step of the same sequences, if it can be, before the tokens of `step` are read.

        Args:
            step: a plain one.
            has_time: whether there is time to take pages early, so that later steps need not.

        Returns:
            Whether the next step is pending now.
        """
        failpoint("forward")
        assert self.decoder is not None
        if not self._can_go_on(step.sequences) or not self._take_pages(step.sequences, early=has_time):
            return False
        self.decoder.set_pages()
        self.pending = LaunchedStep(step.sequences, self.decoder.step, self._device, unread=1)
        return True

    def _can_go_on(self, sequences: Seq[Sequence]) -> bool:
        """Whether the sequences are all that would be scheduled, and none of them ends with the token to come."""
        return self._scheduler.would_choose_only(sequences) and all(
            s.new_tokens + 2 <= s.request.stopping.max_new_tokens for s in sequences
        )

    def _take_pages(self, sequences: Seq[Sequence], *, early: bool) -> bool:
        """Takes the pages of the next tokens: if `early`, and if there are as many, of the next AHEAD of each."""
        pool = self._scheduler.pool
        return any(
            pool.grow([(s.table, min(s.computed + tokens, s.most_computed)) for s in sequences])
            for tokens in ((AHEAD, 1) if early else (1,))
        )

    def release_adapter(self, sequence: Sequence) -> None:
        """Releases the adapter of a sequence that has ended, or has the pending step do so if it still reads it."""
        if self.pending is not None and sequence in self.pending.sequences:
            self.pending.keep_adapter(sequence)
        else:
            sequence.lease.release()

    def release_adapters(self) -> None:
        """Releases the adapters that the pending step keeps for sequences that have ended: it will not be read."""
        if self.pending is not None:
            self.pending.release_adapters()
