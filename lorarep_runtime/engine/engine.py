"""The engine: one base with its stacks and adapters, and the front through which any thread asks for answers.

A request's way: `Engine.submit` checks it and puts it into the `Inbox`. The `StepLoop`, on a thread of its own, takes
it from there and schedules it, computes its tokens and calls it back with them. The engine knows token ids and leases;
names of adapters end in `adapters.registry`, text in `text`.
"""

from __future__ import annotations

import gc
import itertools
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Seq
from contextlib import ExitStack

from torch import Tensor

from lorarep_runtime.adapters.ends import MAX_NEW_TOKENS
from lorarep_runtime.adapters.lease import Lease
from lorarep_runtime.adapters.maker import AdapterMaker
from lorarep_runtime.adapters.rank_makers import LeadingMaker
from lorarep_runtime.adapters.registry import AdapterRegistry
from lorarep_runtime.config import PAGE_TOKENS, EngineConfig
from lorarep_runtime.device import gil
from lorarep_runtime.device.ranks import Ranks
from lorarep_runtime.engine import offline
from lorarep_runtime.engine.inbox import Inbox
from lorarep_runtime.engine.leader import LeadingBase, LeadingPool, start_ranks
from lorarep_runtime.engine.leading_decoder import LeadingDecoder
from lorarep_runtime.engine.ledger import Ledger, take_stock
from lorarep_runtime.engine.masks import MaskedAnswer, mask_threads
from lorarep_runtime.engine.outputs import Outputs
from lorarep_runtime.engine.overlap import StepDecoder, StepOverlap
from lorarep_runtime.engine.plans import Plans
from lorarep_runtime.engine.prefill_pass import SlicedPrefill, WholeForward
from lorarep_runtime.engine.preparation import DecoderSizes, free_bytes, make_decoder, prepare_device
from lorarep_runtime.engine.prompt_scores import most_rows
from lorarep_runtime.engine.sampler import SamplerState
from lorarep_runtime.engine.scheduler import Scheduler
from lorarep_runtime.engine.sequence import Sequence
from lorarep_runtime.engine.stats import Stats, StatsRecorder
from lorarep_runtime.engine.step_loop import StepLoop
from lorarep_runtime.engine.validation import validate, validate_length
from lorarep_runtime.errors import FailedPrecondition, InvalidArgument
from lorarep_runtime.model.base import Base
from lorarep_runtime.model.kv_cache import PagePool, PageTable, pages_of
from lorarep_runtime.model.prefix_cache import PrefixKeys
from lorarep_runtime.model.stack import Stack
from lorarep_runtime.progress import Progress
from lorarep_runtime.request import Event, Request
from lorarep_runtime.text.detokenizer import TextStream
from lorarep_runtime.text.grammar import Grammars

BASE_STACK = "base"
"""Name of the stack that is the base's own order of layers."""
CPU_KV_BYTES = 1 << 30
"""Bytes of KV pages on a CPU where the configuration says nothing."""
ACCELERATOR_KV_SHARE = 0.8
"""Part of the free device memory that KV pages take where the configuration says nothing."""
CPU_SEQUENCES, LEAST_SEQUENCES, MOST_SEQUENCES = 32, 8, 256
"""Sequences in one step where the configuration says nothing: on a CPU, and at least and at most on an accelerator."""
USUAL_TOKENS = 1024
"""Tokens of a sequence for which an accelerator has to have room, for one sequence more in a step."""
CUBLAS_WORKSPACE = ":1024:1"
"""1 MiB: torch keeps 8 MiB, on Hopper 32 MiB, for every thread and stream that has multiplied something
(https://docs.nvidia.com/cuda/cublas, CUBLAS_WORKSPACE_CONFIG)."""


class Engine:
    """Answers requests on one base, its stacks and its adapters. Any thread may call it, except where a method says so.

    Raises:
        LorarepError: the base cannot be served as configured.
    """

    def __init__(self, config: EngineConfig, progress: Progress | None = None) -> None:
        self.config = config
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", CUBLAS_WORKSPACE)
        self.ranks: Ranks | None = None
        """The other ranks' processes, where several share the base."""
        with ExitStack() as at_failure:
            at_failure.callback(self.close)
            self._make(progress)
            at_failure.pop_all()

    def _make(self, progress: Progress | None) -> None:
        config = self.config
        if config.base.tensor_parallel > 1:
            if config.deterministic:
                raise FailedPrecondition("no base that several ranks share can be", field="deterministic")
            self.ranks = start_ranks(config.base)
            self.ranks.guarded(lambda: self._load(progress))
        else:
            self._load(progress)

    def _load(self, progress: Progress | None) -> None:
        config, ranks = self.config, self.ranks
        self.base = Base(config.base, progress) if ranks is None else LeadingBase(config.base, ranks, progress)
        if config.deterministic and self.base.device.type != "cuda":
            self.base.make_deterministic()
        self.stacks: Mapping[str, Stack] = _named_stacks(config.stacks, self.base.layers)
        maker = AdapterMaker(self.base) if ranks is None else LeadingMaker(self.base, ranks)
        self.adapters = AdapterRegistry(self.base, self.stacks, config.adapters, config.base.cache_dir, maker)
        self.max_tokens = config.scheduler.max_sequence_tokens or self.base.max_tokens
        """Most tokens of prompt and answer together."""
        if self.max_tokens > self.base.max_tokens:
            raise InvalidArgument(
                f"{self.max_tokens} is over the {self.base.max_tokens} that the base serves",
                field="max_sequence_tokens",
            )
        if ranks is not None:
            ranks.tell("prepare_device")
        prepare_device(self.base)
        if ranks is not None:
            ranks.answers()
        deepest = max(map(len, self.stacks.values()))
        self.pool = _page_pool(self.base, config.scheduler.kv_bytes, deepest)
        self._shallowest = min(map(len, self.stacks.values()))
        self.max_sequences = config.scheduler.max_sequences or _most_sequences(self.pool, deepest)
        """Most sequences in one step."""
        self._ids = itertools.count(1)
        self._plans = Plans(self.base.layers)
        self._grammars = Grammars()
        self._mask_threads = mask_threads()
        self._inbox = Inbox(config.scheduler)
        self._stats = StatsRecorder(self.pool.total)
        self._thread: threading.Thread | None = None
        self.loop = self.make_loop(self._decoder(progress))
        self.adapter_bytes = config.adapters.device_bytes or _free_bytes(self.base)
        """Device bytes for adapters: the configuration's, or all that was free once the rest had been made."""
        self._other_ranks = [] if ranks is None else ranks.ask("held_bytes")
        """Bytes by their use on each other rank, before there were adapters."""
        self.adapters.residency.subscribe(self._inbox.announce_adapter)
        if ranks is not None:
            ranks.subscribe(self._inbox.report_failure)

    def _decoder(self, progress: Progress | None) -> StepDecoder | None:
        """The captured decode steps of all stacks, where the base and its device have kernels for them."""
        deterministic = self.config.deterministic
        sizes = DecoderSizes(self.max_sequences, self.max_tokens, pages_of(self.longest(1)), deterministic)
        warmed = list(dict.fromkeys(self.stacks.values())), self.config.adapters.max_rank
        if self.ranks is not None:
            self.ranks.tell("make_decoder", sizes, *warmed)
        decoder = make_decoder(self.base, self.pool, sizes, *warmed, progress)
        if self.ranks is None:
            return decoder
        self.ranks.answers()
        return None if decoder is None else LeadingDecoder(decoder, self.ranks)

    def make_loop(self, decoder: StepDecoder | None) -> StepLoop:
        """A step loop behind this engine's inbox.

        Args:
            decoder: computes decode steps and prefill passes; None leaves both to the base's own layers.
        """
        base, pool = self.base, self.pool
        scheduler = Scheduler(
            self.config.scheduler,
            pool,
            self.adapters.residency,
            self.max_sequences,
            base.layers,
            self._plans,
            most_rows,
        )
        forward = (lambda batch: WholeForward(base, pool, batch)) if decoder is None else decoder.prefill
        return StepLoop(
            self._inbox,
            scheduler,
            StepOverlap(decoder, scheduler, all_prompts=self.config.deterministic),
            SlicedPrefill(forward, scheduler),
            Outputs(self._stats),
            self._stats,
        )

    def check(self, request: Request) -> None:
        """Refuses what `submit` would refuse with any adapters. Raises as `submit`, with the field's name."""
        validate(request, self.base.vocab_size + (MAX_NEW_TOKENS if self.base.ends.embedding is not None else 0))
        self._check_scoring(request)
        validate_length(request, 1, max_tokens=self.max_tokens, total_pages=self.pool.total)

    def submit(self, request: Request, lease: Lease, on_event: Callable[[Event], None]) -> int:
        """Queues a request and takes over its lease. The step loop's thread calls `on_event` with each event.

        Returns:
            The request's id, for `cancel`.

        Raises:
            InvalidArgument: a field is out of its range, or prompt and answer are too long.
            FailedPrecondition: log-probabilities of the prompt are wanted, and are not deterministic here.
            Exhausted: the queue is full.
            Unavailable: the engine stops or has failed. In all cases the lease stays the caller's.
        """
        depth = len(lease.stack)
        validate_length(
            request,
            depth,
            shallowest=self._shallowest,
            max_tokens=self.max_tokens,
            total_pages=self.pool.total,
        )
        validate(request, lease.vocab_size)
        self._check_scoring(request)
        ends = self.base.tokenizer.eos_ids | lease.tokenizer.eos_ids  # configs may name any number
        first_adapted = lease.first_adapted(request.prompt)
        sequence = Sequence(
            id=next(self._ids),
            request=request,
            lease=lease,
            sampler=self._sampler(request, lease, frozenset(t for t in ends if 0 <= t < lease.vocab_size)),
            text=TextStream(
                lease.tokenizer, request.stopping.stop, request.prompt, special_tokens=request.special_tokens
            ),
            on_event=on_event,
            table=PageTable(self.pool, depth),
            tokens=list(request.prompt),
            keys=self._prefix_keys(request, lease, first_adapted),
            first_adapted=first_adapted,
        )
        self._plans.enter(lease.stack)
        try:
            self._inbox.submit(sequence)
        except BaseException:
            self._plans.leave(lease.stack)
            raise
        return sequence.id

    def _check_scoring(self, request: Request) -> None:
        if request.prompt_logprobs is not None and self.config.deterministic and self.loop.overlap.decoder is not None:
            raise FailedPrecondition(
                "prompts are rows of captured steps, which have the logits of the last one alone: a server that is not "
                "deterministic gives them",
                field="prompt_logprobs",
            )

    def _sampler(self, request: Request, lease: Lease, ends: frozenset[int]) -> SamplerState:
        """The state of an answer's tokens. Its form is compiled here and not in the step loop's thread."""
        state = SamplerState(request, ends, lease.vocab_size)
        if request.structured_output is not None:
            grammar = self._grammars.compile(request.structured_output, lease.tokenizer, lease.vocab_size, sorted(ends))
            state.form = MaskedAnswer(grammar, self._mask_threads, state.excluded)
        return state

    def _prefix_keys(self, request: Request, lease: Lease, first_adapted: int) -> PrefixKeys | None:
        """The keys of a prompt's pages, hashed here and not in the step loop's thread; None without a prefix cache."""
        if not self.config.scheduler.prefix_cache:
            return None
        keys = PrefixKeys(lease.stack, lease.contents, request.cache_salt, first_adapted)
        keys.extend(request.prompt)
        return keys

    def cancel(self, request_id: int) -> None:
        """Ends a request with Cancelled before the next step; does nothing if it has ended."""
        self._inbox.cancel(request_id)

    def longest(self, depth: int) -> int:
        """Most tokens that prompt and answer can have together on a stack of `depth` positions."""
        return min(self.max_tokens, self.pool.total // self._counted(depth) * PAGE_TOKENS)

    def _counted(self, depth: int) -> int:
        """Positions that a stack's longest sequence is bounded by: no stack has longer ones than the shallowest named.

        Tables of pages on the device have to have room for the longest sequence of any stack.
        """
        return max(depth, self._shallowest)

    def start(self) -> None:
        """Starts the step loop's thread."""
        gil.switch_often()
        # Half a million objects of libraries, which a full collection would look at for a third of a second.
        gc.collect()
        gc.freeze()
        self._thread = threading.Thread(target=self.loop.run, name="lorarep-engine", daemon=True)
        self._thread.start()

    def stop(self, patience: float | None = None) -> None:
        """Ends the step loop after the step it is in. All requests end with Unavailable, and no new one is accepted.

        Args:
            patience: seconds to wait for that step, which may hang; None waits without end.
        """
        self._inbox.stop()
        if self._thread is not None:
            self._thread.join(patience)
            self._thread = None
            gc.unfreeze()
        self.close()

    def close(self) -> None:
        """Ends the other ranks, where there are any: nothing is computed from now on."""
        if self.ranks is not None:
            self.ranks.close()

    @property
    def failure(self) -> BaseException | None:
        """The error that ended the step loop's thread, if one did."""
        return self._inbox.failure

    @property
    def turns(self) -> int:
        """The number of steps that the step loop has begun. It stands still while a step hangs, and without work."""
        return self.loop.turns

    def stats(self) -> Stats:
        """A snapshot of the requests, pages, steps and tokens."""
        return self._stats.snapshot(self._inbox.waiting_by_adapter())

    def ledger(self) -> Ledger:
        """The device memory in use, byte by byte."""
        decoder = self.loop.overlap.decoder
        steps = [] if decoder is None else decoder.tensors()
        return take_stock(self.base, self.pool, self.adapters, steps, self._other_ranks)

    def generate(self, requests: Iterable[tuple[Request, Lease]]) -> list[offline.Completion]:
        """Answers requests together; steps in this thread unless the engine has been started.

        Raises:
            LorarepError: the error of the first request that fails.
        """
        return offline.generate(self.submit, self.loop if self._thread is None else None, requests)

    def logits(self, tokens: Seq[int], lease: Lease) -> Tensor:
        """The fp32 logits (tokens, vocab) of every token of a text, computed in one pass; the lease stays the caller's.

        Only for an engine that has not been started.

        Raises:
            Exhausted: too few pages, or too little adapter memory, are free.
        """
        return offline.logits(self.base, self.pool, tokens, lease)


def _named_stacks(configured: Mapping[str, Stack], layers: int) -> dict[str, Stack]:
    stacks = {BASE_STACK: tuple(range(layers))}
    for name, stack in configured.items():
        if name == BASE_STACK:
            raise InvalidArgument(f"{BASE_STACK!r} is the base's own order and cannot be named anew", field="stacks")
        if not stack or any(not 0 <= layer < layers for layer in stack):
            raise InvalidArgument(f"{name!r} leaves the base's {layers} layers", field="stacks")
        stacks[name] = stack
    return stacks


def _most_sequences(pool: PagePool, deepest: int) -> int:
    """Most sequences in one step where the configuration says nothing."""
    if pool.key_pages.device.type == "cpu":
        return CPU_SEQUENCES
    return max(LEAST_SEQUENCES, min(MOST_SEQUENCES, pool.total // (deepest * pages_of(USUAL_TOKENS))))


def _free_bytes(base: Base) -> int:
    """Bytes that nothing has taken, on the rank that has the fewest."""
    others = base.ranks.ask("free_bytes") if isinstance(base, LeadingBase) else []
    return min([free_bytes(base), *others])


def _page_pool(base: Base, wanted: int | None, deepest: int) -> PagePool:
    """The pages of the KV cache, in `wanted` bytes, or in as many as the device has to spare."""
    if wanted is None:
        wanted = CPU_KV_BYTES
        if base.device.type == "cuda":
            wanted = int(_free_bytes(base) * ACCELERATOR_KV_SHARE)
    pages = wanted // base.kv_shape.page_bytes(base.dtype)
    if pages < deepest:
        raise InvalidArgument(
            f"{wanted} bytes are {pages} pages, one token at {deepest} positions more", field="kv_bytes"
        )
    if isinstance(base, LeadingBase):
        return LeadingPool(pages, base)
    return PagePool(pages, base.kv_shape, dtype=base.dtype, device=base.device)
