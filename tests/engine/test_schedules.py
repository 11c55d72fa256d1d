"""Whatever comes when, whatever is cached, with however few pages: an answer is what its request gives alone."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from lorarep_runtime.device import gil
from lorarep_runtime.engine import stack_turns
from lorarep_runtime.engine.engine import Engine
from lorarep_runtime.engine.prefill_pass import SlicePacer
from lorarep_runtime.engine.step_loop import StepLoop
from lorarep_runtime.model import kv_cache as cache
from lorarep_runtime.model.kv_cache import PagePool, pages_of
from lorarep_runtime.request import Event, Finished, Output, Request, Sampling, Stopping
from tests.support.decoders import with_decoder
from tests.support.engines import assert_nothing_held, engine_for
from tests.support.models import save_adapter, save_base

PAGE = 2 * 16 * 2 * 16 * 4
LONGEST = 64
DEPTHS = {None: 6, "deep": 7, "other": 6}
SEEDS = 12
COMMON = tuple(range(100, 134))
"""With this, or a part of it, most prompts begin."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base("qwen2", tmp_path_factory.mktemp("schedules") / "base")


@pytest.fixture(scope="module")
def adapters(base: Path) -> dict[str, Path]:
    ranges = {"deep": [[0, 4], [2, 5]], "other": [[3, 6], [0, 3]]}
    return {
        name: save_adapter(base, base.parent / name, r=4, target_modules=["q_proj"], layer_replication=replicated)
        for name, replicated in ranges.items()
    }


@pytest.fixture(scope="module")
def undisturbed(base: Path, adapters: dict[str, Path]) -> Engine:
    return engine_for(base, adapters=adapters, prefix_cache=False)


@pytest.fixture(autouse=True)
def pages_that_go_back_hold_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    give = PagePool.give

    def spoil(self: PagePool, pages) -> None:
        for tensor in self.tensors:
            tensor[torch.from_numpy(pages.ravel())] = torch.nan
        give(self, pages)

    monkeypatch.setattr(PagePool, "give", spoil)


@dataclass
class Caller:
    request: Request
    adapter: str | None
    cancelled_at: float
    """Step."""
    id: int = 0
    tokens: list[int] = field(default_factory=list)
    last: Event | None = None

    def submit(self, engine: Engine) -> None:
        lease = engine.adapters.lease([(self.adapter, 1.0)] if self.adapter else [])
        self.id = engine.submit(self.request, lease, self.on_event)

    def on_event(self, event: Event) -> None:
        if isinstance(event, Output):
            self.tokens += event.tokens
        else:
            self.last = event


def any_sampling(dice: random.Random) -> Sampling:
    seed, drawn = dice.randrange(1000), dice.choice([0, 0.7, 1.5])
    if dice.random() < 0.3:
        return Sampling(temperature=drawn, repetition_penalty=1.2, frequency_penalty=dice.choice([0, 0.5]), seed=seed)
    return Sampling(temperature=drawn, top_k=dice.choice([0, 40]), top_p=dice.choice([1, 0.9]), seed=seed)


def any_caller(dice: random.Random, pages: int) -> Caller:
    adapter, length, common = dice.choice([*DEPTHS]), dice.randint(1, 40), 0
    if dice.random() < 0.7:
        length, common = dice.choice([(20, 18), (33, 33), (36, 33), (40, 33)])
    room = min(LONGEST, pages // DEPTHS[adapter] * 16) - length
    most = dice.randint(1, room)
    stopping = Stopping(most, dice.choice([0, 0, min(5, most)]), ignore_eos=dice.random() < 0.7)
    prompt = COMMON[:common] + tuple(dice.randrange(256) for _ in range(length - common))
    request = Request(prompt, any_sampling(dice), stopping, logprobs=dice.choice([None] * 6 + [1]))
    return Caller(request, adapter, dice.choice([math.inf] * 4 + [dice.randint(1, 30)]))


@pytest.mark.parametrize("seed", range(SEEDS))
def test_answers_are_those_of_requests_alone(
    seed: int, base: Path, adapters: dict[str, Path], undisturbed: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    dice = random.Random(seed)
    monkeypatch.setattr(SlicePacer, "visits", lambda self: dice.randint(1, 3))
    monkeypatch.setattr(stack_turns, "LONGEST_PLAN", dice.choice([1, 8]))
    monkeypatch.setattr(cache, "WIPED", dice.choice([1, 3, 4096]))
    pages = dice.choice([30, 37, 50, 200])
    engine = engine_for(
        base,
        adapters=adapters,
        kv_bytes=pages * PAGE,
        max_sequences=dice.choice([2, 3, 8]),
        max_step_tokens=dice.choice([8, 16, 64]),
        max_sequence_tokens=LONGEST,
        chunked_prefill=dice.random() < 0.7,
        prefix_cache=dice.random() < 0.8,
    )
    with_decoder(engine)
    callers = [any_caller(dice, engine.pool.total) for _ in range(dice.randint(3, 7))]
    coming, steps = list(callers), 0
    while coming or engine.loop.is_busy:
        if coming and (dice.random() < 0.3 or not engine.loop.is_busy):
            coming.pop().submit(engine)
        for caller in callers:
            if steps >= caller.cancelled_at:
                engine.cancel(caller.id)
        monkeypatch.setattr(StepLoop, "has_time", dice.choice([False, True]))
        engine.loop.step_or_wait()
        steps += 1
        running = engine.loop.scheduler.running
        pages_used = [page for sequence in running for page in sequence.table.pages.ravel().tolist()]
        assert engine.pool.used == len(set(pages_used))
        assert all(sequence.table.pages.shape[1] <= pages_of(LONGEST) for sequence in running)
    assert gil._until == math.inf, "others wait for nobody"
    assert_nothing_held(engine)
    for caller in callers:
        alone = Caller(caller.request, caller.adapter, math.inf)
        alone.submit(undisturbed)
        while undisturbed.loop.is_busy:
            undisturbed.loop.step()
        if isinstance(caller.last, Finished):
            assert caller.tokens == alone.tokens
        else:
            assert steps >= caller.cancelled_at
            assert caller.tokens == alone.tokens[: len(caller.tokens)]
