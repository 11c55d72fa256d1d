"""A deterministic engine gives a request the same tokens and log-probabilities, bitwise, whatever else it computes."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lorarep_runtime.adapters.lease import Lease
from lorarep_runtime.config import PAGE_TOKENS, AdapterLimits, BaseConfig, EngineConfig, SchedulerConfig
from lorarep_runtime.engine.engine import Engine
from lorarep_runtime.engine.offline import Completion
from lorarep_runtime.errors import FailedPrecondition
from lorarep_runtime.request import Request, Sampling, Stopping
from tests.support.engines import assert_nothing_held
from tests.support.models import save_adapter, save_base

GPU = torch.cuda.is_available()
REQUESTS, LONGEST, NEW_TOKENS = (64, 300, 256) if GPU else (16, 40, 24)
SIZES = (3, 8, 17, 32, 64, 200) if GPU else (3, 8, 16)
"""Requests at a time."""
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MAPS = {"plain": None, "overlap": [[0, 2], [1, 3]], "twice": [[0, 3], [0, 3]]}
KINDS = {"lora": dict(r=8, use_dora=False), "dora": dict(r=40, use_dora=True), "rank": dict(r=70, use_dora=False)}
FORMS = [("nf4", "bfloat16"), ("int8", "bfloat16"), ("none", "bfloat16")]
Asked = tuple[Request, str | None]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = (
        dict(hidden_size=512, intermediate_size=1024, num_attention_heads=8, num_key_value_heads=4, head_dim=64)
        if GPU
        else {}
    )
    folder = tmp_path_factory.mktemp("deterministic") / "base"
    return save_base("mistral", folder, num_hidden_layers=3, max_position_embeddings=1024, **sizes)


@pytest.fixture(scope="module")
def adapters(base: Path) -> dict[str, Path]:
    return {
        f"{kind} {name}": save_adapter(
            base,
            base.parent / f"{kind} {name}",
            seed=seed,
            layer_replication=ranges,
            lora_alpha=16,
            target_modules=TARGETS[seed % 3 :],
            **options,
        )
        for seed, (name, ranges) in enumerate(MAPS.items())
        for kind, options in KINDS.items()
    }


@pytest.fixture(scope="module", params=FORMS if GPU else [("none", "bfloat16"), ("none", "float16")], ids="-".join)
def form(request: pytest.FixtureRequest) -> tuple[str, str]:
    return request.param


def engine_of(base: Path, form: tuple[str, str], **scheduler: object) -> Engine:
    quantization, dtype = form
    return Engine(
        EngineConfig(
            BaseConfig(str(base), quantization=quantization, dtype=dtype, device="cuda" if GPU else "cpu"),
            stacks={"named": (0, 1, 2, 1, 2)},
            adapters=AdapterLimits(max_rank=128),
            scheduler=SchedulerConfig(
                **{"kv_bytes": 256 << 20, "max_sequences": 200, "prefix_cache": False, **scheduler}
            ),
            deterministic=True,
        )
    )


@pytest.fixture(scope="module")
def engine(base: Path, adapters: dict[str, Path], form: tuple[str, str]) -> Engine:
    return loaded(engine_of(base, form), adapters)


def loaded(engine: Engine, adapters: dict[str, Path]) -> Engine:
    for name, folder in adapters.items():
        engine.adapters.load(name, str(folder), trusted=True)
    return engine


@pytest.fixture(scope="module")
def asked(adapters: dict[str, Path]) -> list[Asked]:
    """Greedy and drawn requests of many lengths: for the base, a further stack, and each adapter."""
    dice = random.Random(0)
    names = [None, "", *adapters]
    return [
        (
            Request(
                tuple(dice.randrange(256) for _ in range(dice.randint(1, LONGEST))),
                sampling=Sampling(temperature=0.9, top_p=0.95, seed=i) if i % 2 else Sampling(),
                stopping=Stopping(max_new_tokens=dice.randint(NEW_TOKENS // 2, NEW_TOKENS), ignore_eos=True),
                logprobs=1 if i % 4 < 2 else None,
            ),
            names[i % len(names)],
        )
        for i in range(REQUESTS)
    ]


@pytest.fixture(scope="module")
def alone(engine: Engine, asked: list[Asked]) -> list[Completion]:
    """Each request's answer when nothing else is there."""
    return [answers(engine, [one])[0] for one in asked]


def lease_for(engine: Engine, name: str | None) -> Lease:
    return engine.adapters.lease([], "named") if name == "" else engine.adapters.lease([(name, 1.0)] if name else [])


def answers(engine: Engine, asked: Sequence[Asked]) -> list[Completion]:
    got = engine.generate((request, lease_for(engine, name)) for request, name in asked)
    assert_nothing_held(engine)
    return got


def assert_same(one: Completion, other: Completion) -> None:
    assert one.tokens == other.tokens
    assert one.logprobs == other.logprobs


@pytest.mark.parametrize("size", SIZES)
def test_in_any_batch(engine: Engine, asked: list[Asked], alone: list[Completion], size: int) -> None:
    order = random.Random(size).choices(range(len(asked)), k=max(size, len(asked)))
    for begin in range(0, len(order), size):
        some = order[begin : begin + size]
        for i, answer in zip(some, answers(engine, [asked[i] for i in some]), strict=True):
            assert_same(answer, alone[i])


@pytest.mark.parametrize("max_step_tokens", [None, 48])
def test_arriving_at_random_times_beside_loads(
    base: Path,
    adapters: dict[str, Path],
    form: tuple[str, str],
    asked: list[Asked],
    alone: list[Completion],
    max_step_tokens: int | None,
) -> None:
    """Prompts are cut wherever steps are full; those of 48 tokens cut most."""
    engine = loaded(engine_of(base, form, max_step_tokens=max_step_tokens), adapters)
    dice = random.Random(1)

    def arriving() -> Iterator[tuple[Request, Lease]]:
        for request, name in asked:
            yield request, lease_for(engine, name)
            if dice.random() < 0.2:
                engine.adapters.load("more", str(dice.choice([*adapters.values()])), trusted=True, replace=True)
            time.sleep(dice.expovariate(1 / 0.01))

    engine.start()
    try:
        for one, other in zip(engine.generate(arriving()), alone, strict=True):
            assert_same(one, other)
    finally:
        engine.stop()


def test_after_preemption(
    base: Path, adapters: dict[str, Path], form: tuple[str, str], asked: list[Asked], alone: list[Completion]
) -> None:
    page = engine_page_bytes(base, form)
    longest = 6 * -(-(LONGEST + NEW_TOKENS) // 16)
    engine = loaded(engine_of(base, form, kv_bytes=2 * longest * page), adapters)
    for one, other in zip(answers(engine, asked), alone, strict=True):
        assert_same(one, other)
    assert engine.stats().preemptions > 3


def engine_page_bytes(base: Path, form: tuple[str, str]) -> int:
    engine = engine_of(base, form, kv_bytes=64 << 20)
    return (64 << 20) // engine.pool.total


def test_what_is_cached_changes_no_bit(
    base: Path,
    adapters: dict[str, Path],
    form: tuple[str, str],
    engine: Engine,
    asked: list[Asked],
    alone: list[Completion],
) -> None:
    """Neither pages of prompts nor those of answers, whose tokens were computed one in a step."""
    cached = loaded(engine_of(base, form, prefix_cache=True), adapters)
    some = asked[: REQUESTS // 2]
    answers(cached, some)
    again = answers(cached, some)
    for one, other in zip(again, alone, strict=False):
        assert_same(one, other)
    longer = [
        (replace(request, prompt=(*request.prompt, *answer.tokens, 7)), name)
        for (request, name), answer in zip(some, again, strict=True)
    ]
    got = answers(cached, longer)
    for one, other in zip(got, answers(engine, longer), strict=True):
        assert_same(one, other)
    for requests, found, uncached in ((some, again, 1), (longer, got, 2)):  # the answer's last token was not computed
        for (request, _), answer in zip(requests, found, strict=True):
            assert answer.finished.cached_tokens == (len(request.prompt) - uncached) // PAGE_TOKENS * PAGE_TOKENS


def test_log_probabilities_do_not_change_tokens(engine: Engine, asked: list[Asked], alone: list[Completion]) -> None:
    """Steps that are not read late give the same."""
    turned = [(replace(request, logprobs=None if request.logprobs else 1), name) for request, name in asked]
    assert [a.tokens for a in answers(engine, turned)] == [a.tokens for a in alone]


if GPU:

    def test_what_cannot_be_deterministic_is_refused(base: Path) -> None:
        with pytest.raises(FailedPrecondition, match="deterministic"):
            engine_of(base, ("none", "float32"))


if not GPU:

    def test_what_cannot_be_deterministic_is_refused(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(engine.base.config, "model_type", "mixtral")
        with pytest.raises(FailedPrecondition, match="mixtral"):
            engine.base.make_deterministic()

    def test_activations_do_not_depend_on_the_number_of_rows(base: Path) -> None:
        """torch gives each thread a part of all numbers, and computes the ends of parts otherwise than the rest."""
        engine = engine_of(base, ("none", "float32"))
        activation = engine.base.walk.layers[0].get_submodule("mlp.act_fn")
        x = torch.randn(1, 64, 1000, generator=torch.Generator().manual_seed(0)) * 4
        threads = torch.get_num_threads()
        torch.set_num_threads(3)
        try:
            together, alone = activation(x), torch.cat([activation(x[:, i : i + 1]) for i in range(64)], 1)
            plain = torch.nn.functional.silu(x)
        finally:
            torch.set_num_threads(threads)
        assert torch.equal(together, alone)
        torch.testing.assert_close(together, plain)
