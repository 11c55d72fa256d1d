"""Stacks from every source, and plans that hold all of theirs."""

from __future__ import annotations

import random
import time
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from lorarep_runtime.errors import FailedPrecondition, InvalidArgument
from lorarep_runtime.model.plan import merge
from lorarep_runtime.model.stack import Stack, parse_ranges, ranges_of, stack_from_mergekit, stack_from_ranges
from tests.support.models import FAMILIES, LAYERS, MAPS

STACKS = st.lists(st.lists(st.integers(0, 7), min_size=1, max_size=12).map(tuple), min_size=1, max_size=4)


@pytest.mark.parametrize("name", [name for name, ranges in MAPS.items() if ranges])
def test_ranges_are_walked_as_peft_walks_them(name: str) -> None:
    ranges = MAPS[name]
    assert ranges is not None
    model = AutoModelForCausalLM.from_config(FAMILIES["llama"]())
    for i, layer in enumerate(model.model.layers):
        layer.input_layernorm.weight.data.fill_(i)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], layer_replication=ranges)
    layers = get_peft_model(model, config).get_base_model().model.layers
    walked = tuple(int(layer.input_layernorm.weight[0]) for layer in layers)
    assert stack_from_ranges(ranges, LAYERS, max_positions=64) == walked


@pytest.mark.parametrize(
    ("ranges", "named"),
    [
        ([], "layer_replication"),
        ("[[0,4]]", "layer_replication"),
        (7, "layer_replication"),
        ([[0, 4], [2]], r"layer_replication\[1\]"),
        ([[0, 4], [2, 5.0]], r"layer_replication\[1\]"),
        ([[False, True]], r"layer_replication\[0\]"),
        ([[0, 4], [-2, 5]], r"layer_replication\[1\]"),
        ([[3, 3]], r"layer_replication\[0\]"),
        ([[0, 7]], r"layer_replication\[0\]"),
        ([[0, 6]] * 1_000_000, "64 positions"),
    ],
)
def test_bad_ranges_are_refused_by_name(ranges: object, named: str) -> None:
    with pytest.raises(InvalidArgument, match=named):
        stack_from_ranges(ranges, LAYERS, max_positions=64)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["0-4,2-6", " 0 - 4 , 2-6", "[[0,4],[2,6]]", "[[0, 4], [2, 6]]"])
def test_typed_ranges(text: str) -> None:
    assert parse_ranges(text) == [(0, 4), (2, 6)]


@pytest.mark.parametrize("text", ["", "0-4,", "4", "0-4-6", "[[0,4]", "[0,4]", "[[0]]", "-1-4", "[" * 100_000])
def test_typed_ranges_that_are_none(text: str) -> None:
    with pytest.raises(InvalidArgument, match="not ranges"):
        parse_ranges(text)


def recipe(*ranges: list[int], model: str = "org/base") -> dict[str, object]:
    slices = [{"sources": [{"model": model, "layer_range": pair}]} for pair in ranges]
    return {"merge_method": "passthrough", "slices": slices}


def test_a_mergekit_recipe_is_the_stack_of_its_slices() -> None:
    made = stack_from_mergekit(recipe([0, 4], [2, 6]), LAYERS, max_positions=64, base="org/base")
    assert made == stack_from_ranges([[0, 4], [2, 6]], LAYERS, max_positions=64)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"merge_method": "linear"}, "merge_method"),
        ({"dtype": "bfloat16"}, "dtype"),
        ({"slices": []}, "slices"),
        ({"slices": [{"sources": [{"model": "org/base", "layer_range": [0, 4]}] * 2}]}, r"slices\[0\]\.sources"),
        ({"slices": [{"sources": [{"model": "org/other", "layer_range": [0, 4]}]}]}, r"slices\[0\].*model"),
        (
            {"slices": [{"sources": [{"model": "org/base", "layer_range": [0, 4], "parameters": {"scale": 0}}]}]},
            r"slices\[0\]\.sources\[0\]\.parameters",
        ),
        ({"slices": [{"sources": [{"model": "org/base", "layer_range": [0, 9]}]}]}, "layer_range"),
        ({"slices": [{"sources": [{"model": "org/base"}]}]}, "layer_range"),
        ({"slices": ["sources"]}, r"slices\[0\]"),
    ],
)
def test_anything_else_in_a_recipe_is_refused_by_name(changed: dict[str, object], named: str) -> None:
    with pytest.raises((InvalidArgument, FailedPrecondition), match=named):
        stack_from_mergekit({**recipe([0, 4]), **changed}, LAYERS, max_positions=64, base="org/base")


def shortest(a: Stack, b: Stack) -> int:
    """Length of the shortest common supersequence, by its definition."""

    @cache
    def rest(i: int, j: int) -> int:
        if i == len(a) or j == len(b):
            return len(a) - i + len(b) - j
        return 1 + (rest(i + 1, j + 1) if a[i] == b[j] else min(rest(i + 1, j), rest(i, j + 1)))

    return rest(0, 0)


@given(STACKS)
def test_a_plan_walks_every_stack_in_order_and_wastes_no_step(stacks: list[Stack]) -> None:
    plan = merge(tuple(stacks))
    for i, stack in enumerate(stacks):
        walked = [(step.positions[i], step.layer) for step in plan.visits if step.positions[i] is not None]
        assert walked == list(enumerate(stack))
    assert all(any(position is not None for position in step.positions) for step in plan.visits)
    assert len(plan.visits) <= sum(map(len, stacks))
    if len(stacks) == 2:
        assert len(plan.visits) == shortest(*stacks)


def test_the_plan_of_a_base_and_its_deeper_stack_is_no_longer_than_the_deeper() -> None:
    deep = (*range(24), *range(8, 32))
    assert len(merge((tuple(range(32)), deep)).visits) == 48


@given(STACKS)
def test_ranges_for_people_are_the_stack(stacks: list[Stack]) -> None:
    for stack in stacks:
        assert stack_from_ranges(ranges_of(stack), 8, max_positions=64) == stack


def test_many_deep_stacks_are_merged_in_half_a_second() -> None:
    """Whoever merges holds the interpreter."""
    generator = random.Random(3)
    stacks = tuple(tuple(generator.randrange(32) for _ in range(512)) for _ in range(8))
    began = time.process_time()
    merge(stacks)
    assert time.process_time() - began < 0.5
