"""Adapters as people publish them, each with the right verdict: served, or refused by the right name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from lorarep_runtime.adapters.ends import MAX_FOREIGN_TOKENS
from lorarep_runtime.adapters.files import CONFIG_FILE, WEIGHTS_FILE, read_config
from lorarep_runtime.adapters.header import Expected, checked_header, layout_of
from lorarep_runtime.adapters.peft_config import AdapterConfig
from lorarep_runtime.config import AdapterLimits
from lorarep_runtime.errors import FailedPrecondition, LorarepError
from lorarep_runtime.hub.snapshot import fetch
from lorarep_runtime.model.family_comparison import refusal
from lorarep_runtime.model.footprint import Footprint, footprint
from lorarep_runtime.model.model_config import read_model_config
from lorarep_runtime.model.transformers_attention import register_attention
from tests.parity.test_families import FAMILIES as OTHERS
from tests.parity.test_families import LAYERS, config_of
from tests.support.models import FAMILIES

CENSUS: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("adapters.json").read_text())
BASES: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("bases.json").read_text())
VERSIONS: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("versions.json").read_text())
LEAST = 60
DTYPE_BYTES = {"F32": 4, "F16": 2, "BF16": 2}


def test_there_are_enough_and_the_readmes_count_them() -> None:
    served = sum(case["verdict"] == "served" for case in CENSUS.values())
    assert len(CENSUS) >= LEAST
    here = Path(__file__)
    for readme in (here.with_name("README.md"), here.parents[2] / "README.md"):
        assert f"{len(CENSUS)} adapters, of which {served} are served" in readme.read_text()


@cache
def base_of(family: str) -> Footprint:
    """A small base of a family, with two layers. Raises FailedPrecondition if there is none."""
    config = config_of(family) if family in OTHERS else FAMILIES[family.removesuffix("-text")]()
    config.get_text_config().num_hidden_layers = LAYERS
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:LAYERS]
    return footprint(config, None)


def verdict(folder: Path, family: str) -> str:
    """What is said of the adapter in a folder, from its config and header: "served", or why not."""
    try:
        base = base_of(family)
        config = AdapterConfig.parse(read_config(folder / CONFIG_FILE), AdapterLimits(), base.family)
        fetch(str(folder), None, kind="adapter", cache_dir=None)
        stack, modules, parameters = config.stack(base.layers), base.layer_modules, base.layer_parameters
        layout = layout_of(config, stack, modules, parameters, base.prefix, base.ends)
        checked_header(
            folder / WEIGHTS_FILE, Expected(config, stack, layout, base.ends, MAX_FOREIGN_TOKENS), base.prefix
        )
    except LorarepError as error:
        return str(error)
    return "served"


def write_header(file: Path, tensors: Mapping[str, tuple[int, ...]], dtype: str) -> None:
    """A safetensors file of zeros with some tensors."""
    at, header = 0, {}
    for name, shape in tensors.items():
        size = DTYPE_BYTES[dtype]
        for length in shape:
            size *= length
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    with file.open("wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        opened.truncate(8 + len(text) + at)


def old_experts(case: dict[str, Any]) -> dict[str, list[int]]:
    """(out, in) of modules of experts, by their paths in a layer; "*" stands for the number of each of four."""
    found = {name.replace("*", str(i)): shape for name, shape in case.get("experts", {}).items() for i in range(4)}
    return dict(sorted(found.items()))


def tensors_of(case: dict[str, Any], base: Footprint) -> dict[str, tuple[int, ...]]:
    """What PEFT would have written for the modules of a case, by the names of its time."""
    tensors: dict[str, tuple[int, ...]] = {}
    prefix, kinds = case.get("prefix", base.prefix), case.get("kinds", ["lora_A.weight", "lora_B.weight"])
    for position in range(case.get("positions", LAYERS)):
        shapes = {**base.layer_modules[position % LAYERS], **old_experts(case)}
        ranks = {**case["modules"], **dict.fromkeys(old_experts(case), 8)}
        for module, rank in ranks.items():
            out, into = shapes[module]
            for kind in kinds:
                shapes_of = {"lora_A": (rank, into), "lora_B": (out, rank), "lora_E": (rank, 1)}
                shape = shapes_of.get(kind.removesuffix(".weight"), (out,))
                tensors[f"base_model.model.{prefix}.{position}.{module}.{kind}"] = shape
    return {**tensors, **{name: tuple(shape) for name, shape in case.get("others", {}).items()}}


@pytest.mark.parametrize("name", CENSUS)
def test_each_adapter_has_the_right_verdict(name: str, tmp_path: Path) -> None:
    case = CENSUS[name]
    text = case["text"] if "text" in case else json.dumps({**VERSIONS[case["peft"]], **case["config"]})
    (tmp_path / CONFIG_FILE).write_text(text)
    if "file" in case:
        (tmp_path / case["file"]).write_bytes(b"weights")
    else:
        write_header(tmp_path / WEIGHTS_FILE, tensors_of(case, base_of(case["base"])), case.get("dtype", "F32"))
    found = verdict(tmp_path, case["base"])
    assert found.startswith(case["verdict"]), found
    if case["verdict"] != "served":
        assert case.get("way_out", "") in found


@pytest.mark.parametrize(
    ("name", "fields", "why"),
    [
        ("flan-t5", {"model_type": "t5"}, "transformers has no causal model for the type 't5'"),
        ("nllb", {"model_type": "m2m_100"}, "transformers has no causal model for the type 'm2m_100'"),
        ("qwen3-next", {"model_type": "qwen3_next"}, "layer_types ['linear_attention']"),
        ("qwen3.5", {"model_type": "qwen3_5_text"}, "layer_types ['linear_attention']"),
    ],
)
def test_a_base_that_cannot_be_served_is_refused_by_its_config(
    name: str, fields: dict[str, Any], why: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(FailedPrecondition, match=why.replace("[", r"\[")):
        footprint(read_model_config(tmp_path), None)


@pytest.mark.parametrize("name", BASES)
def test_a_base_as_it_is_published_is_served(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(BASES[name]))
    register_attention()
    assert refusal(read_model_config(tmp_path)) == ""
