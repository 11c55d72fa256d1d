"""The log at start says which code computes each part, and why no faster one does."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from lorarep_runtime.engine.paths import paths_of
from lorarep_runtime.kernels.gemms import Gemms
from tests.support.engines import engine_for
from tests.support.models import save_base


def test_a_start_tells_what_computes_each_part(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "lorarep_runtime")
    engine = engine_for(save_base("llama", tmp_path), kv_bytes=1 << 20)
    weights = sum(map(len, engine.base.weights))
    assert "steps and prompts: the layers of transformers; not captured, because the device is a CPU" in caplog.messages
    assert f"products of {weights} weights: a library; no kernels, because the device is a CPU" in caplog.messages


def test_portable_kernels_are_told_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for module in ("lorarep_runtime.model.packed", "lorarep_runtime.engine.paths"):
        monkeypatch.setattr(f"{module}.gemms_for", lambda device, dtype: Gemms("portable", "8.6 is no Hopper's"))
    caplog.set_level(logging.INFO, "lorarep_runtime")
    engine_for(save_base("llama", tmp_path), "int8", kv_bytes=1 << 20)
    said = [line for line in caplog.messages if line.startswith("products")]
    assert [line.partition(": ")[2] for line in said] == ["portable kernels; not Hopper's, because 8.6 is no Hopper's"]


def test_modules_of_other_families_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("lorarep_runtime.model.packed.gemms_for", lambda device, dtype: Gemms("portable", "?"))
    caplog.set_level(logging.INFO, "lorarep_runtime")
    engine_for(save_base("phi3", tmp_path), "int8", kv_bytes=1 << 20)
    assert any("self_attn.qkv_proj is no module of Llama's" in line for line in caplog.messages)


def test_an_old_gpu_walks_the_layers_of_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = engine_for(save_base("llama", tmp_path), kv_bytes=1 << 20).base
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    base.device = torch.device("cuda")
    assert next(iter(paths_of(base))) == (
        "steps and prompts: the layers of transformers; not captured, because compute capability 7.5 is below 8.0"
    )
