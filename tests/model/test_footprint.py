"""`lorarep plan`: against what is really loaded, and on the shape of Mistral-7B."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from lorarep_server.cli.commands import main
from transformers import MistralConfig

from lorarep_runtime.config import BaseConfig, EngineConfig, SchedulerConfig
from lorarep_runtime.engine.engine import Engine
from lorarep_runtime.model.footprint import footprint
from lorarep_runtime.model.model_config import quantization_of, read_model_config
from tests.support.engines import engine_for
from tests.support.hub_faults import FaultyHub
from tests.support.models import FAMILIES, MISTRAL_7B, projections, save_adapter, save_base

PROJECTIONS = projections(MISTRAL_7B)
MAPS = {"ten": [[0, 16], [8, 24], [16, 32]], "thirteen": [[0, 16], [8, 24], [16, 32], [16, 32]]}


def plan(*arguments: str) -> dict[str, Any]:
    result = CliRunner().invoke(main, ["plan", "--json", *arguments])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("quantization", ["none", "nf4", "nf4 twice", "int8"])
def test_every_category_is_what_the_loaded_base_holds(family: str, quantization: str, tmp_path: Path) -> None:
    save_base(family, tmp_path)
    kind, _, twice = quantization.partition(" ")
    config = BaseConfig(
        str(tmp_path), quantization=kind, double_quantization=bool(twice), dtype="float32", device="cpu"
    )
    engine = Engine(EngineConfig(config, scheduler=SchedulerConfig(kv_bytes=1 << 20)))
    model = read_model_config(tmp_path)
    predicted = footprint(model, quantization_of(model, config)[1])
    held = engine.ledger().categories
    assert predicted.categories == {name: held[name] for name in predicted.categories}
    assert predicted.layer_modules == engine.base.layer_modules
    assert predicted.prefix == engine.base.prefix
    assert predicted.parameters == sum(p.numel() for p in _loaded(tmp_path).parameters())


def _loaded(folder: Path) -> Any:
    from tests.support.models import load_base

    return load_base(folder)


def test_adapters_and_plan_are_those_of_the_engine(tmp_path: Path) -> None:
    base = save_base("llama", tmp_path / "base")
    adapter = save_adapter(
        base, tmp_path / "a", r=4, use_dora=True, target_modules=["q_proj"], layer_replication=[[0, 4], [2, 5]]
    )
    config = BaseConfig(str(base), dtype="float32", device="cpu")
    engine = Engine(EngineConfig(config, scheduler=SchedulerConfig(kv_bytes=1 << 20)))
    info = engine.adapters.load("a", str(adapter), trusted=True)
    counted = plan("--base", str(base), "--adapter", f"a={adapter}", "--stack", "deep=0-4,2-6", "--memory", "1GiB")
    (row,) = counted["adapters"]
    assert (row["adapter_parameters"], row["bytes"], row["positions"]) == (info.parameters, info.bytes, 7)
    assert counted["plan"]["weight_passes"] == 8
    assert counted["plan"]["positions"]["a"] == [0, 1, 2, 3, 4, 5, 6, None]
    assert {s["name"]: s["kv_bytes_per_token"] for s in counted["stacks"]}["a"] == 7 * 2 * 2 * 16 * 4


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
def test_what_a_gpu_refuses_is_said_to_be_for_a_cpu_and_counted(tmp_path: Path) -> None:
    base = save_base("llama", tmp_path / "base")
    kinds: dict[str, dict[str, Any]] = {
        "inner": {},
        "head": {"target_modules": ["q_proj", "lm_head"]},
        "more tokens": {"tokens": 280},
        "own head": {"modules_to_save": ["lm_head"], "tokens": 280},
        "single tokens": {"trainable_token_indices": [5, 270]},
    }
    named = {
        name: save_adapter(base, tmp_path / name, r=2, **{"target_modules": ["q_proj"], **config})
        for name, config in kinds.items()
    }
    arguments = ["plan", "--base", str(base), *(f"--adapter={name}={folder}" for name, folder in named.items())]
    text = CliRunner().invoke(main, arguments).stdout
    assert text.count("served on a CPU alone") == 4
    assert text.index("adapter head") < text.index("served on a CPU alone")
    rows = plan(*arguments[1:])["adapters"]
    assert [row["cpu_only"] for row in rows] == [False, True, True, True, True]
    held = engine_for(base, adapters=named).adapters.list()
    assert {row["name"]: (row["bytes"], row["adapter_parameters"]) for row in rows} == {
        info.name: (info.bytes, info.parameters) for info in held
    }


@pytest.fixture(scope="module")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Mistral-7B-v0.1's config and adapters of its shape, their numbers a hole in the file."""
    folder = tmp_path_factory.mktemp("mistral")
    MistralConfig(
        **MISTRAL_7B,
        tie_word_embeddings=False,
        architectures=["MistralForCausalLM"],
        dtype="bfloat16",
    ).save_pretrained(folder / "base")
    for name, ranges in MAPS.items():
        sparse_adapter(folder / name, ranges)
    return folder


def sparse_adapter(folder: Path, ranges: list[list[int]]) -> None:
    folder.mkdir()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 8,
        "lora_alpha": 16,
        "target_modules": [path.partition(".")[2] for path in PROJECTIONS],
        "layer_replication": ranges,
        "base_model_name_or_path": "mistralai/Mistral-7B-v0.1",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    header, at = {}, 0
    for position in range(sum(end - start for start, end in ranges)):
        for path, (out, into) in PROJECTIONS.items():
            for kind, shape in (("lora_A", (8, into)), ("lora_B", (out, 8))):
                size = 2 * shape[0] * shape[1]
                header[f"base_model.model.model.layers.{position}.{path}.{kind}.weight"] = {
                    "dtype": "BF16",
                    "shape": shape,
                    "data_offsets": (at, at + size),
                }
                at += size
    encoded = json.dumps(header).encode()
    with (folder / "adapter_model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        file.truncate(8 + len(encoded) + at)


def test_the_numbers_of_mistral_7b(mistral: Path) -> None:
    sources = [f"{name}={mistral / name}" for name in MAPS]
    counted = plan(
        "--base", str(mistral / "base"), "--quantization", "nf4", "--adapter", sources[0], "--adapter", sources[1]
    )
    assert counted["base_parameters"] == 7_241_732_096
    assert counted["quantized_elements"] == 3_752_071_168
    ten, thirteen = counted["adapters"]
    assert (ten["positions"], ten["adapter_parameters"]) == (48, 31_457_280)
    assert (thirteen["positions"], thirteen["adapter_parameters"]) == (64, 41_943_040)
    assert thirteen["total_parameters"] == 7_283_675_136
    assert counted["plan"]["weight_passes"] == 64
    assert counted["plan"]["weight_passes_saved"] == 32 + 48


def test_the_merged_walk_of_two_stacks_is_48_passes(mistral: Path) -> None:
    counted = plan("--base", str(mistral / "base"), "--stack", "deep=0-24,8-32")
    assert counted["plan"]["weight_passes"] == 48
    assert counted["plan"]["weight_passes_saved"] == 32


def test_a_mergekit_recipe_is_a_stack(mistral: Path, tmp_path: Path) -> None:
    sources = [{"sources": [{"model": "mistralai/Mistral-7B-v0.1", "layer_range": r}]} for r in ([0, 24], [8, 32])]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"merge_method": "passthrough", "slices": sources}))
    counted = plan("--base", str(mistral / "base"), "--stack", f"deep={recipe}")
    assert counted["stacks"][1]["ranges"] == [[0, 24], [8, 32]]
    assert counted["plan"]["weight_passes"] == 48
    recipe.write_text(yaml.safe_dump({"merge_method": "passthrough", "slices": sources, "dtype": "bfloat16"}))
    refused = CliRunner().invoke(main, ["plan", "--base", str(mistral / "base"), "--stack", f"deep={recipe}"])
    assert (refused.exit_code, "dtype" in refused.output) == (1, True)


def test_no_weights_of_the_base_are_downloaded(mistral: Path, hub: FaultyHub, tmp_path: Path) -> None:
    save_base("llama", tmp_path / "base")
    hub.publish("org/base", tmp_path / "base")
    plan("--base", "org/base", "--cache-dir", str(tmp_path / "cache"))
    assert set(hub.downloads()) == {"config.json", "generation_config.json"}


def test_people_see_the_same(mistral: Path) -> None:
    result = CliRunner().invoke(main, ["plan", "--base", str(mistral / "base"), "--adapter", str(mistral / "ten")])
    assert result.exit_code == 0
    for number in ("7,241,732,096", "31,457,280", "48 positions"):
        assert number in result.stdout


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--stack", "deep=0-99"], "deep"),
        (["--stack", "deep"], "--stack"),
        (["--adapter", "/nowhere"], "/nowhere"),
        (["--quantization", "fp4"], "--quantization"),
        (["--memory", "much"], "--memory"),
    ],
)
def test_a_bad_option_is_named_in_one_line(mistral: Path, arguments: list[str], named: str) -> None:
    result = CliRunner().invoke(main, ["plan", "--base", str(mistral / "base"), *arguments])
    assert result.exit_code != 0
    assert named in result.output
    assert "Traceback" not in result.output
