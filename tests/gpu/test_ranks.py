"""Fused layers of two ranks, in steps and in passes over prompts, answer as one process with `transformers`' layers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lorarep_runtime.adapters import maker
from lorarep_runtime.adapters.compile import compile_adapter
from lorarep_runtime.engine.leading_decoder import LeadingDecoder
from lorarep_runtime.gpu.decoder import Decoder
from lorarep_runtime.model.compiled_adapter import Adapter, table_of
from lorarep_runtime.request import Request, Sampling, Stopping
from tests.support.engines import PROMPT, assert_nothing_held, engine_for, greedy
from tests.support.models import ALTERNATING, save_adapter, save_base
from tests.support.ranks import ThreadRanks, ranks_in_threads

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def compiled_with_table(*given: Any, **named: Any) -> Adapter:
    """As on a GPU."""
    made = compile_adapter(*given, **named)
    return replace(made, table=table_of(made.storage, made.blocks, made.stack, made.modules))


def test_two_ranks_of_fused_layers_are_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("kernels are compiled for the GPU, and ranks in threads compute on the CPU")
    monkeypatch.setattr("lorarep_runtime.gpu.buffers.MOST_PARTS", 2)
    monkeypatch.setattr("lorarep_runtime.gpu.buffers.MOST_SPLITS", 1)
    monkeypatch.setattr("lorarep_runtime.kernels.decode.shrink.MOST_RANK_PROGRAMS", 1)
    monkeypatch.setattr(maker, "compile_adapter", compiled_with_table)
    base = save_base("qwen2", tmp_path / "base", num_hidden_layers=2, layer_types=ALTERNATING[:2], vocab_size=275)
    config: dict[str, Any] = dict(r=3, lora_alpha=8, use_dora=True, target_modules=TARGETS)
    dora = save_adapter(base, tmp_path / "dora", layer_replication=[[0, 2], [1, 2]], **config)
    given: dict[str, Any] = dict(adapters={"dora": dora}, kv_bytes=1 << 20)
    with ranks_in_threads(monkeypatch, in_turns=True):
        one, two = engine_for(base, **given), engine_for(base, ranks=2, **given)
    assert isinstance(two.ranks, ThreadRanks)
    follower = two.ranks.members[0].follower
    sizes = dict(max_sequences=2, max_tokens=64, max_pages=4)
    follower.decoder = Decoder(follower.base, follower.pool, **sizes)
    own = Decoder(two.base, two.pool, **sizes)
    two.loop = two.make_loop(LeadingDecoder(own, two.ranks))
    monkeypatch.setattr(own, "rows_with_prompts", lambda decoding: 0)  # so that prompts go in passes
    stopping = Stopping(max_new_tokens=3, ignore_eos=True)
    drawn = Request(PROMPT[:3], sampling=Sampling(temperature=0.9, seed=1), stopping=stopping)
    asked = [(drawn, []), (greedy(PROMPT[:2], new_tokens=2), [("dora", 1.0)])]
    answers = [
        [done.tokens for done in engine.generate((r, engine.adapters.lease(adapters)) for r, adapters in asked)]
        for engine in (one, two)
    ]
    assert answers[0] == answers[1]
    assert_nothing_held(two)
    two.stop()
