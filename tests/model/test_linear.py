"""Matrix products and whole models in every dtype that a CPU may be asked for."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import QuantState
from bitsandbytes.nn import Linear4bit, Params4bit
from transformers import AutoModelForCausalLM, modeling_utils

from lorarep_runtime.config import BaseConfig, EngineConfig, SchedulerConfig
from lorarep_runtime.engine.engine import Engine
from lorarep_runtime.errors import InvalidArgument
from lorarep_runtime.kernels.hopper import int8, nf4
from lorarep_runtime.model import packed
from lorarep_runtime.model.base import Base
from lorarep_runtime.model.packed import PACKED_MODULES, PackedPart
from lorarep_runtime.model.weights import DenseWeight, Int8Weight, NF4Weight, Weight, matmul
from tests.support.engines import PROMPT, greedy
from tests.support.models import MAPS, reference, reference_logits, save_adapter, save_base, stack_of

HALF = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("rows", [1, 2, 6, 7, 40])
def test_a_matmul_is_the_matmul(rows: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(rows)
    x, weight = (torch.randn(n, 96, generator=generator).to(dtype) for n in (rows, 56))
    y = matmul(x, weight)
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


def weights_of(kind: str, shapes: Mapping[str, tuple[int, int]]) -> dict[str, Weight]:
    weights: dict[str, Weight] = {}
    for name, (out, into) in shapes.items():
        dense = torch.randn(out, into).bfloat16()
        if kind == "nf4":
            weights[name] = NF4Weight(*bnb.functional.quantize_4bit(dense, quant_type="nf4"))
        elif kind == "int8":
            rows, absmax, _ = bnb.functional.int8_vectorwise_quant(dense.half())
            weights[name] = Int8Weight(rows, absmax)
        else:
            weights[name] = DenseWeight(dense)
    return weights


def test_scales_of_double_quantization_give_its_values_to_the_bit() -> None:
    dense = torch.randn(64, 512).bfloat16()
    twice = NF4Weight(*bnb.functional.quantize_4bit(dense, quant_type="nf4", compress_statistics=True))
    state = QuantState(
        absmax=twice.scales(),
        shape=twice.state.shape,
        code=twice.state.code,
        blocksize=twice.state.blocksize,
        quant_type="nf4",
        dtype=twice.state.dtype,
    )
    once = NF4Weight(twice.data[0], state)
    assert (twice.state.nested, once.state.nested) == (True, False)
    assert torch.equal(once.dequantize(torch.bfloat16), twice.dequantize(torch.bfloat16))
    ours, theirs = packed.pack([twice, twice]), packed.pack([once, once])
    torch.testing.assert_close((ours.scales, ours.weights), (theirs.scales, theirs.weights), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["nf4", "int8", "none"])
def test_groups_are_the_weights_side_by_side(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "_has_kernel", lambda weight, dtype: weight.shape[0] != 16)
    names = [name for group in PACKED_MODULES for name in group]
    shapes = dict(zip(names, [(64, 64), (32, 64), (32, 64), (64, 64), (112, 64), (112, 64), (16, 64)], strict=True))
    layers = [weights_of(kind, shapes) for _ in range(2)]
    before = [dict(layer) for layer in layers]
    packed.pack_layers(layers, torch.bfloat16)
    for old, new in zip(before, layers, strict=True):
        assert new["mlp.down_proj"] is old["mlp.down_proj"]  # for which there is no kernel
        for name in names[:-1]:
            weight = new[name]
            assert isinstance(weight, PackedPart)
            numbers, *scales = old[name].data + old[name].constants[:1]
            if kind == "nf4":
                numbers, scales[0] = nf4.arrange(numbers, scales[0], shapes[name])
            elif kind == "int8":
                numbers = int8.arrange(numbers)
            for is_, was in zip(weight.data + weight.constants, [numbers, *scales], strict=True):
                torch.testing.assert_close(is_, was, rtol=0, atol=0)
                assert is_.data_ptr() % 16 == 0
    for tensors in ("data", "constants"):
        found = [t for layer in layers for name in names[:-1] for t in getattr(layer[name], tensors)]
        whole = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in found}
        assert 0 <= sum(whole.values()) - sum(t.nbytes for t in found) < 128 * (len(found) + 1)
        assert len(whole) == (1 if found else 0)


@pytest.mark.parametrize("storage", [torch.uint8, torch.int8, torch.bfloat16, torch.float16, torch.float32])
def test_a_4_bit_weight_is_packed_from_bytes_of_any_type(storage: torch.dtype) -> None:
    dense = torch.randn(32, 128).bfloat16()
    plain, held = (
        NF4Weight(*bnb.functional.quantize_4bit(dense, quant_type="nf4", quant_storage=dtype))
        for dtype in (torch.uint8, storage)
    )
    assert held.data[0].nbytes == plain.data[0].nbytes
    assert torch.equal(packed.pack([held, held]).weights, packed.pack([plain, plain]).weights)
    assert torch.equal(held.dequantize(torch.bfloat16), plain.dequantize(torch.bfloat16))


@pytest.mark.parametrize("device", ["meta", "cpu:1", "nonsense"])
def test_a_device_that_cannot_serve_is_refused_before_anything_is_fetched(device: str) -> None:
    with pytest.raises(InvalidArgument, match=f"device: '{device}'"):
        Base(BaseConfig("org/absent", device=device))


def test_transformers_takes_no_memory_for_the_whole_model_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, taken = save_base("llama", tmp_path), []
    monkeypatch.setattr(modeling_utils, "caching_allocator_warmup", lambda *_: taken.append(1))
    Base(BaseConfig(str(base), device="cpu"))
    assert not taken
    AutoModelForCausalLM.from_pretrained(base, device_map={"": "cpu"})
    assert taken


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
