"""Adapters of the model's head and embedding, and whole ones, beside others in one batch, against PEFT."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorarep_runtime.engine.engine import Engine
from lorarep_runtime.errors import FailedPrecondition
from tests.support.engines import PROMPT, engine_for, greedy
from tests.support.models import reference, reference_logits, save_adapter, save_base, stack_of

WEIGHTS = "adapter_model.safetensors"
LAYERS = 3
RANGES = [[0, 2], [1, 3]]
KINDS: dict[str, dict[str, Any]] = {
    "head": dict(target_modules=["lm_head"]),
    "head and more": dict(target_modules=["q_proj", "lm_head"], layer_replication=RANGES, rank_pattern={"lm_head": 5}),
    "DoRA": dict(target_modules=["v_proj", "lm_head"], use_dora=True),
    "embedding": dict(target_modules=["q_proj", "embed_tokens"], use_rslora=True),
    "DoRA of both": dict(target_modules=["v_proj", "lm_head", "embed_tokens"], use_dora=True, layer_replication=RANGES),
    "both": dict(target_modules=["lm_head", "embed_tokens", "v_proj"], layer_replication=RANGES),
    "own head": dict(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "own embedding": dict(target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
    "own both": dict(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"], layer_replication=RANGES),
    "all but the head": dict(target_modules="all-linear"),
}
# PEFT warns that merging would change a tied embedding, which nobody does here.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Llama has a head of its own. Gemma 3 has one that is the embedding, which scales what it gives."""
    changes: dict[str, Any] = dict(num_hidden_layers=LAYERS)
    if request.param == "gemma3":
        changes["layer_types"] = ["full_attention", "sliding_attention", "full_attention"]
    return save_base(request.param, tmp_path_factory.mktemp("head") / "base", **changes)


@pytest.fixture(scope="module")
def adapters(base: Path) -> dict[str, Path]:
    return {
        name: save_adapter(base, base.parent / str(i), seed=i, r=4, lora_alpha=8, **config)
        for i, (name, config) in enumerate(KINDS.items())
    }


@pytest.fixture(scope="module")
def engine(base: Path, adapters: dict[str, Path]) -> Engine:
    return engine_for(base, adapters=adapters)


def test_heads_of_many_adapters_compute_what_peft_computes_in_one_batch(
    engine: Engine, base: Path, adapters: dict[str, Path]
) -> None:
    names = [None, *adapters, "head"]
    leases = [engine.adapters.lease([] if name is None else [(name, 1.0)]) for name in names]
    answers = engine.generate((greedy(new_tokens=8), lease) for lease in leases)
    for name, answer in zip(names, answers, strict=True):
        stack = stack_of(KINDS.get(name or "", {}).get("layer_replication"), LAYERS)
        text = [*PROMPT, *answer.tokens]
        expected = reference_logits(reference(base, None if name is None else adapters[name], stack), text)
        assert list(answer.tokens) == expected[len(PROMPT) - 1 : -1].argmax(-1).tolist(), name
        lease = engine.adapters.lease([] if name is None else [(name, 1.0)])
        torch.testing.assert_close(engine.logits(text, lease), expected, atol=2e-5, rtol=0)
        lease.release()


def test_a_head_is_mixed_and_counted(engine: Engine, base: Path, adapters: dict[str, Path]) -> None:
    mix = [("head", 1.0), ("DoRA", 0.5)]
    (answer,) = engine.generate([(greedy(new_tokens=4), engine.adapters.lease(mix))])
    lease = engine.adapters.lease(mix)
    logits = engine.logits([*PROMPT, *answer.tokens], lease)
    lease.release()
    assert list(answer.tokens) == logits[len(PROMPT) - 1 : -1].argmax(-1).tolist()
    vocab, hidden = load_file(adapters["head"] / WEIGHTS)["base_model.model.lm_head.base_layer.weight"].shape
    assert engine.ledger().adapters["head"] >= 4 * 4 * (vocab + hidden)
    assert engine.adapters.get("head").parameters == 4 * (vocab + hidden)
    assert engine.adapters.get("own both").rank == 4
    with pytest.raises(FailedPrecondition, match=r"^adapters: one has a head or an embedding of its own"):
        engine.generate([(greedy(), engine.adapters.lease([("own both", 1.0), ("both", 1.0)]))])


def test_a_head_that_is_not_the_bases_takes_its_place_but_for_doras_norms(
    engine: Engine, base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    name = "base_model.model.lm_head.base_layer.weight"
    for kind in ("head", "DoRA"):
        folder = shutil.copytree(adapters[kind], tmp_path / kind)
        tensors = load_file(folder / WEIGHTS)
        tensors[name][-1, -1] += 1
        save_file(tensors, folder / WEIGHTS)
    with pytest.raises(FailedPrecondition, match=rf"^{name}: is another than the base's, over which DoRA's norms are"):
        engine.adapters.load("other", str(tmp_path / "DoRA"), trusted=True)
    other = engine.adapters.load("other", str(tmp_path / "head"), trusted=True)
    assert other.bytes > engine.adapters.get("head").bytes + tensors[name].nbytes - 1
    lease = engine.adapters.lease([("other", 1.0)])
    expected = reference_logits(reference(base, tmp_path / "head", stack_of(None, LAYERS)), PROMPT)
    torch.testing.assert_close(engine.logits(PROMPT, lease), expected, atol=2e-5, rtol=0)
    lease.release()
    engine.adapters.unload("other")
    del tensors[name]
    save_file(tensors, tmp_path / "DoRA" / WEIGHTS)
    assert engine.adapters.load("other", str(tmp_path / "DoRA"), trusted=True).rank == 4
    engine.adapters.unload("other")
