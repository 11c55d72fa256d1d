"""Ten thousand small requests with random adapters, cancellations and deadlines."""

from __future__ import annotations

import gc
import random
import threading
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from lorarep_runtime.errors import Cancelled, DeadlineExceeded, Exhausted
from lorarep_runtime.request import Event, Finished, Output, Request
from tests.support.engines import assert_nothing_held, engine_for, greedy, sampled
from tests.support.models import save_adapter, save_base

REQUESTS = 10_000
KINDS = 60
"""Distinct requests, each with the answer that it gives alone."""
AT_ONCE = 144
"""Requests that have been submitted and have not ended."""


def test_ten_thousand_requests_leave_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # All products by BLAS: oneDNN keeps a kernel for every shape it meets, which for a while looks like growth.
    monkeypatch.setattr("lorarep_runtime.model.weights.FEW_ROWS", range(1, 1 << 20))
    base = save_base("llama", tmp_path / "base", num_hidden_layers=3)
    maps = {"short": [[0, 2]], "plain": None, "long": [[0, 2], [1, 3]]}
    adapters = {
        f"{kind} {name}": save_adapter(
            base,
            tmp_path / f"{kind}-{name}",
            r=4,
            use_dora=kind == "dora",
            target_modules=["q_proj", "down_proj"],
            layer_replication=ranges,
        )
        for name, ranges in maps.items()
        for kind in ("lora", "dora")
    }
    # Pages for about half of the sequences, so that preemption happens all the time. Many sequences a step, since a
    # step's time hardly depends on their number.
    pages = 110 * 2 * 16 * 2 * 16 * 4
    engine = engine_for(base, adapters=adapters, kv_bytes=pages, max_sequences=96, max_queued=192)
    dice = random.Random(5)
    asked: list[tuple[Request, list[tuple[str, float]]]] = []
    for i in range(KINDS):
        prompt = tuple(dice.randrange(256) for _ in range(dice.randrange(1, 12)))
        names = dice.choice([[], [(dice.choice(list(adapters)), 1.0)], [("lora long", 0.5), ("dora long", 1.0)]])
        make = dice.choice([lambda p, n, i=i: sampled(i, p, n), lambda p, n: greedy(p, n)])
        asked.append((make(prompt, dice.randrange(1, 18)), names))
    alone = [engine.generate([(request, engine.adapters.lease(names))])[0].tokens for request, names in asked]

    engine.start()
    room = threading.Semaphore(AT_ONCE)
    wrong: list[str] = []
    ended = dict.fromkeys((Finished, Cancelled, DeadlineExceeded), 0)

    def submit(kind: int, cancel: bool, deadline: float | None) -> None:
        request, names = asked[kind]
        if deadline is not None:
            request = replace(request, deadline=time.monotonic() + deadline)
        tokens: list[int] = []

        def on_event(event: Event) -> None:
            if isinstance(event, Output):
                tokens.extend(event.tokens)
                return
            ended[type(event)] += 1
            expected = alone[kind]
            if tuple(tokens) != (expected if isinstance(event, Finished) else expected[: len(tokens)]):
                wrong.append(f"{asked[kind]}: {tokens}")
            room.release()

        while True:
            lease = engine.adapters.lease(names)
            try:
                number = engine.submit(request, lease, on_event)
                break
            except Exhausted:
                lease.release()
                time.sleep(0.001)
        if cancel:
            engine.cancel(number)

    memory = []
    for i in range(REQUESTS):
        assert room.acquire(timeout=600)
        submit(
            dice.randrange(KINDS),
            cancel=dice.random() < 0.1,
            deadline=dice.choice([0.0, 0.001, 0.01]) if dice.random() < 0.1 else None,
        )
        if i in (REQUESTS // 3, REQUESTS - 1):
            gc.collect()
            memory.append(psutil.Process().memory_info().rss)
    for _ in range(AT_ONCE):
        assert room.acquire(timeout=600)
    engine.stop()
    assert wrong == []
    assert sum(ended.values()) == REQUESTS
    assert min(ended.values()) > 100
    assert_nothing_held(engine)
    assert engine.stats().preemptions > 100
    assert memory[1] < memory[0] + (8 << 20), f"resident bytes grew from {memory[0]} to {memory[1]}"
    assert engine.failure is None
