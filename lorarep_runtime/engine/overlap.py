"""Overlapped decode steps: the next one is launched before the last one's tokens are read. The device never waits."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Protocol

from torch import Tensor

from lorarep_runtime.config import PAGE_TOKENS
from lorarep_runtime.engine.launched_step import LaunchedStep
from lorarep_runtime.engine.prefill_pass import Forward
from lorarep_runtime.engine.scheduler import Scheduler, were_first
from lorarep_runtime.engine.sequence import Sequence
from lorarep_runtime.failpoints import failpoint
from lorarep_runtime.model.batch import Batch, Span
from lorarep_runtime.model.plan import Plan

Chosen = tuple[Sequence, int]
"""A sequence and the number of its next tokens to compute."""
PASS_TOKENS = 512
"""Tokens of prompts up to which a few steps are faster than a prefill pass, whose launches take long, on an H200."""
MOST_PASSES = 4
"""Passes that follow one another while streams wait that were not there before these prompts."""
FEW_STEPS = 8
"""Most steps that prompts are rows of."""
AHEAD = PAGE_TOKENS // 2
"""Number of tokens for which pages are taken early where there is time."""


class StepDecoder(Protocol):
    """Steps of one token for each row, and prefill passes; `gpu.decoder.Decoder` is one."""

    def rows_with_prompts(self, decoding: int, /) -> int:
        """Most rows of a step in which so many decode, if it may take about twice as long for the prompts' sake."""

    def set_rows(self, spans: Seq[Span], plan: Plan, /) -> None:
        """Sets the rows of the steps to come, one for each token of each span.

        If a span has several tokens, rows have to be set before each following step.

        Args:
            plan: holds the stacks of the spans.
        """

    def keep_rows(self, kept: Seq[int], /) -> None:
        """Leaves all other rows of the last step out of the next ones, where each span was one token.

        Args:
            kept: rows of the last step, in order. Each has its next token there.
        """

    def set_pages(self) -> None:
        """Takes in the pages that the spans' page tables have got since."""

    def step(self) -> tuple[Tensor, Tensor]:
        """Launches a step of the rows. If each span is one token, each is one token longer than in the step before.

        Returns:
            The likeliest next token of each span, (spans) int64, and its fp32 logits (spans, vocab). The next step
            reads its tokens from the first one, and overwrites both.
        """

    def prefill(self, batch: Batch, /) -> Forward:
        """A forward pass over prompts, which decode steps may interrupt."""

    def tensors(self) -> Seq[Tensor]:
        """All tensors that are kept from one step to the next."""


class StepOverlap:
    """The decoder and its pending step. The step loop's thread alone touches it."""

    def __init__(self, decoder: StepDecoder | None, scheduler: Scheduler, *, all_prompts: bool = False) -> None:
        """
        Args:
            all_prompts: whether the decoder takes prompts of any length.
        """
        self.decoder = decoder
        """None where all sequences go through the base's own layers."""
        self._all_prompts = all_prompts
        self._scheduler = scheduler
        self._device = scheduler.pool.key_pages.device
        self._passes = 0
        """Number of passes since the last step beside one."""
        self.pending: LaunchedStep | None = None
        """A step that has not been read. Its sequences are all that were scheduled for it."""

    def divide(self, chosen: Seq[Chosen]) -> tuple[list[Chosen], list[Chosen]]:
        """Divides scheduled sequences among the decoder and the prefill pass.

        The decoder takes prompts, too, where all of their tokens to compute are few enough to be rows of a few steps.
        Streams that were not there before the prompts take turns with passes over these, MOST_PASSES to one.

        Returns:
            The sequences that the decoder takes, and the others, with the number of their tokens to compute.
        """
        if self.decoder is None:
            return [], list(chosen)
        decoding: list[Chosen] = []
        rest: list[Chosen] = []
        for sequence, count in chosen:
            (decoding if sequence.computed and sequence.remaining == 1 else rest).append((sequence, count))
        if any(sequence.needs_prompt_logits for sequence, _ in rest):  # steps have the logits of last tokens alone
            return decoding, rest
        if not rest:
            self._passes = 0
            return decoding, []
        first = were_first([sequence for sequence, _ in decoding], [sequence for sequence, _ in rest])
        room = self.decoder.rows_with_prompts(len(decoding) if first else 0) - len(decoding)
        most = max(room, min(PASS_TOKENS, FEW_STEPS * room)) if self._scheduler.config.chunked_prefill else room
        if not self._all_prompts and sum(count for _, count in rest) > most:
            self._passes = 1 if first else self._passes % MOST_PASSES + 1
            return decoding if self._passes == 1 else [], rest
        for sequence, count in rest:
            if taken := min(count, room):
                decoding.append((sequence, taken))
                room -= taken
        return decoding, []

    def launch(self, chosen: Seq[Chosen]) -> None:
        """Launches a step of sequences and so many next tokens of each, which is pending then."""
        failpoint("forward")
        assert self.decoder is not None
        plan = self._scheduler.plan_of(sequence for sequence, _ in chosen)
        self.decoder.set_rows([sequence.span(count) for sequence, count in chosen], plan)
        self.pending = LaunchedStep(chosen, self.decoder.step, self._device, unread=0)

    def take_pending(self) -> LaunchedStep:
        """The pending step, for its reader. None is pending afterwards."""
        assert self.pending is not None
        step, self.pending = self.pending, None
        return step

    def go_on(self, step: LaunchedStep, *, has_time: bool) -> bool:
        """Launches the next step of those sequences that go on, if it can be, before the tokens of `step` are read.

        Args:
            step: one without log-probabilities.
            has_time: whether there is time to take pages early, so that later steps need not.

        Returns:
            Whether the next step is pending now.
        """
        failpoint("forward")
        assert self.decoder is not None
        running = [(row, s) for row, s in enumerate(step.sequences) if s in self._scheduler.running]
        if not step.is_steady or not self._scheduler.would_choose_only([s for _, s in running]):
            return False
        # The others end with the token to come.
        kept = [(row, s) for row, s in running if s.new_tokens + 2 <= s.request.stopping.max_new_tokens]
        going = [s for _, s in kept]
        if not going or not self._take_pages(going, early=has_time):
            return False
        if len(going) < len(step.sequences):
            self.decoder.keep_rows([row for row, _ in kept])
        self.decoder.set_pages()
        self.pending = LaunchedStep([(s, 1) for s in going], self.decoder.step, self._device, unread=1)
        return True

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
