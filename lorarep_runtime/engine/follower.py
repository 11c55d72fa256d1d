"""The process of another rank than 0: it holds its part of the base, and computes what rank 0 tells it to."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from lorarep_runtime.device import gil
from lorarep_runtime.device.ranks import Member
from lorarep_runtime.errors import LorarepError, first_line
from lorarep_runtime.failpoints import failpoint

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from lorarep_runtime.config import BaseConfig
    from lorarep_runtime.engine.messages import ReceivedTables, SentSpan
    from lorarep_runtime.engine.overlap import StepDecoder
    from lorarep_runtime.engine.prefill_pass import Forward
    from lorarep_runtime.engine.preparation import DecoderSizes
    from lorarep_runtime.model.batch import Batch, Span
    from lorarep_runtime.model.plan import Plan
    from lorarep_runtime.model.stack import Stack

log = logging.getLogger(__name__)

FAILED = 1
"""The exit status of a rank that cannot go on."""


def main() -> None:
    """Runs a rank until rank 0 has ended. Exits with FAILED where a pass fails: rank 0 then ends the others."""
    member = Member()  # before torch is imported, which takes seconds
    logging.basicConfig(format=f"%(levelname)s rank {member.rank}: %(message)s")
    status = 0
    try:
        Follower(member).run()
    except BaseException:
        log.exception("the rank has failed")
        status = FAILED
    os._exit(status)  # threads of loads may be at work


class Follower:
    """One rank. Its main thread computes the steps, in the order in which rank 0 does."""

    def __init__(self, member: Member) -> None:
        import torch

        from lorarep_runtime.model.transformers_attention import register_attention

        register_attention()  # imports what takes seconds, before rank 0 waits for it
        self._torch = torch
        self._member = member
        self.decoder: StepDecoder | None = None
        self._spans: list[Span] = []
        """Of the decoder's rows."""
        self._batch: Batch | None = None
        self._pass: Forward | None = None
        """The pending prefill pass, and its batch."""
        self._answer(None)

    def run(self) -> None:
        """Does what rank 0 tells it, until that has ended."""
        gil.switch_often()
        while True:
            gil.release()  # to loads, as long as nothing is to be launched
            try:
                name, *arguments = self._member.steps.receive()
            except (EOFError, OSError):
                return
            gil.claim()
            getattr(self, name)(*arguments)

    def _answer(self, value: Any) -> None:
        self._member.steps.send((None, value))

    def _do(self, work: Callable[[], Any]) -> None:
        """Answers what the work returns, or refuses."""
        try:
            answer = work()
        except Exception as error:
            self._refuse(error)
        else:
            self._answer(answer)

    def _refuse(self, error: Exception) -> None:
        """Tells rank 0 what it will raise."""
        log.error("rank %d cannot start", self._member.rank, exc_info=error)
        known = isinstance(error, LorarepError)
        said = error if known else RuntimeError(f"rank {self._member.rank}: {first_line(error)}")
        said.__cause__ = said.__context__ = None
        self._member.steps.send((said, None))

    # What rank 0 waits for.

    def load(self, config: BaseConfig) -> None:
        """Loads this rank's part of the base."""
        from lorarep_runtime.adapters.maker import AdapterMaker
        from lorarep_runtime.adapters.rank_makers import FollowingMaker
        from lorarep_runtime.model.base import Base

        member = self._member

        def load() -> None:
            failpoint(f"base-{member.rank}")
            self.base = Base(config, join=lambda _, device: member.join(device))
            self.maker = FollowingMaker(AdapterMaker(self.base), member.loads, member.rank)
            threading.Thread(target=self.maker.run, name="lorarep-adapter", daemon=True).start()

        self._do(load)

    def prepare_device(self) -> None:
        """As of `engine.preparation`."""
        from lorarep_runtime.engine.preparation import prepare_device

        self._do(lambda: prepare_device(self.base))

    def free_bytes(self) -> None:
        """Answers as `engine.preparation`'s."""
        from lorarep_runtime.engine.preparation import free_bytes

        self._do(lambda: free_bytes(self.base))

    def make_pool(self, pages: int) -> None:
        """Takes memory for this rank's part of the pages."""
        from lorarep_runtime.model.kv_cache import PagePool

        def make() -> None:
            base = self.base
            self.pool = PagePool(pages, base.kv_shape, dtype=base.dtype, device=base.device)
            self._of_passes, self._of_rows = self._tables(), self._tables()

        self._do(make)

    def _tables(self) -> ReceivedTables:
        from lorarep_runtime.engine.messages import ReceivedTables

        return ReceivedTables(self.pool, self.maker.adapters)

    def make_decoder(self, sizes: DecoderSizes, stacks: Sequence[Stack], max_rank: int) -> None:
        """Captures this rank's part of the steps."""
        from lorarep_runtime.engine.preparation import make_decoder

        def make() -> None:
            self.decoder = make_decoder(self.base, self.pool, sizes, stacks, max_rank)

        self._do(make)

    def held_bytes(self) -> None:
        """Answers the bytes of this rank's parts, by their use."""
        from lorarep_runtime.engine.ledger import categories_of

        adapters = sum(adapter.storage.nbytes for adapter in list(self.maker.adapters.values()))
        steps = [] if self.decoder is None else self.decoder.tensors()
        self._answer(categories_of(self.base, self.pool, adapters, steps))

    # Steps.

    def fill_with_zeros(self, pages: NDArray[np.int64]) -> None:
        """As of PagePool."""
        self.pool.fill_with_zeros(pages)

    def forward(self, sent: Sequence[SentSpan], plan: Plan, rows: NDArray[np.int64]) -> None:
        """This rank's part of a pass, and of the logits of some rows (n)."""
        from lorarep_runtime.model.batch import Batch

        failpoint(f"forward-{self._member.rank}")
        batch = Batch(self._of_passes.spans(sent), self.base.device, plan)
        self.base.forward(batch, self.pool, self._torch.from_numpy(rows))

    def set_rows(self, sent: Sequence[SentSpan], plan: Plan) -> None:
        """As of the decoder."""
        assert self.decoder is not None
        self._spans = self._of_rows.spans(sent)
        self.decoder.set_rows(self._spans, plan)

    def keep_rows(self, kept: Sequence[int]) -> None:
        """As of the decoder."""
        assert self.decoder is not None
        self._spans = [self._spans[row] for row in kept]
        self.decoder.keep_rows(kept)

    def set_pages(self, new: Sequence[tuple[int, NDArray[np.int64]]]) -> None:
        """Takes further pages of spans. new: index of each span, and pages (depth, pages per position)."""
        from lorarep_runtime.engine.messages import add_pages

        assert self.decoder is not None
        for index, pages in new:
            add_pages(self._spans[index], pages)
        self.decoder.set_pages()

    def step(self) -> None:
        """As of the decoder."""
        assert self.decoder is not None
        failpoint(f"forward-{self._member.rank}")
        self.decoder.step()

    def prefill(self, sent: Sequence[SentSpan], plan: Plan) -> None:
        """Begins a pass over prompts."""
        from lorarep_runtime.model.batch import Batch

        assert self.decoder is not None
        self._batch = Batch(self._tables().spans(sent), self.base.device, plan)
        self._pass = self.decoder.prefill(self._batch)

    def advance(self, visits: int) -> None:
        """As of the pending pass."""
        assert self._pass is not None
        failpoint(f"forward-{self._member.rank}")
        self._pass.advance(visits)

    def leave_out(self, rows: slice, slot: int) -> None:
        """As of the pending pass's batch."""
        if self._batch is not None:
            self._batch.leave_out(rows, slot)

    def logits(self, rows: NDArray[np.int64]) -> None:
        """Ends the pending pass with this rank's part of the logits of some rows (n)."""
        assert self._pass is not None
        self._pass.logits(self._torch.from_numpy(rows))
        self.end_prefill()

    def end_prefill(self) -> None:
        """Frees the pending pass: it has been launched to its end, or its sequences have all ended."""
        self._batch = self._pass = None
