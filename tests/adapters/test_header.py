"""Headers of weights files: read without the weights, and refused where a file is not what it claims to be."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
from safetensors import safe_open

from lorarep_runtime.adapters import header
from lorarep_runtime.adapters.header import Header, most_header_bytes, read_header, tensor_name
from lorarep_runtime.adapters.peft_config import AdapterConfig
from lorarep_runtime.config import AdapterLimits
from lorarep_runtime.errors import DataLoss, FailedPrecondition
from lorarep_runtime.model.form import Form
from tests.support.engines import engine_for
from tests.support.models import save_adapter, save_base

MOST = 1 << 20
"""Bytes of a header that the tests' files may have."""


def attack(text: bytes, body: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def small() -> bytes:
    return attack(json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode(), bytes(8))


def test_every_prefix_of_a_file_is_data_loss(tmp_path: Path) -> None:
    whole, file = small(), tmp_path / "adapter_model.safetensors"
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        with pytest.raises(DataLoss, match="adapter_model"):
            read_header(file, MOST)
    file.write_bytes(whole)
    assert read_header(file, MOST)["a"].shape == (2,)


def test_a_header_that_is_known_is_not_parsed_again_and_vouches_for_no_other_file(tmp_path: Path, monkeypatch) -> None:
    opened: list[Path] = []

    def noted(file: Path, **how: str) -> safe_open:
        opened.append(file)
        return safe_open(file, **how)

    def read(name: str, content: bytes) -> Header:
        (tmp_path / name).write_bytes(content)
        return read_header(tmp_path / name, MOST)

    monkeypatch.setattr(header, "safe_open", noted)
    header._header.cache_clear()
    whole = small()
    first = read("first", whole)
    assert read("like it", whole[:-1] + b"1") == first
    assert [file.name for file in opened] == ["first"]
    for name, content in (
        ("cut", whole[:-1]),
        ("longer", whole + b"0"),
        ("other", attack(b" " + whole[8:-8], bytes(7))),
    ):
        with pytest.raises(DataLoss, match=name):
            read(name, content)
    empty = read("empty", attack(b"{}"))
    with pytest.raises(DataLoss):
        read("says more", attack(b"{}", length=20))
    monkeypatch.setattr(header, "KNOWN_BYTES", 20)
    assert (read("too long to remember", whole), read("again", attack(b"{}"))) == (first, empty)
    assert [file.name for file in opened[-2:]] == ["says more", "too long to remember"]
    with pytest.raises(DataLoss, match="differs where nobody looked"):
        read("differs where nobody looked", whole.replace(b"[0, 8]", b"[0, 9]"))


def test_a_file_is_not_mapped_while_its_header_is_read(tmp_path: Path, monkeypatch) -> None:
    """Somebody who cuts a mapped file ends the process."""
    file, maps = tmp_path / "file", []

    def looked(file: Path, **how: str) -> safe_open:
        opened = safe_open(file, **how)
        maps.append(Path("/proc/self/maps").read_text())
        return opened

    monkeypatch.setattr(header, "safe_open", looked)
    file.write_bytes(small())
    header._header.cache_clear()
    assert read_header(file, MOST)["a"].shape == (2,)
    assert [str(file) in text for text in maps] == [False]


def test_a_file_that_becomes_another_while_it_is_read_is_not_remembered(tmp_path: Path, monkeypatch) -> None:
    whole, file = small(), tmp_path / "first"
    file.write_bytes(whole)
    header._header.cache_clear()
    with monkeypatch.context() as replaced:
        replaced.setattr(header, "give_way", lambda _: file.write_bytes(whole.replace(b"F32", b"I32")))
        with pytest.raises(DataLoss, match="first"):
            read_header(file, MOST)
    file.write_bytes(whole)
    assert read_header(file, MOST)["a"].dtype == "F32"


@pytest.mark.parametrize(
    "content",
    [
        attack(b"{}", length=2**63),
        attack(b"{}", length=2**32),
        attack(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,80]}}', bytes(8)),
        attack(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}}', bytes(8)),
        attack(b'{"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,0]}}'),
        attack(
            b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}',
            bytes(12),
        ),
        attack(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', bytes(16)),
        attack(b'{"a":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}}', bytes(8)),
        attack(b'{"a":{"dtype":"X9","shape":[2],"data_offsets":[0,8]}}', bytes(8)),
        attack(b"\xff\xfe{}"),
        attack(b"[" * 100_000),
        b"PK\x03\x04 a pickle in a zip",
    ],
)
def test_hostile_files_are_data_loss(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(content)
    with pytest.raises(DataLoss):
        read_header(file, MOST)


def test_a_header_beyond_what_its_config_needs_is_refused_before_it_is_parsed(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parsed, these 20 MiB would take seconds in which no other thread runs, and hundreds of MiB."""
    base = save_base("llama", tmp_path_factory.mktemp("header") / "base")
    folder = save_adapter(base, base.parent / "adapter", r=2, target_modules=["q_proj"])
    engine = engine_for(base, adapters={"adapter": folder}, kv_bytes=1 << 20)
    file = folder / "adapter_model.safetensors"
    surplus = ",".join(f'"a{i}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for i in range(350_000))
    file.write_bytes(attack(b"{" + surplus.encode() + b"}"))
    monkeypatch.setattr(header, "safe_open", None)
    with pytest.raises(FailedPrecondition, match=r"adapter_model\.safetensors: its header takes"):
        engine.adapters.load("large", str(folder), trusted=True)


def test_any_writers_header_of_what_a_config_needs_is_within_the_limit() -> None:
    form = Form(512, (1 << 17, 1 << 17), has_c=True, has_bias=False)
    layout = {(position, "mlp.down_proj"): form for position in range(100)}
    last = 1 << 40
    tensors = {
        tensor_name(f"model.layers.{position}.{module}", kind): {
            "dtype": "BF16",
            "shape": shape,
            "data_offsets": [last, last],
        }
        for (position, module), form in layout.items()
        for kind, shape in form.tensors
    }
    text = json.dumps({"__metadata__": {"format": "pt"}, **tensors}, indent=1)
    config = AdapterConfig.parse({"peft_type": "LORA", "target_modules": ["down_proj"]}, AdapterLimits())
    assert len(text) < most_header_bytes(config, layout, "model.layers")


def test_modules_that_adalora_has_pruned_have_names_in_the_header() -> None:
    pruned = [f"model.layers.{position}.mlp.down_proj" for position in range(1, 500)]
    last = 1 << 40
    tensors = {
        tensor_name(path, f"lora_{kind}"): {"dtype": "BF16", "shape": [0, 1 << 17], "data_offsets": [last, last]}
        for path in pruned
        for kind in "ABE"
    }
    pattern = {f"{path}.lora_E": [False] * 12 for path in (*pruned, *(f"elsewhere.{i}" for i in range(1000)))}
    raw = {"peft_type": "ADALORA", "target_modules": ["down_proj"], "init_r": 12, "rank_pattern": pattern}
    config = AdapterConfig.parse(raw, AdapterLimits())
    layout = {(0, "mlp.down_proj"): Form(12, (8, 8), has_c=False, has_bias=False, has_e=True)}
    most = most_header_bytes(config, layout, "model.layers")
    assert len(json.dumps(tensors, indent=1)) < most < 2 * len(json.dumps(tensors))
