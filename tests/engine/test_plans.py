"""Plans are made where no stream waits for it, and a step without the one that it wants goes on without the stack."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given

from lorarep_runtime.engine import plans
from lorarep_runtime.engine.plans import MOST_PLANS, Plans
from lorarep_runtime.engine.stack_turns import StackTurns
from lorarep_runtime.model import batch
from lorarep_runtime.model.plan import Plan, merge
from lorarep_runtime.model.stack import Stack
from tests.model.test_stack import STACKS
from tests.support.engines import PROMPT, engine_for, greedy
from tests.support.loops import AtOnce
from tests.support.models import save_base

LAYERS = 4
BASE = tuple(range(LAYERS))
DEEP, OTHER, THIRD = (*BASE, *BASE), (1, 0, 1), (3, 2)


class Later(AtOnce):
    """Keeps what is submitted until it is told to run it."""

    def __init__(self) -> None:
        self._jobs: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []

    def submit(self, work: Callable[..., Any], /, *arguments: Any, **named: Any) -> Future[Any]:
        self._jobs.append((work, arguments))
        return Future()

    def run(self) -> None:
        jobs, self._jobs = self._jobs, []
        for work, arguments in jobs:
            work(*arguments)


def test_a_stack_waits_for_its_plan_and_streams_go_on_meanwhile() -> None:
    thread = Later()
    turns = StackTurns(LAYERS, Plans(LAYERS, thread))
    turns.begin_step([])
    assert turns.joins(DEEP)
    assert not turns.joins(OTHER)
    assert turns.begin_step([DEEP, OTHER]) == {OTHER}
    thread.run()
    assert not turns.begin_step([DEEP, OTHER])
    assert turns.plan == merge(tuple(sorted([DEEP, OTHER])))


def test_those_that_are_left_walk_the_old_plan_until_they_have_their_own() -> None:
    thread = Later()
    made = Plans(LAYERS, thread)
    turns = StackTurns(LAYERS, made)
    for stack in (DEEP, OTHER, THIRD):
        made.enter(stack)
    assert not turns.begin_step([DEEP, OTHER, THIRD])
    assert not turns.begin_step([DEEP, THIRD])
    assert set(turns.plan.stacks) == {DEEP, OTHER, THIRD}
    thread.run()
    assert not turns.begin_step([DEEP, THIRD])
    assert set(turns.plan.stacks) == {DEEP, THIRD}


def test_a_request_has_the_plan_made_that_it_and_those_under_way_need() -> None:
    thread = Later()
    made = Plans(LAYERS, thread)
    for stack in (DEEP, DEEP, OTHER):
        made.enter(stack)
    for wanted in ([BASE, OTHER], [DEEP, OTHER]):
        assert made.find(wanted) == merge(tuple(sorted(wanted)))
    for _ in range(2):
        made.leave(DEEP)
    made.enter(THIRD)
    assert made.find([OTHER, THIRD])
    assert not made.find([DEEP, OTHER, THIRD])


def test_a_plan_that_is_too_long_is_known_to_be() -> None:
    made = Plans(LAYERS, AtOnce())
    long = [(i, *(3, 1) * 8 * LAYERS) for i in range(3)]
    assert not made.find(long)
    assert made.is_too_long(long)
    assert not made.find([BASE, long[0]])
    assert made.find([BASE, long[0]]), "one stack may always walk with the base's own order"


def test_plans_do_not_pile_up() -> None:
    made = Plans(LAYERS, AtOnce())
    for i in range(MOST_PLANS + 10):
        made.enter((i % LAYERS, *(int(digit) for digit in f"{i:010b}")))
        made.leave((i % LAYERS, *(int(digit) for digit in f"{i:010b}")))
    assert len(made._made) == MOST_PLANS
    assert not made._under_way


@given(STACKS)
def test_a_part_of_a_plan_walks_its_stacks_in_order_and_wastes_no_step(stacks: list[Stack]) -> None:
    distinct = tuple(sorted(set(stacks)))
    part = merge(distinct).of(set(distinct[::2]))
    assert part.stacks == distinct[::2]
    for i, stack in enumerate(part.stacks):
        walked = [(visit.positions[i], visit.layer) for visit in part.visits if visit.positions[i] is not None]
        assert walked == list(enumerate(stack))
    assert all(any(position is not None for position in visit.positions) for visit in part.visits)


def test_the_thread_of_steps_merges_no_stacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While requests of five stacks come and go."""
    merged: list[str] = []

    def noted(stacks: tuple[Stack, ...]) -> Plan:
        if len(stacks) > 1:
            merged.append(threading.current_thread().name)
        return merge(stacks)

    monkeypatch.setattr(batch, "merge", noted)
    monkeypatch.setattr(plans, "merge", noted)
    base = save_base("qwen2", tmp_path / "base")
    stacks = {f"{i}": (0, *(1, 2) * i, 3) for i in range(2, 6)}
    engine = engine_for(base, stacks=stacks)
    names = ["base", *stacks] * 3
    alone = {name: engine.generate([(greedy(PROMPT, 4), engine.adapters.lease([], name))]) for name in stacks}
    engine.start()
    answers = engine.generate(
        [(greedy(PROMPT, 4 + i % 3), engine.adapters.lease([], name)) for i, name in enumerate(names)]
    )
    engine.stop()
    for name, answer in zip(names, answers, strict=True):
        assert name == "base" or answer.tokens[:4] == alone[name][0].tokens
    assert merged
    assert "lorarep-engine" not in merged
