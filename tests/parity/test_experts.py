"""Adapters of experts and routers: by parameters, and by modules as they were once, all in one batch, against PEFT."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from lorarep_runtime.adapters.header import Expected, checked_header, expected_tensors, layout_of
from lorarep_runtime.adapters.peft_config import AdapterConfig
from lorarep_runtime.config import AdapterLimits
from lorarep_runtime.engine.engine import Engine
from lorarep_runtime.errors import FailedPrecondition, LorarepError
from lorarep_runtime.model import base as base_module
from lorarep_runtime.model.compiled_adapter import Layout
from lorarep_runtime.model.footprint import Footprint, footprint
from lorarep_runtime.model.physical_stack import stacked
from tests.parity.test_families import RANGES, STACK, config_of, save_base
from tests.support.engines import engine_for, greedy
from tests.support.models import load_base, reference_logits

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PROMPT = (5, 250, 17, 90, 3, 201)
ROUTERS = {
    **dict.fromkeys(("deepseek_v3", "minimax_m2", "mixtral", "qwen3_moe"), "gate.weight"),
    "gpt_oss": "router.weight",
}
OLD = {"mixtral": ("block_sparse_moe", ("w1", "w3"), "w2"), "qwen3_moe": ("mlp", ("gate_proj", "up_proj"), "down_proj")}
"""Of families whose experts were modules once: their path in a layer, those of gate and up, and of down."""
BOTH = ["experts.gate_up_proj", "experts.down_proj"]
KINDS: dict[str, dict[str, Any]] = {
    "experts": dict(target_modules=["o_proj"], target_parameters=BOTH),
    "others": dict(target_modules=["o_proj"], target_parameters=BOTH, r=3, rank_pattern={"experts.down_proj": 2}),
    "deep": dict(target_modules=[], target_parameters=[*BOTH, "ROUTER"], use_rslora=True),
    "choice": dict(target_modules=["o_proj"], target_parameters=["ROUTER"]),
    "down": dict(target_modules=[], target_parameters=["experts.down_proj"], alpha_pattern={"down_proj": 7}),
    "attention": dict(target_modules=["o_proj"]),
}


def adapted(base: Path, family: str, name: str) -> Any:
    """A model under PEFT with one random adapter, which is saved beside the base."""
    fields = {"r": 2, "lora_alpha": 3, **KINDS[name]}
    named = [ROUTERS[family] if one == "ROUTER" else one for one in fields.get("target_parameters", [])]
    fields["target_parameters"] = named or None
    model = load_base(base)
    if name == "deep":
        model = stacked(model, STACK)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **fields), adapter_name=name)
    generator = torch.Generator().manual_seed(len(name))
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(base.parent)
    if name == "deep":
        file = base.parent / name / CONFIG
        file.write_text(json.dumps({**json.loads(file.read_text()), "layer_replication": RANGES}))
    return model.eval()


@pytest.fixture(params=ROUTERS)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def base(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(base_module, "check_family", lambda *_: None)  # which compares no adapters
    return save_base(family, tmp_path / "base")


def compare(engine: Engine, asked: dict[tuple[str, ...], Callable[[list[int]], Tensor]]) -> None:
    """Compares tokens, computed in one batch, and logits of adapters or their mixes with references."""
    named = [[(name, 1.0) for name in names] for names in asked]
    answers = engine.generate((greedy(PROMPT, 6), engine.adapters.lease(one)) for one in named)
    found = []
    for (names, logits), one, answer in zip(asked.items(), named, answers, strict=True):
        text = [*PROMPT, *answer.tokens]
        expected = logits(text)
        assert list(answer.tokens) == expected[len(PROMPT) - 1 : -1].argmax(-1).tolist(), names
        lease = engine.adapters.lease(one)
        torch.testing.assert_close(engine.logits(text, lease), expected, atol=3e-5, rtol=0)
        lease.release()
        found.append(expected[len(PROMPT) - 1])
    assert all((a - b).abs().max() > 1e-3 for i, a in enumerate(found) for b in found[:i])  # none is another's


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match")  # which they did
def test_experts_and_routers_compute_what_peft_computes_in_one_batch(family: str, base: Path) -> None:
    models = {name: adapted(base, family, name) for name in KINDS}
    engine = engine_for(base, adapters={name: base.parent / name for name in KINDS}, kv_bytes=1 << 20)
    both = models["experts"]
    both.load_adapter(base.parent / "others", "others")

    def alone(name: str) -> Callable[[list[int]], Tensor]:
        def logits(text: list[int]) -> Tensor:
            models[name].base_model.set_adapter(name)
            return reference_logits(models[name], text)

        return logits

    def mixed(text: list[int]) -> Tensor:
        both.base_model.set_adapter(["experts", "others"])
        return reference_logits(both, text)

    plain = load_base(base)
    compare(
        engine,
        {
            (): lambda text: reference_logits(plain, text),
            **{(name,): alone(name) for name in KINDS},
            ("experts", "others"): mixed,
        },
    )
    assert engine.adapters.get("down").rank == 2
    assert engine.base.layer_parameters == footprint(config_of(family), None).layer_parameters


def write_old(base: Path, family: str, name: str, *, router: bool, **fields: Any) -> Path:
    """An adapter as it was saved while experts were modules, of all layers."""
    block, gate_up, down = OLD[family]
    folder, model = base.parent / name, load_base(base)
    hidden, inner = model.config.hidden_size, model.model.layers[0].mlp.experts.down_proj.shape[2]
    experts = model.model.layers[0].mlp.experts.num_experts
    shapes = {"self_attn.o_proj": tuple(model.model.layers[0].self_attn.o_proj.weight.shape)}
    for expert in range(experts):
        shapes.update({f"{block}.experts.{expert}.{one}": (inner, hidden) for one in gate_up})
        shapes[f"{block}.experts.{expert}.{down}"] = hidden, inner
    if router:
        shapes[f"{block}.gate"] = experts, hidden
    config = LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(base),
        r=2,
        lora_alpha=3,
        target_modules=["o_proj", *gate_up, down, *(["gate"] if router else [])],
        **fields,
    )
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(len(name))
    tensors = {}
    for layer in range(len(model.model.layers)):
        for path, (out, into) in shapes.items():
            for kind, shape in (("lora_A", (2, into)), ("lora_B", (out, 2))):
                noise = 0.3 * torch.randn(shape, generator=generator)
                tensors[f"base_model.model.model.layers.{layer}.{path}.{kind}.weight"] = noise
    save_file(tensors, folder / WEIGHTS)
    return folder


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match")
@pytest.mark.parametrize("family", OLD)
def test_experts_that_were_modules_compute_what_peft_computes(family: str, base: Path) -> None:
    folders = {
        "old": write_old(base, family, "old", router=False, lora_dropout=0.1),
        "old and router": write_old(base, family, "old and router", router=True, use_rslora=True),
    }
    engine = engine_for(base, adapters=folders, kv_bytes=1 << 20)

    def reference(folder: Path) -> Callable[[list[int]], Tensor]:
        config = LoraConfig.from_pretrained(folder)
        config.lora_dropout = 0.0  # which PEFT refuses to have trained parameters with, and has no effect here
        model = PeftModel.from_pretrained(load_base(base), folder, config=config).eval()
        return lambda text: reference_logits(model, text)

    plain = load_base(base)
    compare(
        engine,
        {
            (): lambda text: reference_logits(plain, text),
            **{(name,): reference(folder) for name, folder in folders.items()},
        },
    )


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "DoRA": (dict(target_parameters=BOTH, use_dora=True), "use_dora: does not go with target_parameters"),
    "a bias": (dict(target_parameters=BOTH, lora_bias=True), "lora_bias: does not go with target_parameters"),
    "DoRA of modules": (dict(target_modules=["w1", "w2", "w3"], use_dora=True), "use_dora: is not supported for"),
    "half a parameter": (dict(target_modules=["w3", "w2"]), "target_modules: name w3 without w1"),
    "no parameter": (dict(target_modules=["q_proj"], target_parameters=["mlp.gates"]), "target_parameters: match no"),
}


@pytest.mark.parametrize("family", ["mixtral"])
@pytest.mark.parametrize("kind", REFUSED)
def test_what_peft_does_not_adapt_is_refused_by_name(kind: str, family: str) -> None:
    fields, why = REFUSED[kind]
    config, served = config_of(family), footprint(config_of(family), None)
    raw = {"target_modules": [], **fields}
    with pytest.raises((ValueError, RuntimeWarning)):
        get_peft_model(AutoModelForCausalLM.from_config(config), LoraConfig(task_type="CAUSAL_LM", **raw))
    with pytest.raises(LorarepError, match=f"^{why}"):
        layout(AdapterConfig.parse({"peft_type": "LORA", **raw}, AdapterLimits(), family), served)


@pytest.mark.parametrize("family", ["mixtral"])
def test_a_base_that_adapts_no_experts_refuses_them_by_name(family: str) -> None:
    """A GPU's has none, and neither have several ranks."""
    served = replace(footprint(config_of(family), None), layer_parameters=[{}, {}])
    raw = {"peft_type": "LORA", "target_modules": ["q_proj"], "target_parameters": BOTH}
    with pytest.raises(FailedPrecondition, match=r"^target_parameters: .* on a CPU alone"):
        layout(AdapterConfig.parse(raw, AdapterLimits(), family), served)


def layout(config: AdapterConfig, base: Footprint) -> Layout:
    stack = config.stack(base.layers)
    return layout_of(config, stack, base.layer_modules, base.layer_parameters, base.prefix, base.ends)


def test_a_file_is_refused_that_has_what_peft_leaves_out(tmp_path: Path) -> None:
    """The names of Qwen2-MoE's experts are those of its shared expert, too, which PEFT no longer adapts then."""
    served = footprint(config_of("qwen3_moe"), None)
    raw = {"peft_type": "LORA", "target_modules": ["gate_proj", "up_proj", "down_proj"]}
    config = AdapterConfig.parse(raw, AdapterLimits(), "qwen2_moe")
    found = layout(config, served)
    shapes = dict(expected_tensors(found, served.prefix))
    name = "base_model.model.model.layers.0.mlp.shared_expert.up_proj.lora_A.weight"
    save_file({one: torch.zeros(shape) for one, shape in {**shapes, name: (8, 32)}.items()}, tmp_path / WEIGHTS)
    expected = Expected(config, config.stack(served.layers), found, served.ends)
    with pytest.raises(FailedPrecondition, match=rf"^{name}: is of a module that PEFT leaves out"):
        checked_header(tmp_path / WEIGHTS, expected, served.prefix)
