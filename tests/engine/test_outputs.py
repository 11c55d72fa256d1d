"""What an answer's text is at its end, and which tokens end it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from lorarep_runtime.errors import DeadlineExceeded
from lorarep_runtime.request import Event, FinishReason, Output, Request, Stopping
from lorarep_runtime.text.detokenizer import REPLACEMENT
from tests.support.engines import PROMPT, assert_nothing_held, engine_for, greedy
from tests.support.models import save_adapter, save_base, save_tokenizer


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base("qwen2", tmp_path_factory.mktemp("outputs") / "base")


@pytest.mark.parametrize("reason", [FinishReason.LENGTH, FinishReason.STOP_TOKEN, FinishReason.END_TOKEN])
def test_text_that_might_have_become_a_stop_string_is_there_at_the_end(
    base: Path, reason: FinishReason, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_for(base)
    tokens = engine.generate([(greedy(), engine.adapters.lease([]))])[0].tokens
    decode = engine.base.tokenizer.decode
    # A text that ends with a whole character, before a token that is new.
    length, text = next(
        (i, text)
        for i in range(2, len(tokens))
        if (text := decode(tokens[:i])) and not text.endswith(REPLACEMENT) and tokens[i] not in tokens[:i]
    )
    stop = (f"{text[-1]}{text[-1]}, which does not come",)
    if reason is FinishReason.LENGTH:
        stopping = Stopping(max_new_tokens=length, ignore_eos=True, stop=stop)
    elif reason is FinishReason.STOP_TOKEN:
        stopping = Stopping(max_new_tokens=64, ignore_eos=True, stop=stop, stop_token_ids=(tokens[length],))
    else:
        monkeypatch.setattr(engine.base.tokenizer, "eos_ids", frozenset({tokens[length]}))
        stopping = Stopping(max_new_tokens=64, stop=stop)
    (answer,) = engine.generate([(Request(PROMPT, stopping=stopping), engine.adapters.lease([]))])
    assert answer.finished.reason is reason
    assert answer.text == text
    assert_nothing_held(engine)


def test_a_deadline_tells_the_text_that_might_have_become_a_stop_string(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_for(base)
    tokens = engine.generate([(greedy(), engine.adapters.lease([]))])[0].tokens
    text = engine.base.tokenizer.decode(tokens[:3]).rstrip(REPLACEMENT)
    stopping = Stopping(max_new_tokens=64, ignore_eos=True, stop=(f"{text}, which does not come",))
    asked = Request(PROMPT, stopping=stopping, deadline=time.monotonic() + 1000)
    events: list[Event] = []
    engine.submit(asked, engine.adapters.lease([]), events.append)
    while sum(isinstance(event, Output) for event in events) < 3:
        engine.loop.step()
    monkeypatch.setattr("time.monotonic", lambda: asked.deadline)
    engine.loop.step()
    *outputs, late = events
    assert isinstance(late, DeadlineExceeded)
    shown = "".join(output.text for output in outputs if isinstance(output, Output))
    assert engine.base.tokenizer.decode(tokens[: len(outputs)]).startswith(shown + late.text)
    assert (shown + late.text).startswith(text)
    assert late.text


@pytest.mark.parametrize("whose", ["the adapter's", "the base's"])
def test_end_tokens_are_of_both_tokenizers(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whose: str
) -> None:
    folder = save_adapter(base, tmp_path, r=4, target_modules=["q_proj"])
    save_tokenizer(folder)
    engine = engine_for(base, adapters={"own": folder})
    tokens = engine.generate([(greedy(), engine.adapters.lease([("own", 1.0)]))])[0].tokens
    lease = engine.adapters.lease([("own", 1.0)])
    assert lease.tokenizer is not engine.base.tokenizer
    tokenizer = lease.tokenizer if whose == "the adapter's" else engine.base.tokenizer
    monkeypatch.setattr(tokenizer, "eos_ids", frozenset({tokens[5]}))
    (answer,) = engine.generate([(Request(PROMPT, stopping=Stopping(max_new_tokens=64)), lease)])
    assert answer.finished.reason is FinishReason.END_TOKEN
    assert answer.tokens == tokens[: tokens.index(tokens[5]) + 1]
