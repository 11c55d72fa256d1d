"""Several ranks load, free and count adapters together, and none goes on alone."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lorarep_runtime import failpoints
from lorarep_runtime.adapters.maker import AdapterMaker
from lorarep_runtime.adapters.rank_makers import FollowingMaker, LeadingMaker
from lorarep_runtime.config import AdapterLimits
from lorarep_runtime.engine.engine import Engine
from lorarep_runtime.engine.leading_decoder import LeadingDecoder
from lorarep_runtime.engine.prefill_pass import SlicePacer
from lorarep_runtime.errors import Cancelled, EngineFailure, FailedPrecondition, Unavailable
from lorarep_runtime.model.base import Base
from lorarep_runtime.model.batch import Batch
from lorarep_runtime.request import Event
from tests.support.decoders import LayerDecoder
from tests.support.engines import PROMPT, assert_nothing_held, engine_for, greedy
from tests.support.models import save_adapter, save_base
from tests.support.ranks import ThreadRanks, Turns, ranks_in_threads, thread_channels
from tests.support.servers import wait_for

MODULES = ["q_proj", "o_proj", "down_proj"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base("llama", tmp_path_factory.mktemp("ranks") / "base")


@pytest.fixture(scope="module")
def dora(base: Path) -> Path:
    return save_adapter(base, base.parent / "dora", r=4, use_dora=True, target_modules=MODULES)


@pytest.fixture
def engine(base: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    with ranks_in_threads(monkeypatch):
        engine = engine_for(base, ranks=2, kv_bytes=2 << 20, limits=AdapterLimits(host_bytes=1 << 30))
    yield engine
    engine.stop()


@pytest.fixture
def points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(failpoints, "_FOLDER", str(tmp_path))
    return tmp_path


def held(engine: Engine) -> list[dict[str, int]]:
    """What each other rank holds; the engine has not been started."""
    assert engine.ranks is not None
    return engine.ranks.ask("held_bytes")


def answer(engine: Engine, *names: str) -> Any:
    lease = engine.adapters.lease([(name, 0.5) for name in names], None)
    return engine.generate([(greedy(new_tokens=8), lease)])[0].tokens


def test_the_ledger_counts_each_rank_and_what_is_unloaded_is_freed_on_all(engine: Engine, dora: Path) -> None:
    engine.adapters.load("dora", str(dora), trusted=True)
    answer(engine, "dora")  # a mix of one, by its weight
    ledger, others = engine.ledger(), held(engine)
    assert [one["adapters"] for one in ledger.ranks] == [ledger.categories["adapters"], others[0]["adapters"]]
    assert {**ledger.ranks[1], "workspace": others[0]["workspace"]} == others[0]  # a DoRA adds |w|² to that
    engine.adapters.unload("dora")
    wait_for(lambda: held(engine)[0]["adapters"] == 0, "the other rank to free it")


@pytest.mark.parametrize("who", ["rank 1", "rank 0"])
def test_a_load_that_fails_on_one_rank_fails_on_all_and_leaves_nothing(
    engine: Engine, dora: Path, points: Path, who: str
) -> None:
    def progress(stage: str, done: int, total: int) -> None:
        if stage == "compile" and done > 2:
            raise Cancelled("the caller has left")

    before = held(engine)[0]["adapters"]
    if who == "rank 1":
        (points / "adapter-1").write_text("once error")
        with pytest.raises(EngineFailure):
            engine.adapters.load("dora", str(dora), trusted=True)
    else:  # while rank 1 waits for a sum
        with pytest.raises(Cancelled):
            engine.adapters.load("dora", str(dora), trusted=True, progress=progress)
    assert held(engine)[0]["adapters"] == before == engine.ledger().categories["adapters"]
    engine.adapters.load("dora", str(dora), trusted=True)
    assert len(answer(engine, "dora")) == 8
    assert_nothing_held(engine)


@dataclass
class Made:
    """An adapter of one sum."""

    total: float
    number: int = 0


@pytest.mark.parametrize("fails", [1, 3])
def test_a_load_that_fails_on_one_of_four_ranks_leaves_no_other_waiting(
    points: Path, monkeypatch: pytest.MonkeyPatch, fails: int
) -> None:
    """Those before it have sent their terms, and wait for the sum."""
    monkeypatch.setattr(AdapterMaker, "compile", lambda *given: Made(given[-1].add_up(torch.ones(1)).item()))
    base: Any = SimpleNamespace(shard=SimpleNamespace(cut=None), device=torch.device("cpu"))
    pairs = [thread_channels(Turns()) for _ in range(3)]
    others: list[Any] = [FollowingMaker(AdapterMaker(base), theirs, rank) for rank, (_, theirs) in enumerate(pairs, 1)]  # type: ignore[arg-type]
    for other in others:
        threading.Thread(target=other.run, daemon=True).start()
    ranks: Any = SimpleNamespace(loads=[ours for ours, _ in pairs], check=lambda: None)
    maker, ends = LeadingMaker(base, ranks), list[Any]()

    def load() -> None:
        for _ in range(2):
            try:
                ends.append(maker.compile(None, None))  # type: ignore[arg-type]
            except RuntimeError as error:
                ends.append(error)

    (points / f"adapter-{fails}").write_text("once error")
    threading.Thread(target=load, daemon=True).start()
    wait_for(lambda: len(ends) == 2, "both loads to end", seconds=5)
    assert isinstance(ends[0], RuntimeError)
    assert [ends[1].total, *(made.total for other in others for made in other.adapters.values())] == [4.0] * 4
    for ours, _ in pairs:
        ours.close()


def test_adapters_come_and_go_beside_a_stream_on_all_ranks(engine: Engine, base: Path, dora: Path) -> None:
    alone = answer(engine)
    engine.start()
    events: list[Event] = []
    engine.submit(greedy(new_tokens=60), engine.adapters.lease([], None), events.append)
    for number in range(3):
        engine.adapters.load(f"dora-{number}", str(dora), trusted=True)
        engine.adapters.unload(f"dora-{number}")
    assert answer(engine) == alone
    wait_for(lambda: events and not hasattr(events[-1], "tokens"), "the stream to end")
    assert not isinstance(events[-1], Exception)


def leads(engine: Engine) -> tuple[LayerDecoder, LayerDecoder]:
    """Gives each rank a `LayerDecoder`, and the engine one that leads the other."""
    assert isinstance(engine.ranks, ThreadRanks)
    follower = engine.ranks.members[0].follower
    own = SimpleNamespace(
        forward=partial(Base.forward, engine.base), device=engine.base.device, vocab_size=engine.base.vocab_size
    )
    group = engine.base.shard.group, follower.base.shard.group
    decoders = (
        LayerDecoder(SimpleNamespace(base=own, pool=engine.pool), group[0].share),
        LayerDecoder(follower, group[1].share),
    )
    follower.decoder = decoders[1]
    engine.loop = engine.make_loop(LeadingDecoder(decoders[0], engine.ranks))
    return decoders


@pytest.mark.parametrize("decoder", [False, True], ids=["general", "captured"])
def test_prompts_have_the_log_probabilities_of_one_process(
    engine: Engine, base: Path, dora: Path, decoder: bool
) -> None:
    if decoder:
        leads(engine)
    alone, request = engine_for(base), replace(greedy(new_tokens=2), prompt_logprobs=2)
    scored = []
    for each in (alone, engine):
        each.adapters.load("dora", str(dora), trusted=True)
        answer = each.generate([(request, each.adapters.lease([("dora", 1.0)]))])[0]
        scored.append(answer.prompt_logprobs)
    assert scored[0].logprobs == pytest.approx(scored[1].logprobs, abs=1e-4)
    assert len(scored[0]) == len(PROMPT) - 1


@pytest.mark.parametrize("rows", [0, 24])
def test_the_others_decoders_know_the_same_rows_and_pages(engine: Engine, base: Path, dora: Path, rows: int) -> None:
    """Steps ahead, rows that end, further pages, and prompts in passes or as rows of steps."""
    alone = engine_for(base, adapters={"dora": dora}, kv_bytes=2 << 20)
    decoders = leads(engine)
    decoders[0].most_rows = rows
    engine.adapters.load("dora", str(dora), trusted=True)
    asked = [
        (greedy(PROMPT[: 3 * i + 2], new_tokens=9 * i + 4), [("dora", 1.0)] if i % 2 else [("dora", 0.5)][: i % 3])
        for i in range(5)
    ]
    found, expected = (
        [done.tokens for done in one.generate((r, one.adapters.lease(adapters)) for r, adapters in asked)]
        for one in (engine, alone)
    )
    assert found == expected
    assert held(engine)  # all has been done
    assert decoders[0].steps == decoders[1].steps > 0
    assert decoders[0].prompts == decoders[1].prompts
    assert_nothing_held(engine)


def test_a_rank_that_fails_in_a_step_fails_the_engine(engine: Engine, points: Path) -> None:
    engine.start()
    (points / "forward-1").write_text("error")
    with pytest.raises(EngineFailure):
        answer(engine)
    assert engine.failure is not None


@pytest.fixture
def pending(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A stream, and a pass over two prompts that is pending on both ranks."""
    monkeypatch.setattr(SlicePacer, "visits", lambda self: 1)
    _, theirs = leads(engine)
    told: list[list[Event]] = []
    passes: list[weakref.ref[Any]] = []

    def prefill(batch: Batch, begin: Any = theirs.prefill) -> Any:
        begun = begin(batch)
        passes.append(weakref.ref(begun))
        return begun

    theirs.prefill = prefill  # type: ignore[method-assign]

    def submit() -> int:
        told.append([])
        return engine.submit(greedy(new_tokens=40), engine.adapters.lease([], None), told[-1].append)

    numbers = []
    for count in (1, 2):
        numbers += [submit() for _ in range(count)]
        for _ in range(3):
            engine.loop.step()
    assert engine.loop.prefill.pending is not None
    return SimpleNamespace(told=told, prompts=numbers[1:], passes=passes)


@pytest.mark.parametrize("ends", ["a cancelled one", "all"])
def test_all_are_told_where_a_rank_fails_while_a_pass_is_pending(engine: Engine, pending: Any, ends: str) -> None:
    assert engine.ranks is not None
    engine.ranks.fail(EngineFailure("rank 1 has ended"))
    if ends == "all":
        engine.loop.inbox.stop()
        engine.loop.run()
        assert [type(events[-1]) for events in pending.told] == [Unavailable] * 3
    else:
        engine.cancel(pending.prompts[0])
        engine.loop.step()
        assert isinstance(pending.told[1][-1], Cancelled)


def test_a_pass_that_all_have_left_is_freed_on_all_ranks(engine: Engine, pending: Any) -> None:
    for number in pending.prompts:
        engine.cancel(number)
    engine.loop.step()
    assert held(engine)  # all has been done
    assert pending.passes[-1]() is None


def test_a_rank_that_cannot_load_the_base_is_told(base: Path, points: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (points / "base-1").write_text("error")
    with ranks_in_threads(monkeypatch), pytest.raises(RuntimeError, match="rank 1"):
        engine_for(base, ranks=2)


@pytest.mark.parametrize(
    ("family", "ranks", "quantization", "said"),
    [
        ("llama", 3, "none", "num_attention_heads, 4"),
        ("llama", 4, "nf4", "whole blocks of 64"),
        ("phi3", 2, "none", "mlp.down_proj|mlp.gate|is not divided among ranks"),
    ],
)
def test_a_base_that_cannot_be_divided_is_refused_by_what_it_has(
    tmp_path: Path, family: str, ranks: int, quantization: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_base(family, tmp_path)
    with ranks_in_threads(monkeypatch), pytest.raises(FailedPrecondition, match=said) as refused:
        engine_for(folder, quantization, ranks=ranks)
    assert refused.value.field == "tensor_parallel"


@pytest.mark.parametrize("sends", [False, True])
def test_a_load_ends_with_an_error_of_ours_where_a_rank_has_gone(sends: bool) -> None:
    """And so does the server, whose ranks hear of it."""

    class Gone:
        def send(self, message: object) -> None:
            if not sends:
                raise BrokenPipeError

        def receive(self) -> object:
            raise EOFError

    told: list[BaseException] = []
    ranks: Any = SimpleNamespace(loads=[Gone()], check=lambda: None, fail=told.append)
    adapter: Any = SimpleNamespace(number=1)
    with pytest.raises(EngineFailure, match="a rank has ended") as error:
        LeadingMaker(None, ranks).copy(adapter, torch.device("cpu"))  # type: ignore[arg-type]
    assert told == [error.value]
