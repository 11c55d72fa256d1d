"""The process of another rank than 0: it holds its part of the base, and computes what rank 0 tells it to."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lorarep_runtime.device.ranks import Member
from lorarep_runtime.errors import LorarepError, first_line
from lorarep_runtime.failpoints import failpoint

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from lorarep_runtime.config import BaseConfig
    from lorarep_runtime.engine.messages import SentSpan

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
        self._answer(None)

    def run(self) -> None:
        """Does what rank 0 tells it, until that has ended."""
        while True:
            try:
                name, *arguments = self._member.steps.receive()
            except (EOFError, OSError):
                return
            getattr(self, name)(*arguments)

    def _answer(self, value: Any) -> None:
        self._member.steps.send((None, value))

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
        try:
            failpoint(f"base-{member.rank}")
            self.base = Base(config, join=lambda _, device: member.join(device))
        except Exception as error:
            self._refuse(error)
            return
        self.maker = FollowingMaker(AdapterMaker(self.base), member.loads, member.rank)
        threading.Thread(target=self.maker.run, name="lorarep-adapter", daemon=True).start()
        self._answer(None)

    def make_pool(self, pages: int) -> None:
        """Takes memory for this rank's part of the pages."""
        from lorarep_runtime.model.kv_cache import PagePool

        base = self.base
        try:
            self.pool = PagePool(pages, base.kv_shape, dtype=base.dtype, device=base.device)
        except Exception as error:
            self._refuse(error)
            return
        self._answer(None)

    def held_bytes(self) -> None:
        """Answers the bytes of this rank's parts, by their use."""
        from lorarep_runtime.engine.ledger import categories_of

        adapters = sum(adapter.storage.nbytes for adapter in list(self.maker.adapters.values()))
        self._answer(categories_of(self.base, self.pool, adapters))

    # Steps.

    def fill_with_zeros(self, pages: NDArray[np.int64]) -> None:
        """As of PagePool."""
        self.pool.fill_with_zeros(pages)

    def forward(self, sent: Sequence[SentSpan]) -> None:
        """This rank's part of a pass. Its logits are rank 0's: it computes none."""
        from lorarep_runtime.engine.messages import received_spans
        from lorarep_runtime.model.batch import Batch

        failpoint(f"forward-{self._member.rank}")
        spans = received_spans(sent, self.maker.adapters, self.pool)
        batch = Batch(spans, self.base.device)
        self.base.forward(batch, self.pool, self._torch.empty(0, dtype=self._torch.int64, device=self.base.device))
