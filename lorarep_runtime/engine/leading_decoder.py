"""Rank 0's decoder: it has the others launch their part of each step and pass, in the order in which it does itself."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from torch import Tensor

from lorarep_runtime.device.ranks import Ranks
from lorarep_runtime.engine.messages import SentTables
from lorarep_runtime.engine.overlap import StepDecoder
from lorarep_runtime.engine.prefill_pass import Forward
from lorarep_runtime.errors import EngineFailure
from lorarep_runtime.model.batch import Batch, Span
from lorarep_runtime.model.plan import Plan


class LeadingDecoder:
    """A `StepDecoder` of several ranks. The engine's thread alone touches it, except for `tensors`.

    Where rank 0 fails in the midst of a step, all have failed: the others wait for it.
    """

    def __init__(self, own: StepDecoder, ranks: Ranks) -> None:
        """
        Args:
            own: rank 0's own part.
        """
        self._own, self._ranks = own, ranks
        self._tables = SentTables()
        self._spans: list[Span] = []

    def rows_with_prompts(self, decoding: int, /) -> int:
        return self._own.rows_with_prompts(decoding)

    def set_rows(self, spans: Sequence[Span], plan: Plan, /) -> None:
        self._spans = list(spans)
        self._ranks.tell("set_rows", self._tables.spans(spans), plan)
        with self._ranks.together():
            self._own.set_rows(spans, plan)

    def keep_rows(self, kept: Sequence[int], /) -> None:
        self._spans = [self._spans[row] for row in kept]
        self._ranks.tell("keep_rows", list(kept))
        with self._ranks.together():
            self._own.keep_rows(kept)

    def set_pages(self) -> None:
        if new := self._tables.new_pages(self._spans):
            self._ranks.tell("set_pages", new)
        with self._ranks.together():
            self._own.set_pages()

    def step(self) -> tuple[Tensor, Tensor]:
        self._ranks.tell("step")
        with self._ranks.together():
            return self._own.step()

    def prefill(self, batch: Batch, /) -> Forward:
        self._ranks.tell("prefill", SentTables().spans(batch.spans), batch.plan)
        left = len(batch.spans)

        def leave_out(rows: slice, slot: int) -> None:
            nonlocal left
            left -= 1
            with suppress(EngineFailure):  # where the ranks have failed, requests end all the same
                if left:
                    self._ranks.tell("leave_out", rows, slot)
                else:  # nobody goes on with the pass
                    self._ranks.tell("end_prefill")

        batch.on_leave_out = leave_out
        with self._ranks.together():
            return _LeadingForward(self._own.prefill(batch), self._ranks)

    def tensors(self) -> Sequence[Tensor]:
        return self._own.tensors()


class _LeadingForward:
    """A `Forward` of several ranks. Logits are rank 0's."""

    def __init__(self, own: Forward, ranks: Ranks) -> None:
        self._own, self._ranks = own, ranks

    @property
    def left(self) -> int:
        return self._own.left

    def advance(self, visits: int, /) -> None:
        self._ranks.tell("advance", visits)
        with self._ranks.together():
            self._own.advance(visits)

    def logits(self, rows: Tensor, /) -> Tensor:
        self._ranks.tell("logits", rows.numpy())
        with self._ranks.together():
            return self._own.logits(rows)
