"""Several ranks answer as one process does, in fp32 on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lorarep_runtime.adapters.lease import Lease
from lorarep_runtime.engine.engine import Engine
from tests.support.engines import PROMPT, assert_nothing_held, engine_for, greedy
from tests.support.models import save_adapter, save_base
from tests.support.ranks import ranks_in_threads

MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": dict(r=4, lora_alpha=8),
    "dora": dict(r=4, lora_alpha=8, use_dora=True, layer_replication=[[0, 4], [2, 5]]),
    "other dora": dict(r=3, lora_alpha=8, use_dora=True, layer_replication=[[0, 4], [2, 5]]),
    "biases": dict(r=2, lora_bias=True, rank_pattern={r"layers\.1\..*o_proj": 5}, alpha_pattern={"o_proj": 3}),
}
REQUESTS: dict[str, tuple[list[tuple[str, float]], str | None]] = {
    "base": ([], None),
    "stack": ([], "deep"),
    **{name: ([(name, 1.0)], None) for name in ADAPTERS},
    "mix of doras": ([("dora", 0.5), ("other dora", 0.7)], None),
    "mix with biases": ([("lora", 0.5), ("biases", 0.7)], None),
}
STACKS = {"deep": (0, 1, 2, 1, 2, 3, 4, 5)}
SHAPE = dict(head_dim=64, intermediate_size=256, vocab_size=275)
"""Whole blocks of NF4 for each of four ranks, and tokens that neither two nor four divide."""
TIED = {"gemma2"}
"""Families whose head and embedding are one weight."""


@pytest.mark.parametrize(
    ("family", "ranks", "quantization"),
    [("llama", 4, "nf4"), ("mistral", 2, "nf4 twice"), ("qwen2", 2, "none"), ("gemma2", 2, "int8")],
)
def test_several_ranks_answer_as_one_process_does(
    family: str, ranks: int, quantization: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of every kind of adapter and of several stacks share the passes."""
    base = save_base(family, tmp_path / "base", **SHAPE)
    folders = {
        name: save_adapter(base, tmp_path / name, seed=i, target_modules=MODULES, **config)
        for i, (name, config) in enumerate(ADAPTERS.items())
    }
    given: dict[str, Any] = dict(stacks=STACKS, adapters=folders, kv_bytes=4 << 20)
    with ranks_in_threads(monkeypatch):
        engines = [engine_for(base, quantization, ranks=count, **given) for count in (1, ranks)]

    def lease(engine: Engine, name: str) -> Lease:
        return engine.adapters.lease(*REQUESTS[name])

    answers = []
    for engine in engines:
        found = engine.generate((greedy(new_tokens=12), lease(engine, name)) for name in REQUESTS)
        answers.append({name: one.tokens for name, one in zip(REQUESTS, found, strict=True)})
        assert_nothing_held(engine)
    assert answers[0] == answers[1]
    ledgers = [engines[0].ledger().categories, *engines[1].ledger().ranks]
    whole, *shares = (one["embeddings_and_head"] for one in ledgers)
    assert whole == 275 * 64 * 4 * (1 if family in TIED else 2)
    assert shares == [whole // 275 * -(-275 // ranks)] * ranks
    for name in REQUESTS:
        leases = [lease(engine, name) for engine in engines]
        logits = [engine.logits(PROMPT, held) for engine, held in zip(engines, leases, strict=True)]
        torch.testing.assert_close(*logits, atol=1e-5, rtol=0, msg=lambda m, name=name: f"{name}: {m}")
        for held in leases:
            held.release()
    engines[1].stop()
