"""A request that the engine has taken."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from lorarep_runtime.adapters.registry import Lease
from lorarep_runtime.engine.sampler import SamplerState
from lorarep_runtime.model.batch import Span
from lorarep_runtime.model.kv_cache import PageTable
from lorarep_runtime.request import Event, Request
from lorarep_runtime.text.detokenizer import TextStream


@dataclass(eq=False)
class Sequence:
    """A request under way."""

    id: int
    request: Request
    lease: Lease
    sampler: SamplerState
    text: TextStream
    on_event: Callable[[Event], None]
    table: PageTable
    tokens: list[int]
    """Prompt and answer."""
    computed: int = 0
    """Tokens whose keys and values are in the cache."""
    submitted: float = field(default_factory=time.monotonic)
    started: float | None = None
    first_token: float | None = None

    @property
    def remaining(self) -> int:
        """Tokens still to be computed before the next one can be sampled."""
        return len(self.tokens) - self.computed

    @property
    def new_tokens(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    @property
    def most_computed(self) -> int:
        """Tokens of the longest answer, but for its last one, after which there is no other."""
        return len(self.request.prompt) + self.request.stopping.max_new_tokens - 1

    def span(self, count: int) -> Span:
        """The next `count` tokens."""
        return Span(
            self.tokens[self.computed : self.computed + count],
            self.computed,
            self.lease.stack,
            self.lease.adapter,
            self.table,
        )
