"""Bases of many families: base, LoRA, DoRA, their mix, a bare stack and one with an adapter, all in one batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, PretrainedConfig

from lorarep_runtime.model import base as base_module
from lorarep_runtime.model.model_config import model_class
from lorarep_runtime.model.physical_stack import stacked
from tests.support.engines import engine_for, greedy
from tests.support.models import SHAPE, load_base, randomize, reference_logits, save_tokenizer

LAYERS = 2
RANGES = [[0, 2], [0, 1]]
STACK = (0, 1, 0)
PROMPT = (5, 250, 17, 90, 3, 201)
SMALL = {**SHAPE, "num_hidden_layers": LAYERS, "hidden_size": 32, "intermediate_size": 48}
VISION = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28)
QWEN_VISION = dict(depth=1, hidden_size=32, intermediate_size=32, num_heads=2, out_hidden_size=32)
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
FULL = dict(num_key_value_heads=4)
LATENT = dict(
    **dict(
        q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6, first_k_dense_replace=1
    ),
    **dict(n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1, moe_intermediate_size=16, **FULL),
)
"""DeepSeek's attention and experts, behind a layer without any."""
HEADS_16 = dict(num_attention_heads=16, num_key_value_heads=16, hidden_size=64)
CLIPPED = dict(clip_qkv=0.5, alibi_bias_max=4)
FALCON = "query_key_value|dense|dense_h_to_4h|dense_4h_to_h"
LLAMA = r"(q|k|v|o|gate|up|down)_proj"
FAMILIES: dict[str, tuple[dict[str, Any], str]] = {
    "bloom": (FULL, "query_key_value|dense|dense_h_to_4h|dense_4h_to_h"),
    "bloom, 6 heads": (dict(num_attention_heads=6, num_key_value_heads=6, hidden_size=48), "query_key_value|dense"),
    "cohere": (dict(), LLAMA),
    "cohere2": (dict(head_dim=8, sliding_window=8), LLAMA),
    "codegen": (dict(n_embd=32, n_layer=LAYERS, n_head=4, rotary_dim=4, **FULL), "qkv_proj|out_proj|fc_in|fc_out"),
    "falcon": (dict(ffn_hidden_size=48), FALCON),
    "falcon, alibi": (dict(alibi=True, bias=True, multi_query=False, parallel_attn=False, **HEADS_16), FALCON),
    "falcon, grouped": (dict(new_decoder_architecture=True, num_kv_heads=2), FALCON),
    "deepseek_v3": (LATENT, "o_proj|kv_b_proj|q_a_proj"),
    "gemma": (dict(head_dim=16), LLAMA),
    "glm": (dict(head_dim=8), "(q|k|v|o|down)_proj|gate_up_proj"),
    "gpt2": (dict(n_embd=32, n_layer=LAYERS, n_head=4, **FULL), "c_attn|c_proj|c_fc"),
    "gpt_neo": (
        dict(window_size=8, attention_types=[[["global", "local"], 1]], **FULL),
        "(q|k|v|out)_proj|c_fc|c_proj",
    ),
    "gpt_neox": (FULL, "query_key_value|dense|dense_h_to_4h|dense_4h_to_h"),
    "gpt_oss": (dict(head_dim=16, num_local_experts=4, sliding_window=8), "(q|k|v|o)_proj"),
    "gptj": (dict(n_embd=32, n_layer=LAYERS, n_head=4, rotary_dim=4, **FULL), "(q|k|v|out)_proj|fc_in|fc_out"),
    "granite": (dict(), LLAMA),
    "minimax_m2": (dict(head_dim=8, num_local_experts=4, num_experts_per_tok=2), "(q|k|v|o)_proj"),
    "mixtral": (dict(num_local_experts=4), "(q|k|v|o)_proj"),
    "mpt": (dict(max_seq_len=64, **FULL), "Wqkv|(out|up|down)_proj"),
    "mpt, clipped": (
        dict(hidden_size=48, num_attention_heads=6, num_key_value_heads=6, max_seq_len=64, attn_config=CLIPPED),
        "Wqkv|out_proj",
    ),
    "modernbert-decoder": (dict(local_attention=8, **FULL), "(q|k|v)_proj|Wo|Wi"),
    "olmo2": (dict(), LLAMA),
    "opt": (dict(ffn_dim=48, word_embed_proj_dim=32, **FULL), "(q|k|v|out)_proj|fc1|fc2"),
    "phi": (FULL, "(q|k|v)_proj|dense|fc1|fc2"),
    "qwen3_moe": (dict(head_dim=8, **EXPERTS), "(q|k|v|o)_proj"),
    "smollm3": (dict(), LLAMA),
    "stablelm": (dict(), LLAMA),
    "starcoder2": (dict(), "(q|k|v|o)_proj|c_fc|c_proj"),
    "xglm": (dict(ffn_dim=48, **FULL), "(q|k|v|out)_proj|fc1|fc2"),
    "gemma3": (dict(head_dim=8), LLAMA),
    "idefics3": (dict(), LLAMA),
    "llava": (dict(head_dim=8), LLAMA),
    "mistral3": (dict(head_dim=8), LLAMA),
    "qwen2_vl": (dict(rope_parameters=ROPE), LLAMA),
    "qwen2_5_vl": (dict(rope_parameters=ROPE), LLAMA),
    "qwen3_vl": (dict(head_dim=8, rope_parameters=ROPE), LLAMA),
}
TEXTS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3": ("gemma3_text", dict(vision_config={"model_type": "siglip_vision_model", **VISION, "patch_size": 14})),
    "idefics3": ("llama", dict(vision_config={**VISION, "patch_size": 14}, scale_factor=2)),
    "llava": ("mistral", dict(vision_config={"model_type": "clip_vision_model", **VISION}, image_token_index=259)),
    "mistral3": ("mistral", dict(vision_config={"model_type": "pixtral", **VISION, "patch_size": 14, "head_dim": 16})),
    "qwen2_vl": ("qwen2_vl_text", dict(vision_config={"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2})),
    "qwen2_5_vl": ("qwen2_5_vl_text", dict(vision_config=QWEN_VISION)),
    "qwen3_vl": ("qwen3_vl_text", dict(vision_config={**QWEN_VISION, "deepstack_visual_indexes": [0]})),
}
"""Models of texts and images: the type of their decoder, and the fields of the rest."""
OLD = "language_model.model.layers"
OLD_PREFIXES = {"gemma3": OLD, "llava": OLD, "mistral3": OLD, "qwen2_vl": "model.layers", "qwen2_5_vl": "model.layers"}
"""Where the decoder's layers were before transformers 4.52."""


def config_of(family: str) -> PretrainedConfig:
    fields, _ = FAMILIES[family]
    if family not in TEXTS:
        return AutoConfig.for_model(family.partition(",")[0], **{**SMALL, **fields})
    text, others = TEXTS[family]
    return AutoConfig.for_model(family, text_config={"model_type": text, **SMALL, **fields}, **others)


def save_base(family: str, folder: Path) -> Path:
    config = config_of(family)
    model: Any = model_class(config).from_config(config).float()
    with torch.inference_mode():
        randomize(model, 0)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def adapted(model: Any, family: str, **adapters: dict[str, Any]) -> Any:
    """The model under PEFT, with random adapters over all linear modules of its decoder's layers."""
    expression = rf"(?!.*(vision|visual)).*\.\d+\..*\.?({FAMILIES[family][1]})"
    for name, fields in adapters.items():
        config = LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=3, target_modules=expression, **fields)
        if hasattr(model, "peft_config"):
            model.add_adapter(name, config)
        else:
            model = get_peft_model(model, config, adapter_name=name)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "lora_magnitude" in name:
            parameter.data *= 1 + 0.3 * noise
        elif "lora_" in name:
            parameter.data = 0.3 * noise
    return model.eval()


def write_old_names(file: Path, prefix: str) -> None:
    usual = "base_model.model.model.language_model.layers."
    tensors = load_file(file)
    assert all(name.startswith(usual) for name in tensors)
    save_file({name.replace(usual, f"base_model.model.{prefix}."): tensor for name, tensor in tensors.items()}, file)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_computes_what_peft_computes_in_one_batch(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base_module, "check_family", lambda *_: None)  # which compares no adapters
    base = save_base(family, tmp_path / "base")
    # In transformers 5.24 Falcon's eager attention adds the biases of ALiBi twice.
    plainly = dict(attn_implementation="sdpa") if family.startswith("falcon") else {}
    conv1d = dict(fan_in_fan_out=family == "gpt2")
    plain = adapted(load_base(base, **plainly), family, lora=conv1d, dora=dict(use_dora=True, **conv1d))
    deep = adapted(stacked(load_base(base, **plainly), STACK), family, deep=dict(use_dora=True, **conv1d))
    plain.save_pretrained(tmp_path / "adapters")
    deep.save_pretrained(tmp_path / "adapters")
    if family in OLD_PREFIXES:
        write_old_names(tmp_path / "adapters" / "lora" / "adapter_model.safetensors", OLD_PREFIXES[family])
    file = tmp_path / "adapters" / "deep" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "layer_replication": RANGES}))
    folders = {name: tmp_path / "adapters" / name for name in ("lora", "dora", "deep")}
    engine = engine_for(base, stacks={"bare": STACK}, adapters=folders, kv_bytes=1 << 20)
    asked: list[tuple[Any, list[str], str | None]] = [
        (plain, [], None),
        (plain, ["lora"], None),
        (plain, ["dora"], None),
        (plain, ["lora", "dora"], None),
        (deep, [], "bare"),
        (deep, ["deep"], None),
    ]
    named = [([(name, 1.0) for name in names], stack) for _, names, stack in asked]
    answers = engine.generate((greedy(PROMPT, 4), engine.adapters.lease(*one)) for one in named)
    found = []
    for (model, names, _), one, answer in zip(asked, named, answers, strict=True):
        text = [*PROMPT, *answer.tokens]
        model.base_model.set_adapter(names or "lora" if model is plain else "deep")
        if names:
            expected = reference_logits(model, text)
        else:
            with model.disable_adapter():
                expected = reference_logits(model, text)
        assert list(answer.tokens) == expected[len(PROMPT) - 1 : -1].argmax(-1).tolist(), names
        lease = engine.adapters.lease(*one)
        torch.testing.assert_close(engine.logits(text, lease), expected, atol=3e-5, rtol=0)
        lease.release()
        found.append(expected[len(PROMPT) - 1])
    assert all((a - b).abs().max() > 1e-2 for i, a in enumerate(found) for b in found[:i])  # none is another's
