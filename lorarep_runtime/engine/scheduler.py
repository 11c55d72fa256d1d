"""Which sequences work in the next step, and on how many of their tokens.

Sequences that decode come first, one token each; prompts fill the rest of the step (Agrawal et al., 2024), those of the
adapters with the fewest running first, then in order of arrival. When pages run short the youngest sequence gives its
own back and is computed anew later (Kwon et al., 2023).

Adapters come to the device in the order of turns. Others pass those whose adapter is on its way; but when there is no
room for one, nobody takes another adapter until there is, or it might wait for ever.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Collection

from lorarep_runtime.adapters.residency import Claim, Residency
from lorarep_runtime.config import SchedulerConfig
from lorarep_runtime.engine.sequence import Sequence
from lorarep_runtime.errors import InvalidArgument, LorarepError
from lorarep_runtime.model.kv_cache import PagePool, PageTable, pages_of
from lorarep_runtime.request import Request

STEP_TOKENS, CPU_STEP_TOKENS = 2048, 512


class Scheduler:
    """The sequences that wait and those that hold pages. The engine's thread alone touches it."""

    def __init__(self, config: SchedulerConfig, pool: PagePool, residency: Residency) -> None:
        self.config = config
        self.pool = pool
        self._residency = residency
        default = CPU_STEP_TOKENS if pool.key_pages.device.type == "cpu" else STEP_TOKENS
        self._max_step_tokens = config.max_step_tokens or default
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        """In order of arrival."""
        self.failed: list[tuple[Sequence, LorarepError]] = []
        """Those whose adapters cannot be brought to the device. They still wait, for who takes them out."""
        self.computing: Collection[Sequence] = ()
        """Those whose forward pass is under way: they keep their pages, and until it is over no prompt is begun."""
        self.preemptions = 0
        # Of the last look at adapters, and when that was.
        self._passed: set[Sequence] = set()
        self._has_room = True
        self._version = 0

    def check(self, request: Request, depth: int) -> None:
        """Refuses what could never run alone.

        Raises:
            InvalidArgument: naming what is too large.
        """
        longest = len(request.prompt) + request.stopping.max_new_tokens
        pages = depth * pages_of(longest)
        if pages > self.pool.total:
            raise InvalidArgument(
                f"{longest} tokens at {depth} positions take {pages} pages of KV memory, "
                f"and there are {self.pool.total}",
                field="prompt and max_new_tokens",
            )

    def schedule(self) -> list[tuple[Sequence, int]]:
        """Sequences and how many of their next tokens to compute now; their pages are there."""
        budget = self._max_step_tokens
        chosen: dict[Sequence, int] = {}
        # Decoding sequences, then prompts under way; both in order of arrival.
        for sequence in sorted(self.running, key=lambda s: s.remaining > 1):
            if self.computing and (sequence in self.computing or sequence.remaining > 1):
                continue
            if sequence in self.running and (count := self._fits(sequence, budget, alone=not chosen)):
                if not self._make_room(sequence, count, chosen):
                    continue
                chosen[sequence] = count
                budget -= count
        if self.computing:
            return list(chosen.items())
        self._passed, self._has_room, self._version = set(), True, self._residency.version
        while len(self.running) < self.config.max_sequences and (free := self._free()):
            sequence = self._next(free)
            if not self._has_turn(sequence):
                continue
            count = self._fits(sequence, budget, alone=not chosen)
            # The whole prompt's room, or it would be preempted half-way.
            if not count or not sequence.table.grow(len(sequence.tokens)):
                break
            self.waiting.remove(sequence)
            self.running.append(sequence)
            if sequence.started is None:
                sequence.started = time.monotonic()
            chosen[sequence] = count
            budget -= count
        return list(chosen.items())

    @property
    def can_admit(self) -> bool:
        """Whether a waiting sequence may have its turn, if its pages are there."""
        if self.computing or len(self.running) == self.config.max_sequences:
            return False
        return bool(self._free()) or bool(self.waiting and self._version != self._residency.version)

    def _free(self) -> list[Sequence]:
        """The waiting sequences that neither a limit of their adapter holds back nor its way to the device."""
        most = self.config.max_running_per_adapter
        running = self._running_by_adapter()
        return [
            sequence
            for sequence in self.waiting
            if sequence not in self._passed
            and (self._has_room or not sequence.lease.names)
            and (most is None or running[sequence.lease.names] < most)
        ]

    def _running_by_adapter(self) -> Counter[tuple[str, ...]]:
        return Counter(sequence.lease.names for sequence in self.running)

    def _next(self, free: list[Sequence]) -> Sequence:
        """The waiting sequence whose turn it is.

        The first that gave its pages back or whose adapter has been brought for it; else that of the adapter with the
        fewest running, so that a flood for one does not starve the others, and the oldest of several.
        """
        running = self._running_by_adapter()
        return min(free, key=lambda s: -1 if s.started or s.lease.has_claim else running[s.lease.names])

    def _has_turn(self, sequence: Sequence) -> bool:
        """Whether its adapter is on the device, and stays there for it."""
        try:
            claim = sequence.lease.claim()
        except LorarepError as error:
            self.failed.append((sequence, error))
            claim = Claim.LOADING
        if claim is not Claim.READY:
            self._passed.add(sequence)
        self._has_room &= claim is not Claim.NO_MEMORY
        return claim is Claim.READY

    def _fits(self, sequence: Sequence, budget: int, *, alone: bool) -> int:
        """How many of its tokens go into the rest of the step."""
        if self.config.chunked_prefill:
            return min(sequence.remaining, budget)
        # Prompts stay whole; one that is longer than a step gets a step of its own.
        return sequence.remaining if sequence.remaining <= budget or alone else 0

    def _make_room(self, sequence: Sequence, count: int, chosen: dict[Sequence, int]) -> bool:
        """Pages for the next tokens, taken from younger sequences where none are free."""
        while not sequence.table.grow(sequence.computed + count):
            youngest = next(s for s in reversed(self.running) if s not in self.computing)
            self._preempt(youngest)
            chosen.pop(youngest, None)
            if youngest is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        sequence.table.release()
        # Another one: by it a decoder knows whose pages it has taken note of.
        sequence.table = PageTable(self.pool, sequence.table.depth)
        sequence.computed = 0
        self.waiting.appendleft(sequence)
        self.preemptions += 1

    def remove(self, sequence: Sequence) -> None:
        """Takes a sequence out, wherever it is, and frees its pages; if its forward pass is under way, that does so."""
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        if sequence not in self.computing:
            sequence.table.release()
