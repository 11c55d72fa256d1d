"""What cannot be served is refused before its weights, or anything but its config, are downloaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from lorarep_server.cli import main

from lorarep_runtime.adapters.ends import MAX_FOREIGN_TOKENS
from lorarep_runtime.config import AdapterLimits
from lorarep_runtime.engine.engine import Engine
from lorarep_runtime.errors import FailedPrecondition, InvalidArgument
from lorarep_runtime.model.form import Ends
from tests.support.engines import engine_for
from tests.support.hub_faults import FaultyHub
from tests.support.models import VOCAB, save_adapter, save_base

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base("llama", tmp_path_factory.mktemp("look") / "base", num_hidden_layers=3)


@pytest.fixture(scope="module")
def adapter(base: Path) -> Path:
    return save_adapter(base, base.parent / "adapter", r=2, target_modules=["q_proj"])


@pytest.fixture(scope="module")
def others(base: Path) -> Path:
    """An adapter of a base with as many layers, and twice their width."""
    other = save_base("llama", base.parent / "twice-as-wide", num_hidden_layers=3, hidden_size=128)
    return save_adapter(other, base.parent / "other", r=2, target_modules=["q_proj"])


@pytest.fixture(scope="module")
def engine(base: Path) -> Engine:
    limits = AdapterLimits(allow_repositories=("org/*",))
    return engine_for(base, limits=limits, cache_dir=base.parent / "cache", kv_bytes=1 << 20)


@pytest.fixture(autouse=True)
def empty_cache(base: Path) -> None:
    shutil.rmtree(base.parent / "cache", ignore_errors=True)


def publish(hub: FaultyHub, folder: Path, adapter: Path, weights: str = WEIGHTS, **changes: Any) -> Path:
    """Publishes an adapter as org/name, with a tokenizer, another name of its weights, and changes of its config."""
    folder.mkdir()
    config = json.loads((adapter / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}, sort_keys=True))
    (folder / weights).write_bytes((adapter / WEIGHTS).read_bytes())
    (folder / "tokenizer_config.json").write_text("{}")
    hub.publish("org/name", folder)
    return folder


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "another method, pickled": (
        {"weights": "adapter_model.bin", "peft_type": "IA3", "ia3": 1},
        FailedPrecondition,
        "peft_type: ",
    ),
    "another task": ({"task_type": "SEQ_CLS", "modules_to_save": ["score"]}, FailedPrecondition, "task_type: "),
    "a base that is changed first": ({"init_lora_weights": "pissa"}, FailedPrecondition, "init_lora_weights: "),
    "a rank beyond the limit": ({"r": 10**6}, InvalidArgument, "r: "),
    "modules that the base has not": ({"target_modules": ["query_key_value"]}, FailedPrecondition, "target_modules: "),
    "layers that the base has not": ({"layer_replication": [[0, 9]]}, InvalidArgument, "layer_replication[0]: "),
    "pickled weights": (
        {"weights": "adapter_model.bin"},
        FailedPrecondition,
        "org/name: adapter_model.bin is a pickle",
    ),
    "tensors that the config does not have": ({"target_modules": ["v_proj"]}, FailedPrecondition, "base_model.model."),
}


@pytest.mark.parametrize("trusted", [True, False], ids=["operator", "caller"])
@pytest.mark.parametrize(("how", "error", "named"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_served_is_refused_with_nothing_but_its_config_downloaded(
    engine: Engine, hub: FaultyHub, adapter: Path, tmp_path: Path, trusted: bool, how: Any, error: Any, named: str
) -> None:
    publish(hub, tmp_path / "published", adapter, **how)
    with pytest.raises(error) as refusal:
        engine.adapters.load("name", "org/name", trusted=trusted)
    assert str(refusal.value).startswith(named)
    assert hub.downloads() == ["adapter_config.json"]


@pytest.mark.parametrize("trusted", [True, False], ids=["operator", "caller"])
def test_a_base_of_another_shape_is_told_before_the_download(
    engine: Engine, hub: FaultyHub, base: Path, others: Path, tmp_path: Path, trusted: bool
) -> None:
    publish(hub, tmp_path / "published", others, base_model_name_or_path="org/twice-as-wide")
    with pytest.raises(FailedPrecondition) as refusal:
        engine.adapters.load("name", "org/name", trusted=trusted)
    assert "lora_A.weight: has the shape (2, 128), the config says (2, 64); " in str(refusal.value)
    assert f"it was trained on 'org/twice-as-wide', and the base here is {base}" in str(refusal.value)
    flags = ["plan", f"--base={base}", "--adapter=name=org/name", f"--cache-dir={base.parent / 'cache'}"]
    planned = CliRunner().invoke(main, flags)
    assert planned.exit_code == 1
    assert "it was trained on 'org/twice-as-wide'" in planned.output
    assert hub.downloads() == ["adapter_config.json"]


def test_a_folder_is_refused_for_its_method_before_its_pickles(
    engine: Engine, hub: FaultyHub, adapter: Path, tmp_path: Path
) -> None:
    folder = publish(hub, tmp_path / "published", adapter, "adapter_model.bin", peft_type="IA3")
    with pytest.raises(FailedPrecondition, match=r"^peft_type: "):
        engine.adapters.load("name", str(folder), trusted=True)


@pytest.mark.parametrize("trusted", [True, False], ids=["operator", "caller"])
def test_a_header_that_does_not_come_first_is_read_after_the_download(
    engine: Engine, hub: FaultyHub, adapter: Path, tmp_path: Path, trusted: bool
) -> None:
    folder = publish(hub, tmp_path / "published", adapter)
    (folder / "tokenizer_config.json").unlink()
    hub.publish("org/name", folder)
    hub.fails_looks = True
    assert engine.adapters.load("name", "org/name", trusted=trusted).rank == 2
    engine.adapters.unload("name")
    assert any(asked.is_look for asked in hub.asked)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("trusted", [True, False], ids=["operator", "caller"])
@pytest.mark.parametrize(
    ("tokens", "kind"),
    [
        (VOCAB + MAX_FOREIGN_TOKENS, {}),
        (VOCAB + 8, {"modules_to_save": ["embed_tokens", "lm_head"]}),
        (VOCAB + MAX_FOREIGN_TOKENS + 1, {}),
    ],
    ids=["as many as may be", "saved thrice", "too many"],
)
def test_a_callers_adapter_may_have_so_many_new_tokens_and_no_more_come(
    engine: Engine, hub: FaultyHub, base: Path, tmp_path: Path, trusted: bool, tokens: int, kind: dict[str, Any]
) -> None:
    adapter = save_adapter(base, tmp_path / "adapter", r=2, target_modules=["q_proj"], tokens=tokens, **kind)
    hub.publish("org/name", adapter)
    if trusted or tokens <= VOCAB + MAX_FOREIGN_TOKENS:
        engine.adapters.load("name", "org/name", trusted=trusted)
        lease = engine.adapters.lease([("name", 1.0)])
        assert lease.vocab_size == tokens
        lease.release()
        engine.adapters.unload("name")
        return
    with pytest.raises(
        FailedPrecondition, match=rf"lm_head\.weight: has {tokens} tokens, which may be up to 2048 more"
    ):
        engine.adapters.load("name", "org/name")
    assert hub.downloads() == ["adapter_config.json"]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ({"tokens": VOCAB + 8}, "base_model.model.lm_head.weight: is of a module outside model.layers, whose linear"),
        ({"trainable_token_indices": [5]}, "trainable_token_indices: 'the embedding' is neither head nor embedding"),
        ({"modules_to_save": ["embed_tokens"]}, "modules_to_save: 'embed_tokens' is neither head nor embedding"),
        ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens: aLoRA is served on a CPU alone"),
    ],
)
def test_what_a_cpu_alone_serves_is_refused_by_name_elsewhere(
    engine: Engine, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: dict[str, Any], named: str
) -> None:
    adapter = save_adapter(base, tmp_path / "adapter", r=2, target_modules=["q_proj"], **kind)
    monkeypatch.setattr(engine.base, "ends", Ends())
    monkeypatch.setattr(engine.base, "is_general", False)
    with pytest.raises(FailedPrecondition) as refusal:
        engine.adapters.load("name", str(adapter), trusted=True)
    assert str(refusal.value).startswith(named)
