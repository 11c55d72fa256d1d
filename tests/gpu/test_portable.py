"""Steps and prompts with the portable kernels are those of the walked layers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lorarep_runtime.config import BaseConfig, EngineConfig, SchedulerConfig
from lorarep_runtime.engine.engine import Engine
from lorarep_runtime.gpu.adapted_linear import PortableLinear
from lorarep_runtime.gpu.decoder import Decoder
from lorarep_runtime.kernels.gemms import Gemms
from lorarep_runtime.model import packed
from lorarep_runtime.model.batch import Batch, Span
from lorarep_runtime.model.kv_cache import PageTable
from tests.gpu.test_fused_layer import TARGETS, fill, plan_of, save_small, with_table
from tests.support.engines import PROMPT
from tests.support.models import save_adapter

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("quantization", ["int8", "nf4"] if DEVICE == "cuda" else ["int8"])
def test_logits_are_those_of_the_library(quantization: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float16, which the interpreter multiplies. The library's logits are of an engine of its own."""
    monkeypatch.setattr("lorarep_runtime.gpu.buffers.MOST_PARTS", 2)
    monkeypatch.setattr("lorarep_runtime.gpu.buffers.MOST_SPLITS", 1)
    monkeypatch.setattr("lorarep_runtime.kernels.decode.shrink.MOST_RANK_PROGRAMS", 1)
    base = save_small("qwen2", tmp_path)
    adapter = save_adapter(
        base, tmp_path / "dora", r=8, use_dora=True, target_modules=TARGETS, layer_replication=[[0, 2], [1, 3]]
    )
    config = BaseConfig(str(base), quantization=quantization, dtype="float16", device=DEVICE)
    texts = [PROMPT[:7], PROMPT[3:15]]
    monkeypatch.setattr(packed, "gemms_for", lambda device, dtype: Gemms("library", "asked for"))
    theirs = [logits_of(config, adapter, text, name) for text, name in zip(texts, ("dora", None), strict=True)]
    monkeypatch.setattr(packed, "gemms_for", lambda device, dtype: Gemms("portable", "asked for"))
    engine = engine_of(config, adapter)
    decoder = Decoder(engine.base, engine.pool, max_sequences=2, max_tokens=64, max_pages=4)
    linears = [projection.linear for layer in decoder.layers for projection in layer.projections]
    assert all(isinstance(linear, PortableLinear) for linear in linears)
    leases = [engine.adapters.lease([("dora", 1.0)]), engine.adapters.lease([])]
    spans = []
    for lease, text in zip(leases, texts, strict=True):
        table = PageTable(engine.pool, len(lease.stack))
        assert table.grow(len(text))
        fill(engine, lease, list(text[:-1]), table)
        spans.append(Span(list(text[-1:]), len(text) - 1, lease.stack, with_table(lease, engine), table))
    decoder.set_rows(spans, plan_of(spans))
    _, logits = decoder.step()
    for row, expected in zip(logits, theirs, strict=True):
        assert_alike(row, expected[-1])
    whole = [replace(span, tokens=list(text), context=0) for span, text in zip(spans, texts, strict=True)]
    batch = Batch(whole, engine.base.device)
    prefill = decoder.prefill(batch)
    prefill.advance(len(batch.plan.visits))
    found = prefill.logits(torch.arange(int(batch.starts[-1])))
    assert_alike(found, torch.cat([theirs[i] for i in batch.order]))


def engine_of(config: BaseConfig, adapter: Path) -> Engine:
    engine = Engine(EngineConfig(config, scheduler=SchedulerConfig(kv_bytes=16 << 20)))
    engine.adapters.load("dora", str(adapter), trusted=True)
    return engine


def logits_of(config: BaseConfig, adapter: Path, text: tuple[int, ...], name: str | None) -> torch.Tensor:
    engine = engine_of(config, adapter)
    lease = engine.adapters.lease([(name, 1.0)] if name else [])
    logits = engine.logits(list(text), lease)
    lease.release()
    return logits


def assert_alike(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert ((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max() < 5e-3
