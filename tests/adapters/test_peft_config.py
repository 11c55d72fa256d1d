"""A config's modules, ranks and factors are those of PEFT, and hostile values are refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM

from lorarep_runtime.adapters.peft_config import AdapterConfig
from lorarep_runtime.config import AdapterLimits
from lorarep_runtime.errors import InvalidArgument
from tests.support.models import FAMILIES, LAYERS

LIMITS = AdapterLimits()
LINEAR = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)
PLAIN: dict[str, Any] = {"peft_type": "LORA", "target_modules": ["q_proj", "v_proj"]}

ASKED = {
    "names": dict(target_modules=["q_proj", "up_proj"]),
    "whole paths": dict(target_modules=["model.layers.1.mlp.up_proj", "layers.2.self_attn.q_proj"]),
    "expression": dict(target_modules=r".*layers\.[135]\..*(q|down)_proj"),
    "expression with a flag": dict(target_modules=r"(?i)MODEL\.layers\.[135]\..*(Q|down)_proj"),
    "verbose expression": dict(target_modules="(?x) .* \\.(q|v)_proj  # both"),
    "all linear": dict(target_modules="all-linear"),
    "all but some": dict(target_modules="all-linear", exclude_modules=["q_proj", "layers.2.mlp.up_proj"]),
    "all but an expression's": dict(target_modules=["q_proj", "up_proj"], exclude_modules=r"(?i).*LAYERS\.[0-3]\..*"),
    "some layers": dict(target_modules=["q_proj", "v_proj"], layers_to_transform=[1, 4]),
    "some layers, and a path by itself": dict(
        target_modules=["model.layers.0.self_attn.q_proj", "v_proj"], layers_to_transform=[1, 4]
    ),
    "one layer": dict(target_modules=["q_proj"], layers_to_transform=2),
    "some layers, and an empty pattern": dict(target_modules=["q_proj"], layers_to_transform=[1], layers_pattern=""),
    "layers of a pattern": dict(target_modules=["q_proj"], layers_to_transform=[0, 3], layers_pattern="layers"),
    "patterns": dict(
        target_modules=["q_proj", "v_proj", "down_proj"],
        r=6,
        lora_alpha=5,
        rank_pattern={r"layers\.[02]\.self_attn\.q_proj": 3, "v_proj": 9, "self_attn.v_proj": 2},
        alpha_pattern={"down_proj": 11, r"model.layers.3.*": 7},
    ),
    "rank-stabilised": dict(target_modules=["q_proj"], r=9, lora_alpha=4, use_rslora=True, rank_pattern={"1.*": 4}),
    "replicated": dict(
        target_modules=["q_proj", "up_proj"],
        layer_replication=[[0, 4], [2, 5]],
        layers_to_transform=[1, 6],
        rank_pattern={r"layers\.6\..*": 3},
        alpha_pattern={"up_proj": 1},
    ),
}


@pytest.mark.parametrize("asked", ASKED.values(), ids=ASKED)
def test_modules_ranks_and_scalings_are_pefts(asked: dict[str, Any], tmp_path: Path) -> None:
    LoraConfig(task_type="CAUSAL_LM", **asked).save_pretrained(tmp_path)
    # Read back: the file has its keys sorted, and patterns are tried in order.
    config = LoraConfig.from_pretrained(tmp_path)
    model = get_peft_model(AutoModelForCausalLM.from_config(FAMILIES["llama"]()), config)
    theirs = {
        name.removeprefix("base_model.model."): (module.r["default"], module.scaling["default"])
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and "lm_head" not in name
    }
    config = AdapterConfig.parse(json.loads((tmp_path / "adapter_config.json").read_text()), LIMITS)
    paths = [f"model.layers.{i}.{module}" for i in range(len(config.stack(LAYERS))) for module in LINEAR]
    ours = {path: (config.rank(path), config.scaling(path)) for path in paths if config.targets(path)}
    assert theirs
    assert ours.keys() == theirs.keys()
    for path, (rank, scaling) in theirs.items():
        assert ours[path] == pytest.approx((rank, scaling)), path


@pytest.mark.parametrize(("alpha", "factor"), [(9, 9), (0, 2), (-1, 2)])
def test_adaloras_scaling_without_alpha_is_by_the_ranks_that_are_left(alpha: int, factor: int) -> None:
    """As in PEFT's `AdaLoraLayer.update_layer`, where `resize_modules_by_rank_pattern` keeps the rank that divides."""
    path = "model.layers.0.self_attn.q_proj"
    kept = {f"{path}.lora_E": [True, False, True, False, False, False]}
    raw = {**PLAIN, "peft_type": "ADALORA", "init_r": 6, "lora_alpha": alpha, "rank_pattern": kept}
    assert AdapterConfig.parse(raw, LIMITS).scaling(path) == pytest.approx(factor / (6 + 1e-5))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("r", 0),
        ("r", -1),
        ("r", True),
        ("r", 8.0),
        ("r", "8"),
        ("r", 10**9),
        ("lora_alpha", float("nan")),
        ("lora_alpha", float("inf")),
        ("lora_alpha", 1e300),
        ("lora_alpha", "16"),
        ("lora_alpha", True),
        ("target_modules", None),
        ("target_modules", []),
        ("target_modules", [3]),
        ("target_modules", {"q_proj": 1}),
        ("layers_to_transform", [-1]),
        ("layers_to_transform", [True]),
        ("layers_to_transform", ["1"]),
        ("layers_pattern", 3),
        ("rank_pattern", {"q_proj": 0}),
        ("rank_pattern", {"q_proj": 10**6}),
        ("rank_pattern", ["q_proj"]),
        ("alpha_pattern", {"q_proj": float("nan")}),
        ("alpha_pattern", {f"m{i}": 1 for i in range(10_000)}),
        ("use_dora", 1),
        ("use_rslora", "true"),
        ("lora_bias", "none"),
        ("layer_replication", [[0, 4], [4]]),
        ("layer_replication", [[-1, 4]]),
        ("layer_replication", [[0, 4]] * 1_000_000),
        ("layer_replication", [[0, 2**40]]),
        ("layer_replication", "[[0,4]]"),
        ("layer_replication", True),
    ],
)
def test_hostile_values_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(InvalidArgument, match=f"^{field}"):
        AdapterConfig.parse({**PLAIN, field: value}, LIMITS)


@pytest.mark.parametrize("field", ["target_modules", "rank_pattern"])
def test_hostile_expressions_end(field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorarep_runtime.adapters.peft_config.MATCHING_SECONDS", 0.2)
    endless = r"(([a-z_.0-9]|[a-z_.0-9]{2})*)*[!?]"
    value = endless if field == "target_modules" else {endless: 4}
    config = AdapterConfig.parse({**PLAIN, field: value}, LIMITS)
    path = "model.layers.0.self_attn.q_proj" * 4
    with pytest.raises(InvalidArgument, match=rf"^{field}: its patterns take"):
        config.targets(path) if field == "target_modules" else config.rank(path)


def test_an_expression_that_is_none_is_refused_by_name() -> None:
    with pytest.raises(InvalidArgument, match=r"^target_modules: "):
        AdapterConfig.parse({**PLAIN, "target_modules": "("}, LIMITS)


@pytest.mark.parametrize(
    ("field", "pattern"),
    [("rank_pattern", "(?i)Q_PROJ"), ("alpha_pattern", "(?i)Q_PROJ"), ("layers_pattern", "(?i)LAYERS")],
)
def test_a_flag_is_refused_where_peft_puts_the_expression_into_another(field: str, pattern: str) -> None:
    value = [pattern] if field == "layers_pattern" else {pattern: 2}
    with pytest.raises(InvalidArgument, match=rf"^{field}: "):
        AdapterConfig.parse({**PLAIN, "layers_to_transform": [1], field: value}, LIMITS)


@pytest.mark.parametrize("pattern", ["(?:.*k_proj){s<=1}", ".*[[:alpha:]]_proj", "(?V1).*q_proj", r".*\p{L}_proj"])
def test_what_means_something_else_to_another_library_is_refused_by_name(pattern: str) -> None:
    """`re`, which PEFT uses, takes the first two for literal braces and for a set of characters."""
    for field in ("target_modules", "exclude_modules"):
        with pytest.raises(InvalidArgument, match=rf"^{field}: "):
            AdapterConfig.parse({**PLAIN, field: pattern}, LIMITS)


CONTRADICTIONS = {
    "layers of an expression": dict(target_modules="q_proj", layers_to_transform=[1]),
    "a pattern of an expression's layers": dict(target_modules=".*q_proj", layers_pattern="layers"),
    "a pattern of layers, and no layers": dict(layers_pattern=["layers"]),
    "DoRA with a bias": dict(use_dora=True, lora_bias=True),
    "a bias after a Gaussian start": dict(init_lora_weights="gaussian", lora_bias=True),
}


@pytest.mark.parametrize("changed", CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_contradictions_are_refused_as_peft_refuses_them(changed: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="_"):
        LoraConfig(**changed)
    with pytest.raises(InvalidArgument):
        AdapterConfig.parse({**PLAIN, **changed}, LIMITS)


def test_a_map_past_the_bases_layers_is_refused() -> None:
    config = AdapterConfig.parse({**PLAIN, "layer_replication": [[0, 4], [2, 7]]}, LIMITS)
    with pytest.raises(InvalidArgument, match="layer_replication"):
        config.stack(LAYERS)
