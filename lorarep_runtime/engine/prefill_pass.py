"""Prefill passes: the forward pass of prompts, a slice at a time where streams that were first decode meanwhile."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import Protocol

import torch
from torch import Tensor

from lorarep_runtime.adapters.lease import Lease
from lorarep_runtime.device.timer import DeviceTimer
from lorarep_runtime.engine.masks import take_masks
from lorarep_runtime.engine.prompt_scores import score
from lorarep_runtime.engine.sampler import Sampled, sample
from lorarep_runtime.engine.scheduler import Scheduler, were_first
from lorarep_runtime.engine.sequence import Sequence
from lorarep_runtime.failpoints import failpoint
from lorarep_runtime.model.base import Base
from lorarep_runtime.model.batch import Batch
from lorarep_runtime.model.kv_cache import PagePool
from lorarep_runtime.model.plan import Plan

SHARE = 0.55
"""Device time of a slice as a part of a decode step's, which runs after it."""


class Forward(Protocol):
    """A forward pass over a batch, some visits of its plan at a time; `gpu.prefill.Prefill` is one."""

    @property
    def left(self) -> int:
        """Number of visits that have not been launched."""

    def advance(self, visits: int, /) -> None:
        """Launches the next `visits` visits of the batch's plan."""

    def logits(self, rows: Tensor, /) -> Tensor:
        """After the last visit: fp32 logits (n, vocab) of rows, (n) int64 on the CPU."""


class WholeForward:
    """A forward pass through the base's own layers, at once and not in slices."""

    left = 0

    def __init__(self, base: Base, pool: PagePool, batch: Batch) -> None:
        self._base, self._pool, self._batch = base, pool, batch

    def advance(self, visits: int, /) -> None: ...

    def logits(self, rows: Tensor, /) -> Tensor:
        return self._base.forward(self._batch, self._pool, rows)


class SlicePacer:
    """Measures decode steps and slices of passes, and says how long the next slice may be."""

    def __init__(self) -> None:
        self._decode_milliseconds: float | None = None
        self._visit_milliseconds: float | None = None
        self._slices: deque[tuple[int, DeviceTimer]] = deque()
        """Slices that were not measured when last looked at: number of visits, and the timer."""

    @property
    def decode_seconds(self) -> float:
        """Device time of the last decode step; infinity before there was one."""
        return (self._decode_milliseconds or float("inf")) / 1e3

    def record_decode(self, milliseconds: float | None) -> None:
        """Takes the device time of the last decode step, None where it is unknown."""
        self._decode_milliseconds = milliseconds

    def record_slice(self, visits: int, timer: DeviceTimer) -> None:
        """Takes the timer of a slice that has been launched."""
        self._slices.append((visits, timer))

    def visits(self) -> int:
        """Number of visits that take SHARE of a decode step's time; 1 until both have been measured."""
        while self._slices and (taken := self._slices[0][1].milliseconds) is not None:
            self._visit_milliseconds = taken / self._slices.popleft()[0]
        if self._decode_milliseconds is None or not self._visit_milliseconds:
            return 1
        return max(1, int(self._decode_milliseconds * SHARE / self._visit_milliseconds))


class PrefillPass:
    """One forward pass over some sequences' next tokens. It holds their adapters until it is over."""

    def __init__(
        self, chosen: Seq[tuple[Sequence, int]], plan: Plan, pool: PagePool, forward: Callable[[Batch], Forward]
    ) -> None:
        """
        Args:
            chosen: sequences, and the number of their next tokens to compute.
            plan: holds their stacks.
        """
        self._pool = pool
        self.sequences = [sequence for sequence, _ in chosen]
        self._counts = [count for _, count in chosen]
        self.sampled: list[tuple[Sequence, Sampled]] | None = None
        """The next token of each sequence whose last known token was among those computed; None before the end."""
        self._ended: list[Sequence] = []
        self._batch = Batch([sequence.span(count) for sequence, count in chosen], pool.key_pages.device, plan)
        self._forward = forward(self._batch)

    @property
    def is_deserted(self) -> bool:
        """Whether all of its sequences have ended."""
        return len(self._ended) == len(self.sequences)

    @property
    def is_over(self) -> bool:
        """Whether there is nothing left to launch: it has sampled, or no sequence is left."""
        return self.sampled is not None or self.is_deserted

    def launch_visits(self, visits: int | None, pacer: SlicePacer) -> None:
        """Launches the next visits, None for all that are left; samples after the last one."""
        left = self._forward.left
        if visits is not None and left:
            count = min(visits, left)
            timer = DeviceTimer(self._batch.device)
            self._forward.advance(count)
            timer.stop()
            pacer.record_slice(count, timer)
        else:
            self._forward.advance(left)
        if not self._forward.left:
            self.sampled = self._sample()

    def _sample(self) -> list[tuple[Sequence, Sampled]]:
        ends = [int(self._batch.starts[k + 1]) - 1 for k in range(len(self.sequences))]
        ready = [
            (self.sequences[i], end)
            for i, end in zip(self._batch.order, ends, strict=True)
            if self.sequences[i].remaining == self._counts[i]
        ]
        scored = [self._rows_to_score(k) for k in range(len(self.sequences))]
        rows = [row for _, row in ready] + [row for of_one in scored for row in of_one]
        # Called even where no logits are wanted: `WholeForward` computes here.
        logits = self._forward.logits(torch.tensor(rows, dtype=torch.int64))
        has_mask = take_masks(sequence.sampler.form for sequence, _ in ready)
        for sequence, count in zip(self.sequences, self._counts, strict=True):
            sequence.mark_computed(count)
            sequence.is_unread = not any(has_mask) and not any(scored)  # else sampling and scoring wait for the device
        for (sequence, _), is_there in zip(ready, has_mask, strict=True):
            if not is_there:
                sequence.compute_last_again()
        self._score(logits[len(ready) :], scored)
        if not any(has_mask):
            return []
        sequences = [sequence for (sequence, _), is_there in zip(ready, has_mask, strict=True) if is_there]
        logits = logits[: len(ready)]
        if len(sequences) < len(ready):
            logits = logits[torch.tensor(has_mask, device=logits.device)]
        return list(zip(sequences, sample(logits, [s.sampler for s in sequences]), strict=True))

    def _rows_to_score(self, k: int) -> range:
        """The rows of the batch's span k whose logits are of a token of the prompt that has to be scored."""
        sequence, count = self.sequences[self._batch.order[k]], self._counts[self._batch.order[k]]
        own = sequence.rows_to_score(count)
        first = int(self._batch.starts[k]) - sequence.computed
        return range(first + own.start, first + own.stop) if own else own

    def _score(self, logits: Tensor, scored: Seq[range]) -> None:
        """Adds the log-probabilities of prompts' tokens to their sequences.

        Args:
            logits: (rows, vocab) fp32, of the rows of `scored`, one span after the other.
        """
        for k, some in enumerate(logits.split([len(rows) for rows in scored])):
            sequence = self.sequences[self._batch.order[k]]
            if len(some) and sequence not in self._ended:
                tokens = sequence.tokens[sequence.scored : sequence.scored + len(some)]
                own = some[:, : sequence.sampler.vocab_size]  # adapters may have other vocabularies
                sequence.prompt_parts.append(score(own, tokens, sequence.request.prompt_logprobs or 0))
                sequence.scored += len(some)

    def drop(self, sequence: Sequence) -> None:
        """Gives back the pages of a sequence that has ended. The pass writes to the spare slot instead."""
        k = self._batch.order.index(self.sequences.index(sequence))
        rows = slice(int(self._batch.starts[k]), int(self._batch.starts[k + 1]))
        self._batch.leave_out(rows, self._pool.spare_slot)
        sequence.table.release()
        self._ended.append(sequence)

    def take_ended(self) -> list[Lease]:
        """The leases of sequences that ended before the pass was over, to be released by the caller."""
        leases = [sequence.lease for sequence in self._ended]
        self._ended.clear()
        return leases


class SlicedPrefill:
    """The pending prefill pass, if there is one. The step loop's thread alone touches it."""

    def __init__(self, forward: Callable[[Batch], Forward], scheduler: Scheduler) -> None:
        self._forward = forward
        self._scheduler = scheduler
        self.pacer = SlicePacer()
        self.pending: PrefillPass | None = None

    def begin_or_go_on(self, chosen: Seq[tuple[Sequence, int]]) -> None:
        """Begins a pass over prompts or goes on with the pending one: a slice beside streams that were first, else all.

        Args:
            chosen: sequences of a new pass, and the number of their next tokens; empty while one is pending.
        """
        failpoint("forward")
        if self.pending is None:
            plan = self._scheduler.plan_of(sequence for sequence, _ in chosen)
            self.pending = PrefillPass(chosen, plan, self._scheduler.pool, self._forward)
            self._scheduler.begin_prefill(self.pending.sequences)
        if not self.pending.is_deserted:
            others = [s for s in self._scheduler.running if s not in self.pending.sequences]
            sliced = were_first(others, self.pending.sequences)
            self.pending.launch_visits(self.pacer.visits() if sliced else None, self.pacer)

    def take_finished(self) -> PrefillPass | None:
        """The pass, once it is over; none is pending afterwards."""
        if self.pending is None or not self.pending.is_over:
            return None
        finished, self.pending = self.pending, None
        self._scheduler.end_prefill()
        return finished

    def is_computing(self, sequence: Sequence) -> bool:
        """Whether a sequence is of the pending pass."""
        return self.pending is not None and sequence in self.pending.sequences

    def drop(self, sequence: Sequence) -> None:
        """Gives back what a sequence of the pending pass took: its pages now, its adapter when the pass is over."""
        assert self.pending is not None
        self.pending.drop(sequence)

    def release_adapters(self) -> None:
        """Releases the adapters that the pending pass keeps for sequences that have ended: it will not go on."""
        if self.pending is not None:
            for lease in self.pending.take_ended():
                lease.release()
