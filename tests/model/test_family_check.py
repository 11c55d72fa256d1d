"""Families that no other test knows: each is served as `transformers` computes it, or refused before it is loaded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.cpu.families import verdicts_of_all
from lorarep_runtime.errors import FailedPrecondition
from lorarep_runtime.model import family_check
from tests.support.engines import PROMPT, engine_for, greedy
from tests.support.models import SHAPE, randomize, reference, reference_logits, save_tokenizer

STACK = (0, 1, 2, 1, 2, 3, 4, 5, 0)
SERVED: dict[str, dict[str, Any]] = {
    "mixtral": dict(num_local_experts=4, sliding_window=8),
    "granite": dict(),
    "gpt_neox": dict(num_key_value_heads=4),
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "diffllama": (dict(), "its logits differ from transformers' by"),
    "stablelm": (dict(), "missing 1 required keyword-only argument: 'walk'"),
    "gpt2": (dict(n_head=4, n_embd=64), "HandOff.forward"),
    "bert": (dict(is_decoder=True), "no list of"),
    "gpt_oss": (dict(head_dim=16, num_local_experts=4), "wants s_aux"),
}


def save(family: str, folder: Path, **fields: Any) -> Path:
    known = {name: value for name, value in SHAPE.items() if family != "gpt2" or name == "vocab_size"}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**known, **fields})).float()
    with torch.inference_mode():
        randomize(model, 0)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.mark.parametrize("family", SERVED)
def test_a_family_that_passes_is_answered_as_transformers_answers(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, cache = save(family, tmp_path / "base", **SERVED[family]), tmp_path / "cache"
    engine = engine_for(base, stacks={"deep": STACK}, cache_dir=cache)
    for name, stack in engine.stacks.items():
        (answer,) = engine.generate([(greedy(new_tokens=8), engine.adapters.lease([], name))])
        text = [*PROMPT, *answer.tokens]
        expected = reference_logits(reference(base, None, stack), text)
        assert list(answer.tokens) == expected[len(PROMPT) - 1 : -1].argmax(-1).tolist(), name
        lease = engine.adapters.lease([], name)
        torch.testing.assert_close(engine.logits(text, lease), expected, atol=1e-4, rtol=0)
    # The verdict is kept: another start compares nothing.
    monkeypatch.setattr(family_check, "_compare", None)
    engine_for(base, cache_dir=cache)


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_that_would_answer_otherwise_is_refused_by_name(family: str, tmp_path: Path) -> None:
    fields, why = REFUSED[family]
    base = save(family, tmp_path / "base", **fields)
    with pytest.raises(
        FailedPrecondition, match=f"^base: a base of type '{family}' cannot be served exactly: "
    ) as error:
        engine_for(base, cache_dir=tmp_path / "cache")
    assert why in str(error.value)


def test_families_that_other_tests_compare_are_not_compared_at_each_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(family_check, "_compare", None)
    engine_for(save("llama", tmp_path / "base"), cache_dir=tmp_path / "cache")


@pytest.mark.skipif("LORAREP_FAMILIES" not in os.environ, reason="takes minutes: LORAREP_FAMILIES=1")
def test_every_family_passes_or_is_refused_by_name() -> None:
    verdicts = {verdict.family: verdict.refusal for verdict in verdicts_of_all()}
    assert len(verdicts) > 100
    assert {family for family in SERVED if verdicts[family]} == set()
    assert {family for family in ("diffllama", "stablelm", "gpt2", "gpt_oss") if not verdicts[family]} == set()
    named = {family: "cannot be served exactly" in why for family, why in verdicts.items() if why}
    assert all(named.values()), named
