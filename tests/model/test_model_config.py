"""What a base's config and files say before anything is loaded."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import BloomConfig, LlamaConfig, MptConfig, Phi3Config, PretrainedConfig

from lorarep_runtime.config import BaseConfig
from lorarep_runtime.errors import DataLoss, FailedPrecondition, InvalidArgument
from lorarep_runtime.model.model_config import quantization_of, trained_tokens
from lorarep_runtime.request import Request, Stopping
from tests.support.engines import PROMPT, engine_for
from tests.support.models import SHAPE, load_base, reference_logits, save_base

LONG = dict(rope_type="longrope", rope_theta=10000.0, short_factor=[1.0] * 8, long_factor=[2.0] * 8)
DYNAMIC = dict(rope_type="dynamic", rope_theta=10000.0, factor=4.0)
YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=128)


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({**LONG, "original_max_position_embeddings": 96}, 96),
        ({**DYNAMIC, "original_max_position_embeddings": 128}, 128),
        (DYNAMIC, 512),  # its frequencies change past the length that it was trained for
        (YARN, 512),  # always the same frequencies
        ({"sliding_attention": YARN, "full_attention": {**DYNAMIC, "original_max_position_embeddings": 64}}, 64),
    ],
)
def test_a_base_is_served_as_long_as_its_frequencies_stay(rope: dict[str, Any], expected: int) -> None:
    config = LlamaConfig(**SHAPE)
    config.rope_parameters = rope
    assert trained_tokens(config) == expected


@pytest.mark.parametrize(
    ("config", "expected"), [(BloomConfig(), 2048), (BloomConfig(seq_length=512), 512), (MptConfig(max_seq_len=64), 64)]
)
def test_a_base_without_position_embeddings_is_served_as_long_as_it_was_trained(
    config: PretrainedConfig, expected: int
) -> None:
    assert trained_tokens(config) == expected


def test_a_longrope_base_answers_up_to_its_original_length(tmp_path: Path) -> None:
    rope = {**LONG, "partial_rotary_factor": 1.0, "original_max_position_embeddings": 96}
    base = save_base("phi3", tmp_path, original_max_position_embeddings=96, rope_parameters=rope)
    engine = engine_for(base, kv_bytes=1 << 20)
    assert isinstance(engine.base.config, Phi3Config)
    assert engine.max_tokens == 96
    engine.submit(Request(tuple(range(90)), stopping=Stopping(max_new_tokens=6)), engine.adapters.lease([]), print)
    with pytest.raises(InvalidArgument, match="96"):
        engine.submit(Request(tuple(range(90)), stopping=Stopping(max_new_tokens=7)), engine.adapters.lease([]), print)


@pytest.mark.parametrize("name", ["max_position_embeddings", "num_attention_heads"])
def test_a_config_without_a_needed_number_is_refused_by_name(name: str, tmp_path: Path) -> None:
    base = save_base("llama", tmp_path)
    file = base / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), name: None}))
    with pytest.raises(FailedPrecondition, match=f"^base: .*{name}"):
        engine_for(base)


@pytest.mark.parametrize("size", [0, 100, -4])
def test_a_truncated_file_of_weights_is_named(size: int, tmp_path: Path) -> None:
    base = save_base("llama", tmp_path)
    file = base / "model.safetensors"
    os.truncate(file, size % file.stat().st_size)
    with pytest.raises(DataLoss, match=r"^model\.safetensors: is not a whole safetensors file"):
        engine_for(base)


def resave(base: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], **config: Any) -> Path:
    """Changes the tensors of a base, and fields of its config."""
    save_file(change(load_file(base / "model.safetensors")), base / "model.safetensors", {"format": "pt"})
    file = base / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    return base


FOUR = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def test_a_quantized_checkpoint_is_told_as_transformers_tells_it() -> None:
    """Older bitsandbytes checkpoints name no method."""

    def told(own: dict[str, Any], **asked: Any) -> str:
        return quantization_of(LlamaConfig(quantization_config=own), BaseConfig("base", **asked))[0]

    for method in ({}, {"quant_method": "bitsandbytes"}):
        assert told({**FOUR, **method}) == "nf4"
        assert told({"load_in_8bit": True, **method}) == "int8"
    assert told({**FOUR, "bnb_4bit_use_double_quant": True}, quantization="nf4", double_quantization=True) == "nf4"
    with pytest.raises(InvalidArgument, match=r"^double_quantization: "):
        told(FOUR, quantization="nf4", double_quantization=True)
    for own in (
        {"quant_method": "bitsandbytes"},
        {"quant_method": "gptq", "bits": 4},
        {**FOUR, "bnb_4bit_quant_type": "fp4"},
    ):
        with pytest.raises(FailedPrecondition, match=r"^base: quantized "):
            told(own)


LACKING = {
    "one tensor": lambda tensors: {k: v for k, v in tensors.items() if k != "model.layers.3.mlp.up_proj.weight"},
    "keys of a wrapper": lambda tensors: {f"_orig_mod.{k}": v for k, v in tensors.items()},
    "fewer layers than its config says": lambda tensors: {k: v for k, v in tensors.items() if ".layers.5." not in k},
}


@pytest.mark.parametrize("change", LACKING.values(), ids=LACKING)
def test_a_base_that_lacks_weights_is_refused_by_name(change: Any, tmp_path: Path) -> None:
    """`transformers` would draw them at random, and say so in its log."""
    base = resave(save_base("llama", tmp_path), change)
    with pytest.raises(DataLoss, match=r"\S+\.weight: is not among the weights of the base"):
        engine_for(base)


def test_a_base_of_another_shape_than_its_config_says_is_refused_by_name(tmp_path: Path) -> None:
    base = resave(save_base("llama", tmp_path), dict, intermediate_size=96)
    with pytest.raises(DataLoss, match=r"down_proj\.weight: has the shape \(64, 128\), .* says \(64, 96\)"):
        engine_for(base)


HEADS = {
    "tied, and not in the file": lambda tensors: {k: v for k, v in tensors.items() if k != "lm_head.weight"},
    "said to be tied, and in the file": lambda tensors: {**tensors, "lm_head.weight": tensors["lm_head.weight"] + 1},
}


@pytest.mark.parametrize("change", HEADS.values(), ids=HEADS)
def test_a_head_is_tied_where_transformers_ties_it(change: Any, tmp_path: Path) -> None:
    base = resave(save_base("llama", tmp_path), change, tie_word_embeddings=True)
    engine = engine_for(base)
    expected = reference_logits(load_base(base), PROMPT)
    torch.testing.assert_close(engine.logits(PROMPT, engine.adapters.lease([])), expected, atol=1e-4, rtol=0)


def test_weights_under_another_name_are_refused(tmp_path: Path) -> None:
    """`transformers` reads that file in place of model.safetensors, and lorarep would have checked another."""
    base = resave(save_base("llama", tmp_path), dict, transformers_weights="other.safetensors")
    with pytest.raises(FailedPrecondition, match=r"^transformers_weights: 'other\.safetensors'"):
        engine_for(base)
