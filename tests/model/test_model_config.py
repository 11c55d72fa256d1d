"""What a base's config and files say before anything is loaded."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, Phi3Config

from lorarep_runtime.errors import DataLoss, FailedPrecondition, InvalidArgument
from lorarep_runtime.model.model_config import trained_tokens
from lorarep_runtime.request import Request, Stopping
from tests.support.engines import engine_for
from tests.support.models import SHAPE, save_base

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
