"""The engine: step() is schedule, forward, sample, emit. One thread steps; others submit and are told by callback.

It knows token ids, revisions and pages; names of adapters end in `adapters.pool`, text in `text`.
"""

from __future__ import annotations

import gc
import itertools
import logging
import math
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from lorarep_runtime.adapters.compile import load_kernels
from lorarep_runtime.adapters.registry import AdapterRegistry, Lease
from lorarep_runtime.config import PAGE_TOKENS, EngineConfig
from lorarep_runtime.device import gil
from lorarep_runtime.engine.ledger import Ledger, take_stock
from lorarep_runtime.engine.overlap import LaunchedStep, StepOverlap, decoder_for
from lorarep_runtime.engine.prefill_pass import Forward, PrefillPass, SlicePacer, WholeForward
from lorarep_runtime.engine.sampler import Sampled, SamplerState, validate
from lorarep_runtime.engine.scheduler import Scheduler
from lorarep_runtime.engine.sequence import Sequence
from lorarep_runtime.engine.stats import Stats
from lorarep_runtime.errors import (
    Cancelled,
    DeadlineExceeded,
    EngineFailure,
    Exhausted,
    InvalidArgument,
    LorarepError,
    Unavailable,
)
from lorarep_runtime.failpoints import failpoint
from lorarep_runtime.model.base import Base
from lorarep_runtime.model.batch import Batch, Span
from lorarep_runtime.model.kv_cache import PagePool, PageTable
from lorarep_runtime.model.stack import Stack
from lorarep_runtime.progress import Progress
from lorarep_runtime.request import Event, Finished, FinishReason, Output, Request, Timings, TokenLogprob
from lorarep_runtime.text.detokenizer import TextStream

log = logging.getLogger(__name__)

T = TypeVar("T")

BASE_STACK = "base"
"""Name of the base's own order of layers."""
CPU_KV_BYTES = 1 << 30
DEADLINE_POLL = 0.05
"""Seconds between looks at the deadlines of requests whose adapters are on their way, while nothing else is to do."""
CUBLAS_WORKSPACE = ":1024:1"
"""1 MiB: torch keeps 8 MiB, on Hopper 32 MiB, for every thread and stream that has multiplied something
(https://docs.nvidia.com/cuda/cublas, CUBLAS_WORKSPACE_CONFIG)."""
MAX_FAILURES = 8
"""Forward passes that fail one after the other; then the engine has failed."""
ACCELERATOR_KV_SHARE = 0.8
"""Part of the memory left after loading the base that KV pages take where nothing else is said."""


@dataclass(frozen=True)
class Completion:
    """A whole answer, for callers without a stream."""

    tokens: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprob, ...]
    finished: Finished


class Engine:
    """One base, its stacks and adapters, and the requests on them.

    Raises:
        LorarepError: where the base cannot be served as configured.
    """

    def __init__(self, config: EngineConfig, progress: Progress | None = None) -> None:
        self.config = config
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", CUBLAS_WORKSPACE)
        self.base = Base(config.base, progress)
        self.stacks: Mapping[str, Stack] = self._named_stacks()
        self.adapters = AdapterRegistry(self.base, self.stacks, config.adapters, config.base.cache_dir)
        self.max_tokens = config.scheduler.max_sequence_tokens or self.base.max_tokens
        if self.max_tokens > self.base.max_tokens:
            raise InvalidArgument(
                f"{self.max_tokens} is over the {self.base.max_tokens} that the base serves",
                field="max_sequence_tokens",
            )
        if self.base.device.type == "cuda":
            from lorarep_runtime.gpu.warm_up import prepare_device

            base = self.base
            prepare_device(base.device, lambda: load_kernels(base.norm_terms, base.modules, base.dtype, base.device))
        self.pool = self._page_pool()
        self.scheduler = Scheduler(config.scheduler, self.pool, self.adapters.residency)
        decoder = decoder_for(self.base, self.pool, config.scheduler.max_sequences, self.max_tokens)
        if decoder is not None:
            from lorarep_runtime.gpu.warm_up import warm_up

            warm_up(decoder, dict.fromkeys(self.stacks.values()), progress)
        self._flights = StepOverlap(decoder, self.scheduler)
        self._pass: PrefillPass | None = None
        """Over prompts, under way."""
        self._pace = SlicePacer()
        self._began = 0.0
        """`time.perf_counter` when the device has begun the last step, about: there are few things to do in between."""
        self._failures = 0
        """Of forward passes, since one has worked."""
        self.failure: BaseException | None = None
        """What ended the step thread, if anything did."""
        self._ids = itertools.count(1)
        self._wake = threading.Condition()
        self._submitted: deque[Sequence] = deque()
        self._cancelled: set[int] = set()
        self._draining = self._stopping = self._arrived = False
        self.adapters.residency.subscribe(self._arrival)
        self._thread: threading.Thread | None = None
        self._step_rows: Counter[int] = Counter()
        self._step_adapters: Counter[int] = Counter()
        self._tokens_in = self._tokens_out = 0

    def _named_stacks(self) -> dict[str, Stack]:
        stacks = {BASE_STACK: tuple(range(self.base.layers))}
        for name, stack in self.config.stacks.items():
            if name == BASE_STACK:
                raise InvalidArgument(
                    f"{BASE_STACK!r} is the base's own order and cannot be named anew", field="stacks"
                )
            if not stack or any(not 0 <= layer < self.base.layers for layer in stack):
                raise InvalidArgument(f"{name!r} leaves the base's {self.base.layers} layers", field="stacks")
            stacks[name] = stack
        return stacks

    def _page_pool(self) -> PagePool:
        base, wanted = self.base, self.config.scheduler.kv_bytes
        if wanted is None:
            wanted = CPU_KV_BYTES
            if base.device.type == "cuda":
                wanted = int(torch.cuda.mem_get_info(base.device)[0] * ACCELERATOR_KV_SHARE)
        pages = wanted // PagePool.page_bytes(base.kv_heads, base.head_dim, base.dtype)
        deepest = max(len(stack) for stack in self.stacks.values())
        if pages < deepest:
            raise InvalidArgument(
                f"{wanted} bytes are {pages} pages, one token at {deepest} positions more", field="kv_bytes"
            )
        return PagePool(pages, base.kv_heads, base.head_dim, dtype=base.dtype, device=base.device)

    # Callers' side: any thread.

    def submit(self, request: Request, lease: Lease, on_event: Callable[[Event], None]) -> int:
        """Queues a request and takes over its lease; the answer comes to `on_event` on the engine's thread.

        Returns:
            The request's id, for `cancel`.

        Raises:
            InvalidArgument: a field is out of its range, or prompt and answer are too long.
            Exhausted: the queue is full.
            Unavailable: the engine drains or has failed. In all three cases the lease stays the caller's.
        """
        sequence = self._sequence(request, lease, on_event)
        with self._wake:
            if self._draining or self.failure is not None:
                raise Unavailable("the server is draining" if self._draining else "the engine has failed")
            waiting = [*self.scheduler.waiting, *self._submitted]
            if len(waiting) >= self.config.scheduler.max_queued:
                raise Exhausted(f"{len(waiting)} requests are waiting already", field="max_queued", retry_after=1.0)
            own, most = sum(s.lease.names == lease.names for s in waiting), self.config.scheduler.max_queued_per_adapter
            if most is not None and own >= most:
                raise Exhausted(
                    f"{own} requests for it are waiting already", field="max_queued_per_adapter", retry_after=1.0
                )
            self._submitted.append(sequence)
            self._wake.notify()
        return sequence.id

    def _sequence(self, request: Request, lease: Lease, on_event: Callable[[Event], None]) -> Sequence:
        validate(request, self.base.vocab_size)
        longest = len(request.prompt) + request.stopping.max_new_tokens
        if longest > self.max_tokens:
            raise InvalidArgument(
                f"{len(request.prompt)} and {request.stopping.max_new_tokens} tokens are "
                f"over the limit of {self.max_tokens} together",
                field="prompt and max_new_tokens",
            )
        self.scheduler.check(request, len(lease.stack))
        ends = self.base.tokenizer.eos_ids | lease.tokenizer.eos_ids  # configs may name any number
        return Sequence(
            id=next(self._ids),
            request=request,
            lease=lease,
            sampler=SamplerState(request, frozenset(t for t in ends if 0 <= t < self.base.vocab_size)),
            text=TextStream(lease.tokenizer, request.stopping.stop, request.prompt),
            on_event=on_event,
            table=PageTable(self.pool, len(lease.stack)),
            tokens=list(request.prompt),
        )

    def longest(self, depth: int) -> int:
        """Most tokens that prompt and answer can have together at so many positions."""
        return min(self.max_tokens, self.pool.total // depth * PAGE_TOKENS)

    def cancel(self, request_id: int) -> None:
        """Ends a request with Cancelled before the next step; does nothing if it has ended."""
        with self._wake:
            self._cancelled.add(request_id)
            self._wake.notify()

    def drain(self) -> None:
        """Refuses new requests from now on; those under way go on."""
        with self._wake:
            self._draining = True

    def start(self) -> None:
        """Starts the step thread."""
        gil.switch_often()
        # Half a million objects of libraries, which a full collection would look at for a third of a second.
        gc.collect()
        gc.freeze()
        self._thread = threading.Thread(target=self._run, name="lorarep-engine", daemon=True)
        self._thread.start()

    def stop(self, patience: float | None = None) -> None:
        """Ends the step thread after the step it is in; requests under way end with Unavailable.

        Args:
            patience: seconds to wait for that step; it may hang. None is without end.
        """
        with self._wake:
            self._draining = self._stopping = True
            self._wake.notify()
        if self._thread is not None:
            self._thread.join(patience)
            self._thread = None
            gc.unfreeze()

    def stats(self) -> Stats:
        """A snapshot, from any thread."""
        running, waiting = list(self.scheduler.running), [*self.scheduler.waiting, *self._submitted]
        return Stats(
            running=len(running),
            waiting=len(waiting),
            running_adapters=_names(running),
            waiting_adapters=_names(waiting),
            pages_used=self.pool.used,
            pages_total=self.pool.total,
            steps=self._step_rows.total(),
            step_rows=dict(self._step_rows),
            step_adapters=dict(self._step_adapters),
            preemptions=self.scheduler.preemptions,
            tokens_in=self._tokens_in,
            tokens_out=self._tokens_out,
        )

    def ledger(self) -> Ledger:
        """Where every byte of device memory is."""
        decoder = self._flights.decoder
        steps = [] if decoder is None else decoder.tensors()
        return take_stock(self.base, self.pool, self.adapters, steps)

    # The engine's side: one thread.

    def _run(self) -> None:
        try:
            while True:
                with self._wake:
                    self._wake.wait_for(lambda: self._stopping or self._submitted or self._cancelled or self._busy)
                    if self._stopping:
                        break
                self._step_or_wait()
            self._end_all(Unavailable("the server has stopped"))
        except BaseException as error:  # libraries in Rust panic with what is no Exception
            log.exception("the engine has failed")
            with self._wake:
                self.failure = error
            self._end_all(EngineFailure("the engine has failed"))
        finally:
            gil.release()

    @property
    def _busy(self) -> bool:
        return bool(self.scheduler.running or self.scheduler.waiting or self._flights.under_way or self._pass)

    def _step_or_wait(self) -> None:
        """A step; if all that there is waits for adapters, until one has come or a deadline may have passed."""
        if not self.step():
            with self._wake:
                news = self._wake.wait_for(
                    lambda: self._stopping or self._submitted or self._cancelled or self._arrived, DEADLINE_POLL
                )
                self._arrived &= not news

    def _arrival(self) -> None:
        with self._wake:
            self._arrived = True
            self._wake.notify()

    def step(self) -> bool:
        """Computes some tokens of some sequences; False if there was nothing to do."""
        failpoint("step")
        self._sweep()
        if self._flights.under_way is not None:
            self._land(self._flights.under_way)
            self._advance_prompts()
            return True
        chosen = self.scheduler.schedule()
        while self.scheduler.failed:
            self._end(*self.scheduler.failed.pop())
        decoding, rest = self._flights.divide(chosen)
        if not decoding:
            gil.release()  # no stream waits, and prompts take long
        if not chosen and self._pass is None:
            return False
        if chosen:
            self._count([sequence for sequence, _ in chosen])
        if decoding:
            self._launch(decoding)
        self._advance_prompts(rest)
        return True

    def _launch(self, sequences: Seq[Sequence]) -> None:
        """A step for sequences that decode, of which none is under way; where the next one needs its tokens, to its
        end."""
        flight = self._guarded(sequences, lambda: self._flights.launch(sequences))
        self._began = time.perf_counter()
        if flight is not None and flight.is_plain:
            self._flights.under_way = flight
        elif flight is not None:
            self._take(flight)

    def _advance_prompts(self, chosen: Seq[tuple[Sequence, int]] = ()) -> None:
        """Begins a pass over prompts or goes on with the one under way: all of it, or a slice where others decode."""
        if self._pass is None and not chosen:
            return
        sequences = [s for s, _ in chosen] if self._pass is None else self._pass.sequences

        def advance() -> bool:
            if self._pass is None:
                self._pass = PrefillPass(chosen, self.pool, self._forward)
                self.scheduler.computing = sequences
            if not self._pass.is_deserted:
                alone = all(s in sequences for s in self.scheduler.running)
                self._pass.advance(None if alone else self._pace.steps(), self._pace)
            return True

        worked, current = self._guarded(sequences, advance), self._pass
        if current is None:
            return
        if worked and current.sampled is None and not current.is_deserted:
            return
        self._pass, self.scheduler.computing = None, ()
        self._emit_all(current.sampled)
        current.give_back()

    def _forward(self, batch: Batch) -> Forward:
        decoder = self._flights.decoder
        return WholeForward(self.base, self.pool, batch) if decoder is None else decoder.prefill(batch)

    def _land(self, flight: LaunchedStep) -> None:
        """Emits the tokens of a step that was launched; if the same rows go on, their next step is launched before."""
        flights, sequences = self._flights, flight.sequences
        flights.under_way = None
        # Only early in a step: a processor that is slow for a while is not asked for more.
        at_leisure = time.perf_counter() < self._began + self._step_seconds / 4
        next_flight = self._guarded(sequences, lambda: flights.go_on(flight, at_leisure=at_leisure))
        if next_flight is not None:
            self._count(sequences)
            flights.under_way = next_flight
        self._take(flight)
        flight.give_back()

    @property
    def _step_seconds(self) -> float:
        """What a decoding step takes; infinity before there was one."""
        return (self._pace.decoding or math.inf) / 1e3

    def _take(self, flight: LaunchedStep) -> None:
        """Waits for the tokens of a step and emits them. Meanwhile others have the interpreter, and then not before
        the next wait, unless nobody is left."""
        gil.release(self._began + self._step_seconds)
        sampled = self._guarded(flight.sequences, flight.sampled)
        gil.claim()
        self._began = time.perf_counter()
        self._emit_all(sampled)
        self._pace.decoding = flight.milliseconds
        if not self.scheduler.running:
            gil.release()

    def _count(self, sequences: Seq[Sequence]) -> None:
        self._step_rows[len(sequences)] += 1
        self._step_adapters[len({id(s.lease.adapter) for s in sequences if s.lease.adapter is not None})] += 1

    def _guarded(self, sequences: Seq[Sequence], work: Callable[[], T]) -> T | None:
        """What some work of a step gives. If it fails these sequences end; the others, and the next ones, go on, unless
        nothing has worked for some time."""
        try:
            failpoint("forward")
            done = work()
        except Exception:
            log.exception("a forward pass failed")
            if self.base.device.type == "cuda":
                torch.cuda.synchronize(self.base.device)  # a lost device raises again here and ends the engine
            for sequence in sequences:
                if sequence in self.scheduler.running:
                    self._end(sequence, EngineFailure("the forward pass failed"))
            self._failures += 1
            if self._failures == MAX_FAILURES:
                raise
            return None
        self._failures = 0
        return done

    def _emit_all(self, sampled: Seq[tuple[Sequence, Sampled]] | None) -> None:
        for sequence, token in sampled or ():
            if sequence in self.scheduler.running:  # else it ended while its next step was under way
                try:
                    self._emit(sequence, token)
                except LorarepError as error:  # of its tokenizer, which may be its adapter's
                    self._end(sequence, error)

    def _sweep(self) -> None:
        """Takes in what callers have said since the last step."""
        with self._wake:
            while self._submitted:
                self.scheduler.waiting.append(self._submitted.popleft())
            cancelled, self._cancelled = self._cancelled, set()
        now = time.monotonic()
        for sequence in [*self.scheduler.running, *self.scheduler.waiting]:
            deadline = sequence.request.deadline
            if sequence.id in cancelled:
                self._end(sequence, Cancelled("the caller cancelled"))
            elif deadline is not None and now >= deadline:
                self._end(sequence, DeadlineExceeded("the request's deadline has passed"))

    def _emit(self, sequence: Sequence, sampled: Sampled) -> None:
        """Adds a token to an answer, and ends the answer where the token does."""
        now, token, stopping = time.monotonic(), sampled.token, sequence.request.stopping
        if sequence.first_token is None:
            sequence.first_token = now
            self._tokens_in += len(sequence.request.prompt)
        self._tokens_out += 1
        sequence.tokens.append(token)
        sequence.sampler.append(token)
        reason, text, stop = None, "", ""
        if token in stopping.stop_token_ids:
            reason = FinishReason.STOP_TOKEN
        elif token in sequence.sampler.eos_ids and not stopping.ignore_eos:
            reason = FinishReason.END_TOKEN
        else:
            text, stop = sequence.text.feed(token, may_stop=sequence.new_tokens >= stopping.min_new_tokens)
            if stop:
                reason = FinishReason.STOP_STRING
            elif sequence.new_tokens == stopping.max_new_tokens:
                reason = FinishReason.LENGTH
        if reason not in (None, FinishReason.STOP_STRING):
            text += sequence.text.finish()
        logprobs = () if sampled.logprob is None else (sampled.logprob,)
        self._tell(sequence, Output((token,), text, logprobs))
        if reason is not None:
            started = sequence.started or now
            timings = Timings(started - sequence.submitted, sequence.first_token - started, now - sequence.first_token)
            self._end(sequence, Finished(reason, len(sequence.request.prompt), sequence.new_tokens, timings, stop))

    def _end(self, sequence: Sequence, event: Finished | LorarepError) -> None:
        self.scheduler.remove(sequence)
        if self._pass is not None and sequence in self._pass.sequences:
            self._pass.end(sequence)
        else:
            self._flights.release(sequence)
        self._tell(sequence, event)

    def _end_all(self, error: LorarepError) -> None:
        self._sweep()
        for sequence in [*self.scheduler.running, *self.scheduler.waiting]:
            self._end(sequence, error)
        if self._flights.under_way is not None:
            self._flights.under_way.give_back()
        if self._pass is not None:
            self._pass.give_back(wait=False)

    @staticmethod
    def _tell(sequence: Sequence, event: Event) -> None:
        try:
            sequence.on_event(event)
        except Exception:
            log.exception("a caller's callback failed")

    # Without a thread: tests, verify, benchmarks.

    def generate(self, requests: Iterable[tuple[Request, Lease]]) -> list[Completion]:
        """Answers requests together, stepping here unless the step thread does.

        Raises:
            LorarepError: the first request's that fails.
        """
        streams: list[list[Event]] = []
        ended = threading.Semaphore(0)
        for request, lease in requests:
            events: list[Event] = []
            streams.append(events)

            def on_event(event: Event, events: list[Event] = events) -> None:
                events.append(event)
                if not isinstance(event, Output):
                    ended.release()

            self.submit(request, lease, on_event)
        if self._thread is None:
            while self._busy or self._submitted:
                self._step_or_wait()
        for _ in streams:
            ended.acquire()
        return [_completion(events) for events in streams]

    def logits(self, tokens: Seq[int], lease: Lease) -> Tensor:
        """The fp32 logits (tokens, vocab) of every token of a text, computed in one pass; keeps the lease.

        Raises:
            Exhausted: the pages or the adapter memory for it are not free. Not while the step thread runs.
        """
        lease.wait()
        table = PageTable(self.pool, len(lease.stack))
        if not table.grow(len(tokens)):
            raise Exhausted(f"{table.missing(len(tokens))} pages wanted, {self.pool.free} free", field="kv_bytes")
        try:
            batch = Batch([Span(tokens, 0, lease.stack, lease.adapter, table)], self.base.device)
            return self.base.forward(batch, self.pool, torch.arange(len(tokens), device=self.base.device))
        finally:
            table.release()


def _names(sequences: Iterable[Sequence]) -> tuple[str, ...]:
    return tuple(sorted({name for sequence in sequences for name in sequence.lease.names}))


def _completion(events: Seq[Event]) -> Completion:
    *outputs, last = events
    if isinstance(last, Exception):
        raise last
    assert isinstance(last, Finished)
    parts = [event for event in outputs if isinstance(event, Output)]
    return Completion(
        tokens=tuple(t for part in parts for t in part.tokens),
        text="".join(part.text for part in parts),
        logprobs=tuple(p for part in parts for p in part.logprobs),
        finished=last,
    )
