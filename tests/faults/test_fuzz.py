"""Fuzzers of files and requests: each is accepted or refused with a promised error, in bounded time and memory."""

from __future__ import annotations

import json
import random
import shutil
import struct
import time
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.message import DecodeError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lorarep.v1 import generation_pb2 as pb
from lorarep_server.requests.frontend import submit

from lorarep_runtime.adapters.peft_config import AdapterConfig
from lorarep_runtime.adapters.peft_fields import CONSUMED, NO_EFFECT
from lorarep_runtime.config import AdapterLimits
from lorarep_runtime.engine.engine import Engine
from lorarep_runtime.errors import DataLoss, FailedPrecondition, InvalidArgument, NotFound, PermissionDenied
from tests.faults.test_port import ROUNDS, mutated
from tests.support.callers import request
from tests.support.engines import assert_nothing_held, engine_for
from tests.support.models import save_adapter, save_base

PROMISED = (InvalidArgument, FailedPrecondition)
FIELDS = sorted(CONSUMED | NO_EFFECT)
SECONDS = 60
"""Most seconds for one file; a config's patterns may take ten."""
MEMORY = 1 << 30
"""Most bytes by which the process may grow for one file."""
fuzzed = settings(max_examples=150 * ROUNDS, suppress_health_check=[HealthCheck.function_scoped_fixture])

WORDS = st.sampled_from(["q_proj", "v_proj", "all-linear", "layers", "model.layers.0.self_attn.q_proj", "LORA", "none"])
PIECES = [
    "a",
    "q_proj",
    ".*",
    "(",
    ")",
    "[",
    "]",
    "{9}",
    "{1,99999}",
    "|",
    "\\d",
    "+",
    "?",
    "(?R)",
    "(?P<position>",
    "$",
]
PATTERNS = st.lists(st.sampled_from(PIECES), max_size=12).map("".join)
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), WORDS, PATTERNS)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9) | WORDS | PATTERNS, inner, max_size=4)
    ),
    max_leaves=8,
)
CONFIGS = st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=12), VALUES, max_size=5)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    base = save_base("llama", tmp_path_factory.mktemp("fuzz") / "base", num_hidden_layers=2)
    return engine_for(base, kv_bytes=1 << 20, limits=AdapterLimits(max_rank=16, max_positions=16))


@pytest.fixture(scope="module")
def saved(engine: Engine) -> Path:
    folder = engine.base.folder.parent / "saved"
    return save_adapter(engine.base.folder, folder, r=2, target_modules=["q_proj"], layer_replication=[[0, 2], [1, 2]])


def outcome(engine: Engine, folder: Path, errors: tuple[type[Exception], ...]) -> bool:
    """Whether an adapter loads. An error that is not among `errors` fails the test."""
    began, before = time.monotonic(), forget_peak()
    try:
        engine.adapters.load("fuzzed", str(folder), trusted=True)
    except errors:
        assert engine.adapters.list() == []
        assert engine.ledger().adapters == {}
        return False
    finally:
        assert time.monotonic() - began < SECONDS
        assert memory("VmHWM") < before + MEMORY
    engine.adapters.unload("fuzzed")
    return True


def forget_peak() -> int:
    """Resident bytes now, from which the process's peak counts anew (proc(5), clear_refs): other tests ran before."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def memory(field: str) -> int:
    """Bytes by a field of this process's status (proc(5))."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:"))


@fuzzed
@given(changes=CONFIGS)
def test_any_config_loads_or_is_refused(engine: Engine, saved: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    config = json.loads((saved / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    shutil.copyfile(saved / "adapter_model.safetensors", tmp_path / "adapter_model.safetensors")
    outcome(engine, tmp_path, PROMISED)


@pytest.mark.parametrize("seed", range(2))
def test_any_bytes_of_a_config_load_or_are_refused(engine: Engine, saved: Path, tmp_path: Path, seed: int) -> None:
    dice = random.Random(seed)
    whole = (saved / "adapter_config.json").read_bytes()
    shutil.copyfile(saved / "adapter_model.safetensors", tmp_path / "adapter_model.safetensors")
    for _ in range(100 * ROUNDS):
        (tmp_path / "adapter_config.json").write_bytes(mutated(whole, dice))
        outcome(engine, tmp_path, PROMISED)


@pytest.mark.parametrize("seed", range(2))
def test_any_header_of_safetensors_loads_or_is_refused(engine: Engine, saved: Path, tmp_path: Path, seed: int) -> None:
    """Mutates bytes of the header and its length, and the names, types, shapes and offsets of its tensors."""
    dice = random.Random(seed)
    shutil.copyfile(saved / "adapter_config.json", tmp_path / "adapter_config.json")
    whole = (saved / "adapter_model.safetensors").read_bytes()
    end = 8 + struct.unpack("<Q", whole[:8])[0]
    loaded = 0
    for i in range(200 * ROUNDS):
        if i % 2:
            changed = mutated(whole[:end], dice) + whole[end:]
        else:
            header = json.loads(whole[8:end])
            name = dice.choice([name for name in header if name != "__metadata__"])
            field = dice.choice(["dtype", "shape", "data_offsets"])
            header[name][field] = dice.choice(
                [[], [0], [-1], [2**63], [2**64], [1 << 40, 1 << 40], [0, 0], "F8_E4M3", "BOOL", None, {}, 1.5, [2, 64]]
            )
            text = json.dumps(header).encode()
            changed = struct.pack("<Q", len(text)) + text + whole[end:]
        (tmp_path / "adapter_model.safetensors").write_bytes(changed)
        loaded += outcome(engine, tmp_path, (*PROMISED, DataLoss))
    assert loaded < 100 * ROUNDS


WHOLE = [
    request("abc", "own", new_tokens=3, logprobs=2, sampling=pb.Sampling(seed=1, top_p=0.9, temperature=0.5)),
    request([1, 2, 3], adapters=[pb.AdapterRef(name="own", weight=0.5)], stack="base"),
    request("", prompt=pb.Prompt(chat=pb.Chat(messages=[pb.ChatMessage(role="user", content="hi")]))),
    request("abc", stopping=pb.Stopping(stop=["x", "yz"], stop_token_ids=[7], max_new_tokens=9, min_new_tokens=2)),
]


@pytest.mark.parametrize("seed", range(2))
def test_any_request_is_admitted_or_refused(engine: Engine, saved: Path, seed: int) -> None:
    """Mutated requests are submitted, and cancelled before they are computed."""
    dice = random.Random(seed)
    engine.adapters.load("own", str(saved), trusted=True)
    admitted = 0
    for _ in range(500 * ROUNDS):
        data = mutated(dice.choice(WHOLE).SerializeToString(), dice)
        try:
            wanted = pb.GenerateRequest.FromString(data)
            engine.cancel(submit(engine, wanted, None, lambda event: None).id)
        except (DecodeError, NotFound, PermissionDenied, *PROMISED):
            pass
        else:
            admitted += 1
            engine.loop.step()
        assert_nothing_held(engine)
    engine.adapters.unload("own")
    assert 0 < admitted < 500 * ROUNDS


HOSTILE = {
    "repeats within repeats": "((((a{65535}){65535}){65535}){65535}){65535}",
    "small repeats within repeats": "((((((a{9}){9}){9}){9}){9}){9}){9}",
    "recursion": "(?R)",
    "recursion into a group": "((?1))",
    "contradicting flags": "(?V0)(?V1)",
    "parentheses": "(" * 5000 + ")" * 5000,
    "a count that is none": "a{99999999999999999999}",
}


@pytest.mark.parametrize("pattern", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("field", ["target_modules", "layers_pattern", "rank_pattern", "alpha_pattern"])
def test_patterns_that_would_take_all_memory_are_refused_by_name(field: str, pattern: str) -> None:
    value = {"target_modules": pattern, "layers_pattern": [pattern]}.get(field, {pattern: 4})
    config = {"peft_type": "LORA", "target_modules": ["q_proj"], field: value}
    began = time.monotonic()
    with pytest.raises(InvalidArgument, match=f"^{field}"):
        AdapterConfig.parse(config, AdapterLimits())
    assert time.monotonic() - began < SECONDS


def test_honest_patterns_are_not_refused() -> None:
    long = "|".join(f"model.layers.{i}.self_attn.[qv]_proj" for i in range(500))
    for pattern in (
        long,
        r".*layers\.\d{1,2}\.(self_attn|mlp)\..*",
        r"^(?:.*?(?:language|text).*?(?:q_proj|v_proj).*?)$",
    ):
        AdapterConfig.parse({"peft_type": "LORA", "target_modules": pattern}, AdapterLimits())
