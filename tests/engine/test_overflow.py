"""A stream whose numbers overflow ends by name, and no other one notices."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorarep_runtime.engine.engine import Engine
from lorarep_runtime.errors import FailedPrecondition
from lorarep_runtime.request import Event, Output, Request
from tests.support.decoders import with_decoder
from tests.support.engines import PROMPT, assert_nothing_held, engine_for, greedy, sampled
from tests.support.models import save_adapter, save_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base("qwen2", tmp_path_factory.mktemp("overflow") / "base")


class Stream:
    """A request's events."""

    def __init__(self, engine: Engine, request: Request, *adapters: str) -> None:
        self.events: list[Event] = []
        engine.submit(request, engine.adapters.lease([(name, 1.0) for name in adapters]), self.events.append)

    @property
    def tokens(self) -> tuple[int, ...]:
        return tuple(token for event in self.events if isinstance(event, Output) for token in event.tokens)


@pytest.mark.parametrize("overlapped", [False, True])
@pytest.mark.parametrize("request_", [greedy(new_tokens=60), sampled(1), replace(greedy(), logprobs=1)])
def test_an_answer_that_overflows_ends_by_name_and_spoils_none_computed_with_it_or_after_it(
    base: Path, tmp_path: Path, request_: Request, overlapped: bool
) -> None:
    folder = save_adapter(base, tmp_path, r=4, target_modules=["k_proj", "v_proj"])
    file = folder / "adapter_model.safetensors"
    save_file({name: tensor * 1e30 for name, tensor in load_file(file).items()}, file)
    engine = engine_for(base, adapters={"huge": folder}, kv_bytes=512 << 10)
    if overlapped:
        with_decoder(engine)
    asked = [greedy(PROMPT[:5], 20), greedy(PROMPT + PROMPT, 20)]
    alone = [engine.generate([(request, engine.adapters.lease([]))])[0].tokens for request in asked]
    huge, *beside = [Stream(engine, request_, "huge"), *(Stream(engine, request) for request in asked)]
    while engine.loop.is_busy:
        engine.loop.step()
    assert isinstance(huge.events[-1], FailedPrecondition)
    assert str(huge.events[-1]) == "adapters: the logits with 'huge' are NaN or infinite"
    assert huge.tokens == ()
    assert any(pages.isnan().any() for pages in engine.pool.tensors)
    after = engine.generate([(request, engine.adapters.lease([])) for request in asked])
    assert [stream.tokens for stream in beside] == [answer.tokens for answer in after] == alone
    assert_nothing_held(engine)


def test_a_stream_that_overflows_in_a_launched_step_ends_and_the_others_go_on(base: Path) -> None:
    engine = engine_for(base)
    decoder = with_decoder(engine)
    alone = engine.generate([(greedy(new_tokens=20), engine.adapters.lease([]))])[0].tokens
    fine, bad = Stream(engine, greedy(new_tokens=20)), Stream(engine, greedy(PROMPT[:9], 20))
    for _ in range(4):
        engine.loop.step()
    assert engine.loop.overlap.pending is not None
    for pages in engine.pool.tensors:
        pages[[*engine.loop.scheduler.running][1].table.pages.ravel()] = torch.nan
    steps = decoder.told
    while engine.loop.is_busy:
        engine.loop.step()
    assert str(bad.events[-1]) == "base: its logits are NaN or infinite"
    assert 0 < len(bad.tokens) < 20
    assert fine.tokens == alone
    assert decoder.told == steps, "its row is left out of the next steps, and the others stay"
    assert_nothing_held(engine)
