"""Whole answers and logits for tests, `verify` and benchmarks, which have no streams."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor

from lorarep_runtime.adapters.lease import Lease
from lorarep_runtime.engine.step_loop import StepLoop
from lorarep_runtime.errors import Exhausted
from lorarep_runtime.model.base import Base
from lorarep_runtime.model.batch import Batch, Span
from lorarep_runtime.model.kv_cache import PagePool, PageTable
from lorarep_runtime.request import Event, Finished, Output, PromptLogprobs, Request, TokenLogprob

Submit = Callable[[Request, Lease, Callable[[Event], None]], int]
"""`Engine.submit`."""


@dataclass(frozen=True)
class Completion:
    """The whole answer to one request: tokens, text, log-probabilities and the reason of its end."""

    tokens: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprob, ...]
    finished: Finished
    prompt_logprobs: PromptLogprobs | None = None


def generate(submit: Submit, loop: StepLoop | None, requests: Iterable[tuple[Request, Lease]]) -> list[Completion]:
    """Submits requests together and waits for their whole answers.

    Args:
        loop: stepped here until it has nothing to do; None where a thread runs it.
        requests: each with its lease, which the engine takes over.

    Raises:
        LorarepError: the error of the first request that fails.
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

        submit(request, lease, on_event)
    if loop is not None:
        while loop.is_busy:
            loop.step_or_wait()
    for _ in streams:
        ended.acquire()
    return [_completion(events) for events in streams]


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
        prompt_logprobs=parts[0].prompt_logprobs,
    )


def logits(base: Base, pool: PagePool, tokens: Seq[int], lease: Lease) -> Tensor:
    """The fp32 logits (tokens, vocab) of every token of a text; aLoRA takes two passes. The lease stays the caller's.

    Raises:
        Exhausted: too few pages, or too little adapter memory, are free.
    """
    lease.wait()
    table = PageTable(pool, len(lease.stack))
    if not table.grow(len(tokens)):
        raise Exhausted(f"{table.missing(len(tokens))} pages wanted, {pool.free} free", field="kv_bytes")
    try:
        first = min(lease.first_adapted(tokens), len(tokens))
        found = []
        for begin, end, adapter in ((0, first, None), (first, len(tokens), lease.adapter)):
            if begin < end:
                batch = Batch([Span(tokens[begin:end], begin, lease.stack, adapter, table)], base.device)
                found.append(base.forward(batch, pool, torch.arange(end - begin)))
        return torch.cat(found)[:, : lease.vocab_size]
    finally:
        table.release()
