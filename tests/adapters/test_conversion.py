"""Pickled weights become safetensors, and run nothing on the way."""

from __future__ import annotations

import json
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from lorarep_server.cli import main
from safetensors.torch import load_file

from lorarep_runtime.adapters import conversion
from lorarep_runtime.adapters.conversion import convert
from lorarep_runtime.adapters.pickled_weights import refusal
from lorarep_runtime.errors import FailedPrecondition, InvalidArgument
from lorarep_runtime.hub.snapshot import fetch
from tests.support.hub_faults import FaultyHub
from tests.support.models import save_adapter, save_base

PICKLED = "adapter_model.bin"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = save_base("llama", tmp_path_factory.mktemp("conversion") / "base", num_hidden_layers=2)
    return save_adapter(base, base.parent / "adapter", r=2, target_modules=["q_proj"])


@pytest.fixture
def pickled(adapter: Path, tmp_path: Path) -> Path:
    """The adapter as PEFT wrote it before 0.5, with a tokenizer."""
    folder = tmp_path / "pickled"
    shutil.copytree(adapter, folder)
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / PICKLED)
    (folder / "adapter_model.safetensors").unlink()
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "optimizer.pt").write_bytes(b"pickle")
    return folder


def test_a_folder_of_a_repository_is_converted_and_then_served(
    hub: FaultyHub, adapter: Path, pickled: Path, tmp_path: Path
) -> None:
    (tmp_path / "repository").mkdir()
    pickled.rename(tmp_path / "repository" / "checkpoint-430")
    commit = hub.publish("org/old", tmp_path / "repository")
    cache, out = tmp_path / "cache", tmp_path / "new" / "converted"
    source = "org/old/checkpoint-430"
    with pytest.raises(FailedPrecondition, match=f"`lorarep convert {source} OUT`"):
        fetch(source, None, kind="adapter", cache_dir=cache)
    assert PICKLED not in hub.downloads()
    ended = CliRunner().invoke(main, ["convert", f"{source}@main", str(out), f"--cache-dir={cache}"])
    assert ended.output.splitlines()[-1] == f"{source} at {commit} is in {out}"
    converted = fetch(str(out), None, kind="adapter", cache_dir=None).folder
    names = ("adapter_config.json", "adapter_model.safetensors", "tokenizer_config.json")
    assert sorted(file.name for file in converted.iterdir()) == sorted(names)
    assert (converted / names[0]).read_bytes() == (adapter / names[0]).read_bytes()
    expected = load_file(adapter / names[1])
    found = load_file(converted / names[1])
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert "optimizer.pt" not in hub.downloads()


class Marks:
    """What calls a function once it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Path]]:
        return Path.touch, (self.file,)


def expanded() -> torch.Tensor:
    """A terabyte, of four bytes."""
    return torch.zeros(1).expand(1 << 38)


CONTENTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "code": (lambda file: {"a": Marks(file)}, "without running code"),
    "code by itself": (Marks, "without running code"),
    "a list": (lambda _: [torch.zeros(1)], "holds list"),
    "nothing": (lambda _: {}, "holds dict"),
    "a number": (lambda _: {"a": torch.zeros(1), "step": 3}, "holds int by the name 'step'"),
    "a number for a name": (lambda _: {3: torch.zeros(1)}, "holds Tensor by the name '3'"),
    "a sparse tensor": (lambda _: {"a": torch.eye(3).to_sparse()}, "has 'a' as torch.sparse_coo"),
    "whole numbers": (lambda _: {"a": torch.zeros(1, dtype=torch.int64)}, "has 'a' as torch.strided of torch.int64"),
}


@pytest.mark.parametrize(("content", "message"), CONTENTS.values(), ids=CONTENTS)
def test_what_is_no_dict_of_tensors_is_refused_and_runs_nothing(
    tmp_path: Path, content: Callable[[Path], object], message: str
) -> None:
    file, marked, out = tmp_path / PICKLED, tmp_path / "marked", tmp_path / "out"
    torch.save(content(marked), file)
    assert message in refusal(file, out)
    assert not marked.exists()
    assert not out.exists()


@pytest.mark.parametrize("old", [True, False], ids=["before torch 1.6", "bare pickle"])
def test_other_formats_run_nothing_either(tmp_path: Path, old: bool) -> None:
    file, marked = tmp_path / PICKLED, tmp_path / "marked"
    if old:
        torch.save({"a": Marks(marked)}, file, _use_new_zipfile_serialization=False)
        assert not zipfile.is_zipfile(file)
    else:
        file.write_bytes(pickle.dumps(Marks(marked)))
    assert refusal(file, tmp_path / "out")
    assert not marked.exists()


def test_views_of_one_memory_are_written_each_by_itself(tmp_path: Path) -> None:
    whole = torch.arange(6.0).view(2, 3)
    torch.save({"a": whole, "b": whole.T, "c": torch.nn.Parameter(whole[0])}, tmp_path / PICKLED)
    assert refusal(tmp_path / PICKLED, tmp_path / "out") == ""
    found = load_file(tmp_path / "out")
    assert torch.equal(found["b"], whole.T)
    assert torch.equal(found["c"], whole[0])


def test_what_is_no_file_is_left_out_and_weights_have_the_modes_of_others(pickled: Path, tmp_path: Path) -> None:
    (pickled / "old.model").mkdir()
    convert(str(pickled), None, tmp_path / "out", None)
    assert not (tmp_path / "out" / "old.model").exists()
    modes = {path.name: path.stat().st_mode for path in (tmp_path / "out").iterdir()}
    assert len(set(modes.values())) == 1, modes


def test_weights_that_take_too_much_are_refused_and_leave_nothing(pickled: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    torch.save({"a": expanded()}, pickled / PICKLED)
    with pytest.raises(FailedPrecondition, match=rf"^{PICKLED}: .*does not fit"):
        convert(str(pickled), None, out, None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pickled"]


def test_what_would_be_refused_or_overwritten_is_told_before_anything_is_read(
    adapter: Path, pickled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversion, "start_process", None)
    with pytest.raises(InvalidArgument, match=r"^out: .*not an empty folder"):
        convert(str(pickled), None, adapter, None)
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    monkeypatch.chdir(tmp_path / "empty")
    for out in (".", "..", tmp_path / "link", tmp_path / "empty" / ".."):
        with pytest.raises(InvalidArgument, match=r"^out: .* a new folder"):
            convert(str(pickled), None, Path(out), None)
    with pytest.raises(FailedPrecondition, match="need no conversion"):
        convert(str(adapter), None, tmp_path / "out", None)
    config = json.loads((pickled / "adapter_config.json").read_text())
    (pickled / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "IA3"}))
    with pytest.raises(FailedPrecondition, match=r"^peft_type: "):
        convert(str(pickled), None, tmp_path / "out", None)
