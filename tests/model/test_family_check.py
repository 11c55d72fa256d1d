"""Families that no other test knows: each is served as `transformers` computes it, or refused before it is loaded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from transformers import AutoConfig, PretrainedConfig
from transformers.models.deepseek_v3 import modeling_deepseek_v3

from lorarep_runtime.errors import FailedPrecondition
from lorarep_runtime.model import family_check
from lorarep_runtime.model.family_comparison import refusal
from lorarep_runtime.model.layer_walk import Walk
from lorarep_runtime.model.model_config import model_class, read_model_config
from lorarep_runtime.model.transformers_attention import register_attention
from tests.support.engines import PROMPT, engine_for, greedy
from tests.support.models import FAMILIES, SHAPE, randomize, reference, reference_logits, save_adapter, save_tokenizer

MAP = [[0, 3], [1, 2], [1, 6], [0, 1]]
STACK = (0, 1, 2, 1, 1, 2, 3, 4, 5, 0)
LATENT = dict(q_lora_rank=32, kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=12)
"""DeepSeek's attention: keys of 24 numbers and values of 12."""
EXPERTS = dict(n_routed_experts=8, num_experts_per_tok=2, n_group=2, topk_group=1, moe_intermediate_size=32)
VISION = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28)
SERVED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "deepseek_v3": (dict(**LATENT, **EXPERTS, first_k_dense_replace=2, num_key_value_heads=4), ["o_proj", "kv_b_proj"]),
    "minicpm3": (dict(**LATENT, num_key_value_heads=4, scale_depth=1.4, dim_model_base=32), ["q_b_proj"]),
    "nemotron": (dict(head_dim=16), ["up_proj"]),
    "gpt_bigcode": (dict(), ["c_attn"]),
    "bert": (dict(is_decoder=True, num_key_value_heads=4), ["query"]),
}
REPLICATED = {"deepseek_v3", "minicpm3", "nemotron"}
"""Families whose layers PEFT itself can replicate."""
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "diffllama": (dict(), "its layers attend more than once"),
    "big_bird": (dict(is_decoder=True), "its layers have an attention of their own"),
    "bert": (dict(), "attends to later tokens"),
    "doge": (dict(), "wants a mask of its own"),
    "bart": (dict(), "it is an encoder with a decoder"),
    "rwkv": (dict(), "its code reads 'weight' of a linear module"),
    "blip": (dict(), "transformers computes no small model of it from tokens alone: TypeError"),
    "megatron-bert": (dict(is_decoder=True), "it expects a tuple of each layer"),
    "git": (dict(), "its attention is one of a list of its own"),
    "hunyuan_v1_moe": (dict(head_dim=16, num_experts=4), "its code reads 'weight' of a linear module"),
    "jetmoe": (dict(num_key_value_heads=4, kv_channels=16), "its layers have keys of "),
    "bloom": (dict(pretraining_tp=2, slow_but_exact=True, num_key_value_heads=4), "its code reads 'weight'"),
    "llama": (dict(is_causal=False), "its logits differ from transformers'"),
    "gemma3_text": (dict(use_bidirectional_attention=True), "attends to later tokens"),
    "mistral": (dict(per_layer_config={1: {"head_dim": 32}}), "per_layer_config"),
    "lfm2": (dict(full_attn_idxs=[1, 3]), "layer_types ['conv'] have no keys and values to page"),
    "t5": (dict(), "it is an encoder with a decoder"),
}


def config_of(family: str, **fields: Any) -> PretrainedConfig:
    text = {**SHAPE, **fields}
    if family == "llava":
        text = dict(
            text_config={"model_type": "mistral", **SHAPE, "head_dim": 16, "sliding_window": 8},
            vision_config={"model_type": "clip_vision_model", **VISION},
            image_token_index=259,
        )
    return AutoConfig.for_model(family, **text)


def save(family: str, folder: Path, **fields: Any) -> Path:
    config = config_of(family, **fields)
    model = model_class(config).from_config(config).float()
    with torch.inference_mode():
        randomize(model, 0)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bases are compared here: a process of its own has to import torch."""
    register_attention()
    monkeypatch.setattr(family_check, "_judged", lambda folder: refusal(read_model_config(folder)))


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("family", SERVED)
def test_a_family_that_passes_is_answered_as_transformers_answers(family: str, tmp_path: Path) -> None:
    fields, targets = SERVED[family]
    base = save(family, tmp_path / "base", **fields)
    adapter = save_adapter(
        base,
        tmp_path / "adapter",
        r=2,
        target_modules=targets,
        layer_replication=MAP if family in REPLICATED else None,
    )
    engine = engine_for(base, stacks={"deep": STACK}, adapters={"adapter": adapter}, cache_dir=tmp_path / "cache")
    own = STACK if family in REPLICATED else engine.stacks["base"]
    for named, stack_name, folder, stack in (((), "deep", None, STACK), ([("adapter", 1.0)], None, adapter, own)):
        (answer,) = engine.generate([(greedy(new_tokens=8), engine.adapters.lease(named, stack_name))])
        text = [*PROMPT, *answer.tokens]
        expected = reference_logits(reference(base, folder, stack), text)
        assert list(answer.tokens) == expected[len(PROMPT) - 1 : -1].argmax(-1).tolist()
        lease = engine.adapters.lease(named, stack_name)
        torch.testing.assert_close(engine.logits(text, lease), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_that_would_answer_otherwise_is_refused_by_name(family: str, tmp_path: Path) -> None:
    fields, why = REFUSED[family]
    register_attention()
    config_of(family, **fields).save_pretrained(tmp_path)
    try:
        found = refusal(read_model_config(tmp_path))
    except FailedPrecondition as error:
        found = error.message
    assert why in found


def test_layers_of_every_kind_are_compared_however_late_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    register_attention()
    config = config_of("deepseek_v3", **LATENT, **EXPERTS, first_k_dense_replace=5, num_key_value_heads=4)

    def forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("the experts are computed")

    monkeypatch.setattr(modeling_deepseek_v3.DeepseekV3MoE, "forward", forward)
    assert refusal(config).endswith("from tokens alone: RuntimeError: the experts are computed")


def test_a_comparison_that_takes_too_long_ends_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(family_check, "PROCESS_SECONDS", 0.5)
    monkeypatch.setenv("LORAREP_FAILPOINTS", str(tmp_path))
    (tmp_path / "compare").write_text("hold")
    with pytest.raises(FailedPrecondition, match=r"type 'granite' cannot be served exactly: .* takes over 0\.5 s"):
        family_check.check_family(tmp_path, config_of("granite"), tmp_path)
    assert (tmp_path / "compare.reached").exists()


def test_a_comparison_that_dies_is_a_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAREP_FAILPOINTS", str(tmp_path))
    (tmp_path / "compare").write_text("error")
    with pytest.raises(FailedPrecondition, match=r"type 'granite' cannot be served exactly: .* with status 1"):
        family_check.check_family(tmp_path, config_of("granite"), tmp_path)


def test_a_good_verdict_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of("granite")
    config.save_pretrained(tmp_path)
    family_check.check_family(tmp_path, config, tmp_path)
    monkeypatch.setattr(family_check, "_judged", None)
    family_check.check_family(tmp_path, config, tmp_path)


OTHERWISE = [config_of("llava"), config_of("llama", is_causal=False), config_of("qwen2", hidden_act="relu")]
OTHERWISE += [
    config_of("gemma3_text", use_bidirectional_attention=True),
    config_of("phi3", a_field="of another version"),
]


@pytest.mark.parametrize("config", OTHERWISE, ids=lambda config: config.model_type)
def test_a_base_like_those_that_other_tests_compare_is_not_compared_and_all_others_are(
    config: PretrainedConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(family_check, "_judged", lambda folder: "compared")
    for usual in FAMILIES.values():
        family_check.check_family(tmp_path, usual(), tmp_path)
    with pytest.raises(FailedPrecondition, match="compared"):
        family_check.check_family(tmp_path, config, tmp_path)


def test_a_verdict_is_of_one_version_of_torch_and_needs_no_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []
    monkeypatch.setattr(family_check, "_judged", lambda folder: asked.append(folder) or "")
    for version in ("2.0", "2.0", "2.1"):
        monkeypatch.setattr(torch, "__version__", version)
        family_check.check_family(tmp_path, config_of("granite"), tmp_path)
    assert len(asked) == 2
    monkeypatch.setattr(os, "stat", refuse := Mock(side_effect=PermissionError("a cache of another user")))
    family_check.check_family(tmp_path, config_of("granite"), tmp_path / "anothers")
    assert len(asked) == 3
    assert refuse.called


def test_a_base_that_cannot_compute_as_it_is_loaded_is_not_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def attend(*_: Any) -> None:
        raise RuntimeError("no kernel for this head")

    monkeypatch.setattr(family_check, "_judged", lambda folder: "")
    base = save("granite", tmp_path / "base")
    monkeypatch.setattr(Walk, "attend", attend)
    why = "type 'granite' cannot be served in torch.float32 on cpu: no kernel for this head"
    with pytest.raises(FailedPrecondition, match=why):
        engine_for(base, cache_dir=tmp_path / "cache")
