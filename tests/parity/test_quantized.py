"""Quantized bases against the same base quantized by bitsandbytes and stacked physically."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from click.testing import CliRunner
from lorarep_server.cli.reference import Reference
from lorarep_server.cli.verify import verify
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from lorarep_runtime.adapters.files import CONFIG_FILE, read_config
from lorarep_runtime.adapters.peft_config import AdapterConfig
from lorarep_runtime.config import AdapterLimits
from tests.support.engines import PROMPT, engine_for, greedy
from tests.support.models import (
    MAPS,
    load_base,
    reference,
    reference_logits,
    save_adapter,
    save_base,
    stack_of,
)

TARGETS = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
CASES = {
    f"{kind} on {name}": (use_dora, MAPS[name])
    for kind, use_dora in (("lora", False), ("dora", True))
    for name in ("base order", "overlap", "four ranges")
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base("llama", tmp_path_factory.mktemp("quantized") / "base")


@pytest.fixture(scope="module")
def adapters(base: Path) -> dict[str, Path]:
    return {
        name: save_adapter(
            base,
            base.parent / name.replace(" ", "-"),
            seed=i,
            r=4,
            lora_alpha=8,
            use_dora=use_dora,
            target_modules=TARGETS,
            layer_replication=ranges,
        )
        for i, (name, (use_dora, ranges)) in enumerate(CASES.items())
    }


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_adapters_over_quantized_bases(quantization: str, base: Path, adapters: dict[str, Path]) -> None:
    engine = engine_for(base, quantization, adapters=adapters)
    answers = engine.generate((greedy(), engine.adapters.lease([(name, 1.0)])) for name in adapters)
    for (name, folder), answer in zip(adapters.items(), answers, strict=True):
        model = reference(base, folder, stack_of(CASES[name][1]), quantization)
        if quantization == "int8":
            use_dequantized_int8(model)
        text = [*PROMPT, *answer.tokens]
        expected = reference_logits(model, text)
        assert list(answer.tokens) == expected[len(PROMPT) - 1 : -1].argmax(-1).tolist(), name
        held = engine.adapters.lease([(name, 1.0)])
        torch.testing.assert_close(
            engine.logits(text, held), expected, atol=1e-5, rtol=0, msg=lambda m, name=name: f"{name}: {m}"
        )
        held.release()


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_the_reference_without_peft_is_the_one_with_it(
    kind: str, base: Path, adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"{kind} on overlap"
    engine = engine_for(base, "nf4")
    spec = AdapterConfig.parse(read_config(adapters[name] / CONFIG_FILE), AdapterLimits())
    given = engine.base, stack_of(MAPS["overlap"]), adapters[name], spec
    under_peft = Reference(*given)
    monkeypatch.setattr("lorarep_server.cli.reference.find_spec", lambda module: None)
    merged = Reference(*given)
    assert [one.name.rpartition(", ")[2] for one in (under_peft, merged)] == ["under PEFT", "adapter merged"]
    torch.testing.assert_close(merged.logits(PROMPT), under_peft.logits(PROMPT), atol=1e-5, rtol=0)


def use_dequantized_int8(model: nn.Module) -> None:
    """Puts plain layers with bitsandbytes' dequantized weights where its int8 layers are.

    LLM.int8() rounds activations too, to 8 bits and by outliers of the whole batch; lorarep does not.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, bnb.nn.Linear8bitLt):
            weight = bnb.functional.int8_vectorwise_dequant(module.weight.data, module.weight.SCB)
            plain = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            plain.weight.data = weight
            model.set_submodule(name, plain)


def test_int8_is_closer_to_the_base_than_llm_int8(base: Path) -> None:
    exact = reference_logits(load_base(base), PROMPT)
    theirs = reference_logits(load_base(base, "int8"), PROMPT)
    engine = engine_for(base, "int8")
    ours = engine.logits(PROMPT, engine.adapters.lease([]))
    assert (ours - exact).norm() < (theirs - exact).norm() < 0.1 * exact.norm()


NF4 = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
SOME = ["lm_head", "q_proj", "model.layers.1.mlp.down_proj", "model.layers.2"]
"""Modules that are not quantized: a kind, one, and a whole layer."""
CHECKPOINTS = {
    "nf4": ("nf4", NF4),
    "int8": ("int8", dict(load_in_8bit=True)),
    "nf4 but for some": ("nf4", dict(**NF4, llm_int8_skip_modules=SOME)),
    "int8 but for some": ("int8", dict(load_in_8bit=True, llm_int8_skip_modules=SOME)),
    "nf4, its scales quantized, in bytes of another type": (
        "nf4",
        dict(**NF4, bnb_4bit_use_double_quant=True, bnb_4bit_quant_storage=torch.float32),
    ),
}


@pytest.mark.parametrize(("quantization", "config"), CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_a_checkpoint_that_is_quantized_already(
    quantization: str, config: dict[str, Any], base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    """As `transformers` loads it, and as `lorarep verify` loads it for its reference."""
    options = dict(quantization_config=BitsAndBytesConfig(**config), device_map={"": "cpu"})
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, **options).save_pretrained(tmp_path)
    for file in base.glob("tokenizer*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    engine = engine_for(tmp_path)
    assert engine.base.quantization == quantization
    model = load_base(tmp_path)
    if quantization == "int8":
        use_dequantized_int8(model)
    expected = reference_logits(model, PROMPT)
    torch.testing.assert_close(engine.logits(PROMPT, engine.adapters.lease([])), expected, atol=1e-5, rtol=0)
    flags = ["--base", tmp_path, "--adapter", adapters["dora on overlap"], "--device=cpu", "--dtype=float32"]
    verified = CliRunner().invoke(verify, [*map(str, flags), "--prompt=abc", "--max-new-tokens=2"])
    assert verified.exit_code == 0, verified.output
    assert "the same but for rounding" in verified.output


def test_double_quantization(base: Path) -> None:
    from lorarep_runtime.config import BaseConfig, EngineConfig, SchedulerConfig
    from lorarep_runtime.engine.engine import Engine

    config = BaseConfig(str(base), quantization="nf4", double_quantization=True, dtype="float32", device="cpu")
    engine = Engine(EngineConfig(config, scheduler=SchedulerConfig(kv_bytes=1 << 20)))
    double = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, quantization_config=double, attn_implementation="eager", device_map={"": "cpu"}
    )
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.compute_dtype, module.compute_type_is_set = torch.float32, True
            module.support_avx512bf16_for_cpu = False
    expected = reference_logits(model.eval(), PROMPT)
    torch.testing.assert_close(engine.logits(PROMPT, engine.adapters.lease([])), expected, atol=1e-5, rtol=0)
