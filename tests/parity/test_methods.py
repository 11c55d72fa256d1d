"""Adapters of every method and start that PEFT reads as LoRA, against PEFT, all in one batch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig
from peft.tuners.lora.config import BdLoraConfig, EvaConfig, LoraGAConfig, MontecloraConfig, VeloraConfig
from safetensors.torch import load_file, save_file

from tests.support.engines import PROMPT, engine_for, greedy
from tests.support.models import reference, reference_logits, save_adapter, save_base, stack_of

# PEFT warns of what these configs have, and takes AdaLoRA's ranks for patterns when it warns.
pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("UserWarning", "RuntimeWarning")]

MODULES = ["q_proj", "v_proj", "down_proj"]
LAYERS = 3
OVERLAP = [[0, 2], [1, 3]]
ADALORA: dict[str, Any] = dict(method=AdaLoraConfig, init_r=6, lora_alpha=9, total_step=10, target_modules=MODULES)
KEPT = {
    "model.layers.0.self_attn.q_proj.lora_E": [True, False, True, True, False, False],
    "model.layers.1.self_attn.v_proj.lora_E": [False] * 6,
    "model.layers.3.mlp.down_proj.lora_E": [True] * 6,
}
SAVED: dict[str, dict[str, Any]] = {
    "AdaLoRA": ADALORA,
    "AdaLoRA of other ranks": {**ADALORA, "layer_replication": OVERLAP, "rank_pattern": KEPT},
    "AdaLoRA and what it ignores": {**ADALORA, "r": 3, "use_rslora": True, "alpha_pattern": {"q_proj": 2}},
    "AdaLoRA without alpha": {**ADALORA, "lora_alpha": 0},
    "BD-LoRA": dict(
        target_modules=MODULES,
        layer_replication=OVERLAP,
        use_bdlora=BdLoraConfig(target_modules_bd_a=["down_proj"], target_modules_bd_b=["q_proj", "v_proj"], nblocks=4),
    ),
    "BD-LoRA of some": dict(
        target_modules=MODULES,
        use_bdlora=BdLoraConfig(target_modules_bd_b=["layers.2.self_attn"], nblocks=2, match_strict=False),
    ),
    "VeLoRA": dict(target_modules=MODULES, layer_replication=OVERLAP, velora_config=VeloraConfig(num_groups=8)),
    "MonteCLoRA": dict(target_modules=MODULES, layer_replication=OVERLAP, monteclora_config=MontecloraConfig()),
    "MiCA": dict(target_modules=MODULES, init_lora_weights="mica"),
    "EVA": dict(target_modules=MODULES, init_lora_weights="eva", eva_config=EvaConfig()),
    "orthogonal": dict(target_modules=MODULES, init_lora_weights="orthogonal"),
    "LoRA-GA": dict(target_modules=MODULES, init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig()),
    "all biases of a base without any": dict(target_modules=MODULES, bias="all"),
    "biases of LoRA alone": dict(target_modules=MODULES, bias="lora_only"),
    "default modules": dict(target_modules=None),
    "some modules left out": dict(target_modules=MODULES, exclude_modules=["layers.2.self_attn.q_proj"]),
}
EDITED: dict[str, Mapping[str, Any]] = {
    "fields of old versions": {"merge_weights": False, "model_type": "llama", "enable_lora": None, "bias": "none"},
    "fields of a later version": {"use_tomorrow": False, "tomorrow_config": {"on": False, "of": None}, "tomorrow": ""},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base("llama", tmp_path_factory.mktemp("methods") / "base", num_hidden_layers=LAYERS)


@pytest.fixture(scope="module")
def adapters(base: Path) -> dict[str, Path]:
    folders = {
        name: save_adapter(base, base.parent / str(i), seed=i, **config)
        for i, (name, config) in enumerate(SAVED.items())
    }
    for name, changes in EDITED.items():
        folder = save_adapter(base, base.parent / name.replace(" ", "-"), target_modules=MODULES)
        change_config(folder, changes)
        folders[name] = folder
    folder = save_adapter(base, base.parent / "vectors", use_dora=True, target_modules=MODULES)
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(
        {f"{name}.weight" if "magnitude" in name else name: tensor for name, tensor in tensors.items()},
        folder / "adapter_model.safetensors",
    )
    return {**folders, "DoRA by another name": folder}


def change_config(folder: Path, changes: Mapping[str, Any]) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(("quantization", "tolerance"), [("none", 1e-5), ("nf4", 2e-4)])
def test_each_computes_what_peft_computes_in_one_batch(
    base: Path, adapters: dict[str, Path], quantization: str, tolerance: float
) -> None:
    # Over quantized weights PEFT has no BD-LoRA and reads no MiCA; what is left differs from LoRA in AdaLoRA alone.
    wanted = {name: folder for name, folder in adapters.items() if quantization == "none" or "AdaLoRA" in name}
    engine = engine_for(base, quantization, adapters=wanted)
    answers = engine.generate((greedy(new_tokens=8), engine.adapters.lease([(name, 1.0)])) for name in wanted)
    for (name, folder), answer in zip(wanted.items(), answers, strict=True):
        stack = stack_of(SAVED.get(name, {}).get("layer_replication"), LAYERS)
        text = [*PROMPT, *answer.tokens]
        expected = reference_logits(reference(base, folder, stack, quantization), text)
        assert list(answer.tokens) == expected[len(PROMPT) - 1 : -1].argmax(-1).tolist(), name
        held = engine.adapters.lease([(name, 1.0)])
        got = engine.logits(text, held)
        held.release()
        torch.testing.assert_close(got, expected, atol=tolerance, rtol=0, msg=lambda m, name=name: f"{name}: {m}")
        assert engine.adapters.get(name).kind == ("dora" if "DoRA" in name else "lora")
