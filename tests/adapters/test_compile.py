"""An adapter's file: checked by its header, compiled to what PEFT computes, mixed as PEFT mixes."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lorarep_runtime.adapters import maker
from lorarep_runtime.adapters.compile import compile_adapter, load_kernels
from lorarep_runtime.adapters.files import AdapterFiles
from lorarep_runtime.adapters.weights_file import WeightsFile
from lorarep_runtime.config import AdapterLimits, BaseConfig, EngineConfig, SchedulerConfig
from lorarep_runtime.engine.engine import Engine
from lorarep_runtime.errors import DataLoss, FailedPrecondition, InvalidArgument
from lorarep_runtime.kernels.entry_table import Entry, entry_table
from lorarep_runtime.model.compiled_adapter import Adapter, table_of
from lorarep_runtime.model.physical_stack import stacked
from tests.support.decode_rows import one_by_one
from tests.support.engines import PROMPT, engine_for
from tests.support.models import load_base, reference_logits, save_adapter, save_base, stack_of, without_replication

MAP = [[0, 4], [2, 5]]
FIRST_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base("llama", tmp_path_factory.mktemp("weights") / "base")


@pytest.fixture(scope="module")
def engine(base: Path) -> Engine:
    return engine_for(base, kv_bytes=1 << 20)


@pytest.fixture(scope="module")
def saved(base: Path) -> Path:
    return save_adapter(base, base.parent / "saved", r=4, target_modules=["q_proj", "o_proj"], layer_replication=MAP)


@pytest.fixture
def changed(saved: Path, tmp_path: Path) -> Callable[[Callable[[dict[str, Tensor]], None]], Path]:
    """Copies of the adapter with other tensors."""

    def change(how: Callable[[dict[str, Tensor]], None]) -> Path:
        tensors = load_file(saved / "adapter_model.safetensors")
        how(tensors)
        save_file(tensors, tmp_path / "adapter_model.safetensors")
        (tmp_path / "adapter_config.json").write_bytes((saved / "adapter_config.json").read_bytes())
        return tmp_path

    return change


def renamed(tensors: dict[str, Tensor], old: str, new: str) -> None:
    """Renames all tensors, as the keys of torch's wrappers of models and of PEFT's own modules are."""
    for name in list(tensors):
        tensors[name.replace(old, new)] = tensors.pop(name)


SURPLUS = "base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("how", "named"),
    [
        (lambda t: t.pop(FIRST_A), FIRST_A),
        (lambda t: t.update({SURPLUS: torch.zeros(4, 64)}), SURPLUS),
        (lambda t: renamed(t, "base_model.", "base_model._orig_mod."), r"base_model\._orig_mod\.model\.model\.layers"),
        (lambda t: renamed(t, "model.layers.", "model._fsdp_wrapped_module.layers."), "_fsdp_wrapped_module"),
        (lambda t: renamed(t, "lora_A.weight", "lora_A.default.weight"), r"lora_A\.default\.weight"),
        (lambda t: t.update({"lm_head.weight": torch.zeros(4)}), "lm_head.weight"),
        (lambda t: t.update({FIRST_A: torch.zeros(5, 64)}), FIRST_A),
        (lambda t: t.update({FIRST_A: torch.zeros(4, 64, dtype=torch.int8)}), FIRST_A),
        (lambda t: t[FIRST_A].fill_(torch.nan), r"layers\.0\.self_attn\.q_proj"),
        (lambda t: t[FIRST_A][0].fill_(torch.inf), r"layers\.0\.self_attn\.q_proj"),
    ],
    ids=[
        "missing",
        "surplus",
        "compiled",
        "sharded",
        "named",
        "surplus elsewhere",
        "shape",
        "dtype",
        "NaN",
        "infinity",
    ],
)
def test_a_file_that_contradicts_its_config_is_refused_by_name(engine: Engine, changed, how, named: str) -> None:
    """PEFT would leave what it does not find in the file as it was drawn, and take no notice of keys of wrappers."""
    folder = changed(how)
    with pytest.raises(FailedPrecondition, match=named):
        engine.adapters.load("bad", str(folder), trusted=True)
    assert engine.adapters.list() == []
    assert engine.ledger().adapters == {}


def test_a_config_that_targets_nothing_is_refused(engine: Engine, saved: Path, tmp_path: Path) -> None:
    config = json.loads((saved / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["nothing"]}))
    save_file({}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(FailedPrecondition, match="target_modules"):
        engine.adapters.load("bad", str(tmp_path), trusted=True)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"r": NaN', "[" * 100_000, "\xff"])
def test_a_config_that_is_no_object_is_refused(engine: Engine, saved: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "adapter_config.json").write_text(text, encoding="latin-1")
    (tmp_path / "adapter_model.safetensors").write_bytes((saved / "adapter_model.safetensors").read_bytes())
    with pytest.raises(InvalidArgument, match=r"adapter_config\.json"):
        engine.adapters.load("bad", str(tmp_path), trusted=True)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_tensors_may_lie_anywhere_in_a_file(base: Path, tmp_path: Path, kind: str, monkeypatch) -> None:
    """In any order, of several types, at odd addresses; all at once or in parts."""
    asked = dict(r=4, rank_pattern={"layers.1.self_attn.q_proj": 3}, target_modules=["q_proj", "o_proj"])
    folder = save_adapter(base, tmp_path / "adapter", use_dora=kind == "dora", layer_replication=MAP, **asked)
    engine = engine_for(base, adapters={"sorted": folder}, kv_bytes=1 << 20)
    file = folder / "adapter_model.safetensors"
    tensors = list(load_file(file).items())
    random.Random(0).shuffle(tensors)
    header, body = {}, b""
    for i, (name, tensor) in enumerate(tensors):
        content = (tensor.double() if i % 3 == 0 else tensor).numpy().tobytes()
        dtype, offsets = "F64" if i % 3 == 0 else "F32", [len(body), len(body) + len(content)]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": offsets}
        body += content
    text = json.dumps(header).encode()
    text += b" " * (1 - len(text) % 2)
    file.write_bytes(struct.pack("<Q", len(text)) + text + body)
    engine.adapters.load("shuffled", str(folder), trusted=True)
    monkeypatch.setattr("lorarep_runtime.adapters.compile.MAX_RUN_ELEMENTS", 300)
    engine.adapters.load("in parts", str(folder), trusted=True)
    expected, *others = (entries(engine, name) for name in ("sorted", "shuffled", "in parts"))
    for other in others:
        assert other.keys() == expected.keys()
        for key, entry in expected.items():
            for ours, theirs in zip(other[key], entry, strict=True):
                assert theirs is None if ours is None else torch.equal(ours, theirs)


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("device", ["cpu", *["cuda"] * torch.cuda.is_available()])
def test_c_is_the_magnitude_over_the_norm(
    device: str, dtype: str, quantization: str, base: Path, tmp_path: Path
) -> None:
    adapter = save_adapter(base, tmp_path, r=4, lora_alpha=80, use_dora=True, target_modules=["q_proj"])
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    config = BaseConfig(str(base), quantization=quantization, dtype=dtype, device=device)  # type: ignore[arg-type]
    engine = Engine(EngineConfig(config, scheduler=SchedulerConfig(kv_bytes=1 << 20)))
    engine.adapters.load("dora", str(adapter), trusted=True)
    for (position, module), entry in entries(engine, "dora").items():
        path = f"base_model.model.model.layers.{position}.{module}.lora_"
        a, b, magnitude = (tensors[path + name].double() for name in ("A.weight", "B.weight", "magnitude_vector"))
        weight = engine.base.weights[position][module].dequantize(torch.float32).double().cpu()
        assert 20 * (b @ a).norm() > 0.3 * weight.norm(), "the norm is that of the sum"
        assert entry.c is not None
        c = magnitude / (weight + 20 * b @ a).norm(dim=1)
        error = (entry.c.double().cpu() - c).norm() / c.norm()
        assert error < 2 * torch.finfo(engine.base.dtype).eps


class Operations(TorchDispatchMode):
    """What this thread has torch do."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.add(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_a_first_load_has_no_kernel_that_was_not_loaded_at_start(quantization: str, base: Path, tmp_path: Path) -> None:
    engine = engine_for(base, quantization, kv_bytes=1 << 20)
    folder = save_adapter(base, tmp_path, r=4, use_dora=True, target_modules=["q_proj", "o_proj"])
    files, served = AdapterFiles(engine.base, {}, AdapterLimits(), None), engine.base
    checked = files.check(str(folder), None, None, None, trusted=True)
    with Operations() as loaded:
        load_kernels(served.norm_terms, served.layer_modules, served.dtype, served.device)
    with Operations() as used:
        files.compile(checked, None)
    of_the_host = {"aten.empty.memory_format", "aten.detach.default", "aten.view.dtype"}
    assert used.names - loaded.names == of_the_host, "what reads the file launches no kernel"


def compiled(engine: Engine, name: str) -> Adapter:
    lease = engine.adapters.lease([(name, 1.0)])
    lease.wait()
    assert lease.adapter is not None
    return lease.adapter


def entries(engine: Engine, name: str) -> Mapping[tuple[int, str], Entry]:
    return compiled(engine, name).entries


@pytest.mark.parametrize("how", [dict(use_dora=True), dict(lora_bias=True)], ids=str)
def test_the_table_says_where_each_entry_is(
    how: dict[str, Any], engine: Engine, base: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    ranks = {"layers.1.self_attn.q_proj": 3, "layers.[02].self_attn.v_proj": 7}
    asked: dict[str, Any] = dict(r=4, rank_pattern=ranks, target_modules=["q_proj", "v_proj", "down_proj"], **how)
    folder = save_adapter(base, tmp_path / "adapter", layer_replication=MAP, layers_to_transform=[0, 1, 2, 5], **asked)
    engine.adapters.load(request.node.name, str(folder), trusted=True)
    adapter = compiled(engine, request.node.name)
    table = table_of(adapter.storage, adapter.blocks, adapter.stack, adapter.modules)
    assert torch.equal(table, entry_table(one_by_one(adapter.entries), len(adapter.stack), adapter.modules))
    assert table[..., -1].unique().tolist() == [0, 3, 4, 7]


def test_a_file_that_has_changed_since_it_was_checked_is_data_loss(engine: Engine, changed, monkeypatch) -> None:
    folder = changed(lambda tensors: None)
    real = compile_adapter

    def cut(weights: WeightsFile, *given: Any, **more: Any) -> Adapter:
        weights.path.write_bytes(weights.path.read_bytes()[:-1])
        return real(weights, *given, **more)

    monkeypatch.setattr(maker, "compile_adapter", cut)
    with pytest.raises(DataLoss, match="not what it was"):
        engine.adapters.load("cut", str(folder), trusted=True)


def test_a_file_system_may_give_less_than_it_is_asked_for(
    engine: Engine, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preadv = os.preadv
    engine.adapters.load("whole", str(saved), trusted=True)
    monkeypatch.setattr(os, "preadv", lambda file, to, at: preadv(file, [to[0][: len(to[0]) // 2 + 1]], at))
    engine.adapters.load("slowly", str(saved), trusted=True)
    assert torch.equal(compiled(engine, "slowly").storage, compiled(engine, "whole").storage)


def test_a_damaged_copy_leaves_the_good_one(engine: Engine, saved: Path, changed) -> None:
    good = engine.adapters.load("good", str(saved), trusted=True)
    folder = changed(lambda tensors: None)
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DataLoss):
        engine.adapters.load("good", str(folder), trusted=True)
    assert engine.adapters.get("good") == good
    engine.adapters.unload("good")


def test_fan_in_fan_out_is_reset_as_peft_resets_it(base: Path, saved: Path, tmp_path: Path) -> None:
    """It is about Conv1D; over linear layers PEFT warns and goes on without it."""
    folder = tmp_path / "fan"
    shutil.copytree(saved, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "fan_in_fan_out": True}))
    engine = engine_for(base, adapters={"fan": folder}, kv_bytes=1 << 20)
    model = PeftModel.from_pretrained(stacked(load_base(base), stack_of(MAP)), without_replication(folder)).eval()
    logits = engine.logits(PROMPT, engine.adapters.lease([("fan", 1.0)]))
    assert (logits - reference_logits(model, PROMPT)).abs().max() < 1e-5


@pytest.mark.parametrize("kinds", [("lora", "lora"), ("lora", "dora"), ("dora", "dora", "bias")], ids="+".join)
def test_a_mix_is_several_active_adapters_of_peft(base: Path, tmp_path: Path, kinds: tuple[str, ...]) -> None:
    options = {"lora": {}, "dora": {"use_dora": True}, "bias": {"lora_bias": True}}
    targets = (["q_proj", "up_proj"], ["q_proj", "down_proj"], ["up_proj", "v_proj"])
    folders = {}
    for i, kind in enumerate(kinds):
        asked = dict(r=3 + i, lora_alpha=6, target_modules=targets[i], layer_replication=MAP, **options[kind])
        folders[f"{i}-{kind}"] = save_adapter(base, tmp_path / f"{i}", seed=i, **asked)
    engine = engine_for(base, adapters=folders, kv_bytes=1 << 20)
    lease = engine.adapters.lease([(name, 1.0) for name in folders])
    plain = [without_replication(folder) for folder in folders.values()]
    model = PeftModel.from_pretrained(stacked(load_base(base), stack_of(MAP)), plain[0], adapter_name="0")
    for i, folder in enumerate(plain[1:], 1):
        model.load_adapter(folder, adapter_name=str(i))
    model.base_model.set_adapter([str(i) for i in range(len(kinds))])
    reference = reference_logits(model.eval(), PROMPT)
    assert (engine.logits(PROMPT, lease) - reference).abs().max() < 1e-5
    lease.release()


def test_the_weights_of_a_mix_scale_each_adapters_change(base: Path, tmp_path: Path) -> None:
    """LoRA's change is linear: weight 2 is twice alpha. DoRA's alone at weight 0 is the bare stack."""
    asked = dict(r=3, target_modules=["q_proj", "up_proj"], layer_replication=MAP)
    once = save_adapter(base, tmp_path / "once", lora_alpha=6, **asked)
    twice = save_adapter(base, tmp_path / "twice", lora_alpha=12, **asked)
    dora = save_adapter(base, tmp_path / "dora", use_dora=True, **asked)
    engine = engine_for(base, adapters={"once": once, "twice": twice, "dora": dora}, kv_bytes=1 << 20)

    def logits(*adapters: tuple[str, float]) -> Tensor:
        lease = engine.adapters.lease(list(adapters))
        try:
            return engine.logits(PROMPT, lease)
        finally:
            lease.release()

    assert (logits(("once", 2)) - logits(("twice", 1))).abs().max() < 1e-5
    assert (logits(("once", 0.5), ("twice", 0.25)) - logits(("once", 1))).abs().max() < 1e-5
    assert (logits(("dora", 0)) - logits(("once", 0))).abs().max() < 1e-5
    assert (logits(("dora", 1)) - logits(("dora", 0))).abs().max() > 0.1
    with pytest.raises(InvalidArgument, match="weight"):
        engine.adapters.lease([("once", float("nan"))])
    with pytest.raises(InvalidArgument, match="named twice"):
        engine.adapters.lease([("once", 1), ("once", 1)])


def test_an_adapter_for_another_stack_does_not_mix(base: Path, saved: Path, tmp_path: Path) -> None:
    other = save_adapter(base, tmp_path / "other", r=4, target_modules=["q_proj"])
    engine = engine_for(base, adapters={"saved": saved, "other": other}, kv_bytes=1 << 20)
    with pytest.raises(InvalidArgument, match="'other' is for another stack"):
        engine.adapters.lease([("saved", 1), ("other", 1)])
    assert all(info.references == 0 for info in engine.adapters.list())


def test_a_stacked_models_adapter_goes_on_a_named_stack(base: Path, saved: Path) -> None:
    """An adapter trained on a physically stacked model counts positions and has no map of its own."""
    engine = engine_for(base, stacks={"deep": stack_of(MAP)}, kv_bytes=1 << 20)
    engine.adapters.load("own map", str(saved), trusted=True)
    engine.adapters.load("named", str(without_replication(saved)), stack="deep", trusted=True)
    leases = [engine.adapters.lease([(name, 1.0)]) for name in ("own map", "named")]
    one, other = (engine.logits(PROMPT, lease) for lease in leases)
    assert torch.equal(one, other)
    with pytest.raises(InvalidArgument, match=r"^stack: 'base'"):
        engine.adapters.load("wrong", str(saved), stack="base", trusted=True)
    with pytest.raises(FailedPrecondition, match=r"layers\.6"):
        engine.adapters.load("wrong", str(without_replication(saved)), trusted=True)
