"""Mixes with any weights against PEFT's several active adapters, whose changes are multiplied by the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from peft.tuners.lora import Embedding, Linear

from tests.support.engines import PROMPT, engine_for
from tests.support.models import load_base, reference_logits, save_adapter, save_base, stack_of, without_replication
from tests.support.models import stacked as physically_stacked

MAP = [[0, 4], [2, 5]]
PATTERNS = dict(rank_pattern={"down_proj": 7, r"layers\.[16]\.self_attn\.q_proj": 2}, alpha_pattern={"q_proj": 11})
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "bias": {"lora_bias": True},
    "patterns": PATTERNS,
    "dora of patterns": {**PATTERNS, "use_dora": True, "use_rslora": True},
    "ends": {"target_modules": ["embed_tokens", "q_proj", "lm_head"]},
    "dora head": {"target_modules": ["lm_head"], "use_dora": True},
    "dora embedding": {"target_modules": ["embed_tokens"], "use_dora": True},
}

# PEFT warns that it saves the base's embedding beside an adapter of it.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def weigh(model: PeftModel, adapter: str, weight: float) -> None:
    """Multiplies an adapter's change of each output: DoRA's layer computes all of it, else it begins at B's output."""
    for module in model.modules():
        if isinstance(module, Linear) and adapter in module.lora_B:
            dora = adapter in module.lora_magnitude_vector
            change = module.lora_magnitude_vector[adapter] if dora else module.lora_B[adapter]
            change.register_forward_hook(lambda _module, _inputs, output: weight * output)
        elif isinstance(module, Embedding) and adapter in module.lora_magnitude_vector:
            module.lora_magnitude_vector[adapter].register_forward_hook(
                lambda _module, _inputs, output: (1 + weight * (output[0] - 1), weight * output[1])
            )
        elif isinstance(module, Embedding) and adapter in module.lora_embedding_B:
            module.lora_embedding_B[adapter].data *= weight


@pytest.mark.parametrize(
    "parts",
    [
        [("bias", 0.5), ("dora", 0.7)],
        [("dora", 0.7), ("dora", 1.6)],
        [("lora", -0.8), ("dora", 0.3), ("bias", 1.7), ("dora", 0.6)],
        [("dora", 0.4)],
        [("patterns", 1.0), ("dora of patterns", -0.6), ("lora", 0.5)],
        [("ends", 0.5), ("lora", 0.9), ("dora head", 1.4), ("dora embedding", 0.6), ("ends", -0.7)],
    ],
    ids=str,
)
def test_a_mix_is_pefts_with_each_change_weighed(parts: list[tuple[str, float]], tmp_path: Path) -> None:
    base = save_base("llama", tmp_path / "base")
    folders = {}
    for i, (kind, _) in enumerate(parts):
        asked = dict(r=3 + i, lora_alpha=6, target_modules=["q_proj", "down_proj"], layer_replication=MAP)
        folders[str(i)] = save_adapter(base, tmp_path / str(i), seed=i, **{**asked, **KINDS[kind]})
    engine = engine_for(base, adapters=folders, kv_bytes=1 << 20)
    lease = engine.adapters.lease([(str(i), weight) for i, (_, weight) in enumerate(parts)])
    stacked = physically_stacked(load_base(base), stack_of(MAP))
    model = PeftModel.from_pretrained(stacked, without_replication(folders["0"]), adapter_name="0")
    for name in list(folders)[1:]:
        model.load_adapter(without_replication(folders[name]), adapter_name=name)
    model.base_model.set_adapter(list(folders))
    for i, (_, weight) in enumerate(parts):
        weigh(model, str(i), weight)
    expected = reference_logits(model.eval(), PROMPT)
    assert (engine.logits(PROMPT, lease) - expected).abs().max() < 1e-5
    lease.release()
