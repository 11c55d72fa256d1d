"""Products and whole models in every dtype that a CPU may be asked for."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Params4bit

from lorarep_runtime.base import Base
from lorarep_runtime.config import BaseConfig, EngineConfig, SchedulerConfig
from lorarep_runtime.engine import Engine
from lorarep_runtime.linear import product
from tests.engines import PROMPT, greedy
from tests.models import MAPS, reference, reference_logits, save_adapter, save_base, stack_of

HALF = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("rows", [1, 2, 6, 7, 40])
def test_a_product_is_the_product(rows: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(rows)
    x, weight = (torch.randn(n, 96, generator=generator).to(dtype) for n in (rows, 56))
    y = product(x, weight)
    assert (y.shape, y.dtype, y.is_contiguous()) == ((rows, 56), dtype, True)
    exact = x.double() @ weight.double().T
    assert (y - exact).norm() < 2 * torch.finfo(dtype).eps * exact.norm()


@pytest.mark.parametrize("dtype", HALF)
def test_a_model_of_half_the_bits_is_as_exact_as_transformers(dtype: torch.dtype, tmp_path: Path) -> None:
    base = save_base("llama", tmp_path / "base")
    ranges = MAPS["overlap"]
    adapter = save_adapter(base, tmp_path / "adapter", r=4, target_modules="all-linear", layer_replication=ranges)
    config = BaseConfig(str(base), dtype=str(dtype).removeprefix("torch."), device="cpu")  # type: ignore[arg-type]
    engine = Engine(EngineConfig(config, scheduler=SchedulerConfig(kv_bytes=8 << 20)))
    engine.adapters.load("lora", str(adapter), trusted=True)
    lease = engine.adapters.lease([("lora", 1.0)])
    exact = reference_logits(reference(base, adapter, stack_of(ranges)), PROMPT)
    ours = engine.logits(PROMPT, lease)
    # PEFT keeps adapters in fp32 and casts what they read and add; the layers round in either.
    theirs = reference_logits(reference(base, adapter, stack_of(ranges)).to(dtype), PROMPT)
    assert (ours - exact).norm() < 1.5 * (theirs - exact).norm()
    assert (theirs - exact).norm() < 0.1 * exact.norm()
    (answer,) = engine.generate([(greedy(new_tokens=6), lease)])
    assert len(answer.tokens) == 6


def test_what_a_base_was_loaded_in_is_gone_at_once(tmp_path: Path) -> None:
    base = save_base("llama", tmp_path)
    gc.collect()
    gc.disable()
    try:
        loaded = Base(BaseConfig(str(base), quantization="nf4", device="cpu"))
        assert not [type(thing) for thing in gc.get_objects() if type(thing) in (Linear4bit, Params4bit)]
        assert loaded.quantization == "nf4"
    finally:
        gc.enable()
