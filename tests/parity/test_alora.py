"""aLoRA: the base computes a prompt up to the last place of the invocation tokens, and the adapter what follows it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lorarep_runtime.adapters.lease import NEVER
from lorarep_runtime.engine.engine import Engine
from lorarep_runtime.errors import FailedPrecondition, InvalidArgument, LorarepError
from tests.support.engines import PROMPT, engine_for, greedy
from tests.support.models import reference, save_adapter, save_base, stack_of

LAYERS = 3
RANGES = [[0, 2], [1, 3]]
CALL = (260, 261, 260)
SHARED: dict[str, Any] = dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])
KINDS: dict[str, dict[str, Any]] = {
    "alora": dict(alora_invocation_tokens=[*CALL]),
    "alora on a stack": dict(alora_invocation_tokens=[*CALL], layer_replication=RANGES),
    "alora with biases": dict(alora_invocation_tokens=[*CALL[:1]], lora_bias=True, use_rslora=True),
    "lora": {},
}
PROMPTS = {
    "in the middle": (*PROMPT[:13], *CALL, *PROMPT[13:]),
    "at the beginning": (*CALL, *PROMPT),
    "at the end": (*PROMPT, *CALL),
    "twice": (*CALL, *PROMPT, *CALL, 7, 8),
    "overlapping": (*PROMPT[:5], 260, 261, 260, 261, 260, 3),
    "at a page": (*PROMPT[:16], *CALL, *PROMPT),
    "nowhere": (*PROMPT, *CALL[:2]),
    "after a page": (*PROMPT[:16], 1, *CALL, *PROMPT, *PROMPT),
    "after a page and again": (*PROMPT[:16], 1, *CALL, *PROMPT, *PROMPT, *CALL, 9),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base("llama", tmp_path_factory.mktemp("alora") / "base", num_hidden_layers=LAYERS)


@pytest.fixture(scope="module")
def adapters(base: Path) -> dict[str, Path]:
    return {
        name: save_adapter(base, base.parent / str(i), seed=i, **SHARED, **config)
        for i, (name, config) in enumerate(KINDS.items())
    }


def first_of(name: str | None, prompt: tuple[int, ...]) -> int | None:
    """Where an adapter begins: the last place of its invocation, or None."""
    call = [] if name is None else KINDS[name].get("alora_invocation_tokens", [])
    places = [i for i in range(len(prompt)) if list(prompt[i : i + len(call)]) == call]
    return (max(places) if places else None) if call else 0


@torch.inference_mode()
def assert_as_with_peft(
    engine: Engine, base: Path, adapters: dict[str, Path], quantization: str, asked: list[tuple[str | None, str]]
) -> None:
    """Answers requests together, and compares tokens and logits with PEFT's."""
    leases = [engine.adapters.lease([] if name is None else [(name, 1.0)]) for name, _ in asked]
    answers = engine.generate(
        (greedy(PROMPTS[prompt], new_tokens=8), lease) for (_, prompt), lease in zip(asked, leases, strict=True)
    )
    models: dict[str | None, Any] = {}
    for (name, key), answer in zip(asked, answers, strict=True):
        if name not in models:
            stack = stack_of(KINDS[name].get("layer_replication") if name else None, LAYERS)
            models[name] = reference(base, name and adapters[name], stack, quantization)
        text, first = [*PROMPTS[key], *answer.tokens], first_of(name, PROMPTS[key])
        offsets = {} if name in (None, "lora") else {"alora_offsets": [None if first is None else len(text) - first]}
        expected = models[name](input_ids=torch.tensor([text]), **offsets).logits[0].float()
        assert list(answer.tokens) == expected[len(PROMPTS[key]) - 1 : -1].argmax(-1).tolist(), (name, key)
        lease = engine.adapters.lease([] if name is None else [(name, 1.0)])
        assert lease.first_adapted(PROMPTS[key]) == (NEVER if first is None else first)
        if first_of(name, tuple(text)) == first:
            torch.testing.assert_close(engine.logits(text, lease), expected, atol=1e-5, rtol=0)
        lease.release()


@pytest.mark.parametrize(
    ("quantization", "limits"),
    [
        ("none", {}),
        ("nf4", {}),
        ("none", {"max_step_tokens": 16, "max_sequences": 6}),
        ("none", {"chunked_prefill": False}),
    ],
    ids=str,
)
def test_all_beginnings_are_as_with_peft_in_one_batch(
    quantization: str, limits: dict[str, Any], base: Path, adapters: dict[str, Path]
) -> None:
    engine = engine_for(base, quantization, adapters=adapters, **limits)
    asked = [(name, prompt) for name in (None, *KINDS) for prompt in PROMPTS]
    assert_as_with_peft(engine, base, adapters, quantization, asked)


def test_pages_before_the_invocation_are_the_bases_and_others_are_not_shared(
    base: Path, adapters: dict[str, Path]
) -> None:
    """A text whose invocation was the last one begins a text with a later one: the adapter's pages are of no use."""
    engine = engine_for(base, adapters=adapters)
    once, again = "after a page", "after a page and again"
    asked = [(None, once), ("alora", once), ("alora", again), ("lora", once), ("alora", again), (None, again)]
    cached = []
    for name, prompt in asked:
        lease = engine.adapters.lease([] if name is None else [(name, 1.0)])
        (answer,) = engine.generate([(greedy(PROMPTS[prompt], new_tokens=2), lease)])
        cached.append(answer.finished.cached_tokens)
        assert_as_with_peft(engine, base, adapters, "none", [(name, prompt)])
    assert cached == [0, 16, 48, 0, 48, 48]


@pytest.mark.parametrize(
    ("changes", "kind", "why"),
    [
        (
            {"alora_invocation_tokens": [272]},
            FailedPrecondition,
            "alora_invocation_tokens: 272 is none of the base's",
        ),
        ({"alora_invocation_tokens": "call"}, InvalidArgument, "alora_invocation_tokens: "),
        ({"use_dora": True}, InvalidArgument, "alora_invocation_tokens: does not go with use_dora"),
        ({"modules_to_save": ["lm_head"]}, FailedPrecondition, "alora_invocation_tokens: begins within a sequence"),
    ],
)
def test_what_does_not_go_with_alora_is_refused_by_name(
    changes: dict[str, Any], kind: type[LorarepError], why: str, base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(adapters["alora"], tmp_path / "changed")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    engine = engine_for(base, adapters={"alora": adapters["alora"]})
    with pytest.raises(kind) as refused:
        engine.adapters.load("changed", str(folder), trusted=True)
    assert str(refused.value).startswith(why)
    with pytest.raises(FailedPrecondition, match=r"^adapters: one is an aLoRA"):
        engine.adapters.lease([("alora", 0.5)])
