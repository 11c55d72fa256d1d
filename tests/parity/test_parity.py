"""Logits and greedy tokens against a physically stacked model under PEFT's own adapter, in fp32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lorarep_runtime.config import PAGE_TOKENS
from tests.support.engines import PROMPT, assert_nothing_held, engine_for, greedy
from tests.support.models import FAMILIES, MAPS, reference, reference_logits, save_adapter, save_base, stack_of

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def targets(family: str) -> list[str]:
    """All linear modules of a layer."""
    if family == "phi3":
        return ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
    return [*ATTENTION, "gate_proj", "up_proj", "down_proj"]


def kinds(family: str) -> dict[str, dict[str, Any]]:
    """LoraConfig fields by kind of adapter."""
    modules = targets(family)
    return {
        "lora": dict(r=4, lora_alpha=8, target_modules=modules),
        "rslora": dict(r=4, lora_alpha=6, use_rslora=True, target_modules=modules),
        "dora": dict(r=4, lora_alpha=8, use_dora=True, target_modules=modules),
        "patterns": dict(
            r=4,
            lora_alpha=8,
            target_modules=modules,
            lora_bias=True,
            rank_pattern={modules[-1]: 6, r"layers\.1\..*o_proj": 2},
            alpha_pattern={"o_proj": 3},
        ),
        "partial": dict(r=4, lora_alpha=8, target_modules=[modules[0], modules[-1]], layers_to_transform=[0, 2]),
    }


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def base(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(family, tmp_path_factory.mktemp(family) / "base")


def check_against_reference(engine: Any, base: Path, requests: dict[str, tuple[Path | None, tuple[int, ...]]]) -> None:
    """All requests in one batch; each one's tokens and logits are its reference's.

    Args:
        requests: adapter's folder, or None, and stack, by the name of the adapter or stack.
    """

    def lease(name: str) -> Any:
        return engine.adapters.lease([(name, 1.0)] if requests[name][0] else [], None if requests[name][0] else name)

    answers = engine.generate((greedy(new_tokens=2 * PAGE_TOKENS), lease(name)) for name in requests)
    assert_nothing_held(engine)
    for (name, (folder, stack)), answer in zip(requests.items(), answers, strict=True):
        text = [*PROMPT, *answer.tokens]
        expected = reference_logits(reference(base, folder, stack), text)
        # Each token is the reference's likeliest after the same tokens: its own greedy decoding gives the same answer.
        assert list(answer.tokens) == expected[len(PROMPT) - 1 : -1].argmax(-1).tolist(), name
        held = lease(name)
        got = engine.logits(text, held)
        held.release()
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0, msg=lambda m, name=name: f"{name}: {m}")


def test_every_kind_of_adapter_and_every_map_in_one_batch(family: str, base: Path) -> None:
    """Llama has each kind on each map. Another family has each map and each kind, and all others together all pairs."""
    requests: dict[str, tuple[Path | None, tuple[int, ...]]] = {}
    number = list(FAMILIES).index(family)
    for i, (map_name, ranges) in enumerate(MAPS.items()):
        for j, (kind, config) in enumerate(kinds(family).items()):
            if family != "llama" and j != (i + number) % len(kinds(family)):
                continue
            folder = base.parent / f"{kind}-{i}"
            save_adapter(base, folder, seed=7 * i + j, layer_replication=ranges, **config)
            requests[f"{kind} on {map_name}"] = folder, stack_of(ranges)
    engine = engine_for(base, adapters={name: folder for name, (folder, _) in requests.items() if folder})
    check_against_reference(engine, base, requests)


def test_bare_stacks(base: Path) -> None:
    stacks = {name: stack_of(ranges) for name, ranges in MAPS.items() if ranges}
    engine = engine_for(base, stacks=stacks)
    check_against_reference(engine, base, {name: (None, stack) for name, stack in engine.stacks.items()})
