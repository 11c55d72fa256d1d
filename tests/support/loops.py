"""A step loop over fakes: no model, no adapters and no thread."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import Executor, Future
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from lorarep_runtime.adapters.claim import Claim
from lorarep_runtime.config import SchedulerConfig
from lorarep_runtime.engine.inbox import Inbox
from lorarep_runtime.engine.outputs import Outputs
from lorarep_runtime.engine.overlap import StepOverlap
from lorarep_runtime.engine.plans import Plans
from lorarep_runtime.engine.prefill_pass import SlicedPrefill
from lorarep_runtime.engine.sampler import SamplerState
from lorarep_runtime.engine.scheduler import Scheduler
from lorarep_runtime.engine.sequence import Sequence
from lorarep_runtime.engine.stats import Stats, StatsRecorder
from lorarep_runtime.engine.step_loop import StepLoop
from lorarep_runtime.model.batch import Batch
from lorarep_runtime.model.kv_cache import KVShape, PagePool, PageTable
from lorarep_runtime.model.prefix_cache import PrefixKeys
from lorarep_runtime.model.stack import Stack
from lorarep_runtime.request import Event, Output, Request, Stopping

VOCAB = 32
DEPTH = 2


class AtOnce(Executor):
    """Runs what is submitted to it in the thread that submits it."""

    def submit(self, work: Callable[..., Any], /, *arguments: Any, **named: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(work(*arguments, **named))
        return done


class Counting:
    """A forward pass whose likeliest next token is the last one plus 1."""

    left = 0

    def __init__(self, batch: Batch) -> None:
        self._batch = batch

    def advance(self, visits: int, /) -> None: ...

    def logits(self, rows: Tensor, /) -> Tensor:
        return torch.nn.functional.one_hot((self._batch.token_ids[rows] + 1) % VOCAB, VOCAB).float()


class FreeLease:
    """A lease of an adapter that is on the device, and that no kernel reads."""

    def __init__(self, *names: str, stack: Stack = tuple(range(DEPTH))) -> None:
        self.names = self.target = names
        self.stack = stack
        self.adapter = None
        self.has_claim = True
        self.is_released = False

    def claim(self, *, may_load: bool = True) -> Claim:
        return Claim.READY

    def release(self) -> None:
        self.is_released = True


class Digits:
    """The text of an answer: its tokens as numbers."""

    def feed(self, token: int, *, may_stop: bool) -> tuple[str, str]:
        return f"{token} ", ""

    def finish(self) -> str:
        return ""


class Loop:
    """A step loop over fakes, and requests for it."""

    def __init__(self, pages: int = 64, forward: Any = Counting, **limits: Any) -> None:
        config = SchedulerConfig(**limits)
        self.pool = PagePool(pages, KVShape(1, 1, 1), dtype=torch.float32, device=torch.device("cpu"))
        self.inbox, self._recorder = Inbox(config), StatsRecorder(pages)
        self.residency = SimpleNamespace(version=0)
        most = config.max_sequences or 32
        plans = Plans(DEPTH, AtOnce())
        scheduler = Scheduler(config, self.pool, self.residency, most, DEPTH, plans)  # type: ignore[arg-type]
        self.loop = StepLoop(
            self.inbox,
            scheduler,
            StepOverlap(None, scheduler),
            SlicedPrefill(forward, scheduler),
            Outputs(self._recorder),
            self._recorder,
        )
        self.leases: list[FreeLease] = []
        self.answers: dict[int, list[Event]] = {}
        self._ids = itertools.count()

    def submit(
        self,
        *names: str,
        prompt: tuple[int, ...] = (1, 2),
        new_tokens: int = 3,
        lease: FreeLease | None = None,
        deadline: float | None = None,
        caches: bool = False,
    ) -> int:
        lease, number = lease or FreeLease(*names), next(self._ids)
        events: list[Event] = []
        keys = PrefixKeys(lease.stack, (), "") if caches else None
        if keys is not None:
            keys.extend(prompt)
        request = Request(prompt, stopping=Stopping(max_new_tokens=new_tokens), deadline=deadline)
        self.inbox.submit(
            Sequence(
                id=number,
                request=request,
                lease=lease,  # type: ignore[arg-type]
                sampler=SamplerState(request, frozenset()),
                text=Digits(),  # type: ignore[arg-type]
                on_event=events.append,
                table=PageTable(self.pool, len(lease.stack)),
                tokens=list(prompt),
                keys=keys,
            )
        )
        self.leases.append(lease)
        self.answers[number] = events
        return number

    @property
    def stats(self) -> Stats:
        return self._recorder.snapshot(self.inbox.waiting_by_adapter())

    def tokens(self, number: int) -> list[int]:
        return [token for event in self.answers[number] if isinstance(event, Output) for token in event.tokens]

    def assert_nothing_held(self) -> None:
        assert (self.stats.running, self.stats.waiting, self.stats.pages_used) == (0, 0, self.pool.used) == (0, 0, 0)
        assert all(lease.is_released for lease in self.leases)
