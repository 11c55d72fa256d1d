"""Templates of anybody: rendered as `transformers` does, within limits of time and memory."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from lorarep_runtime.device import process_pool
from lorarep_runtime.device.process import end_process, start_process
from lorarep_runtime.errors import Exhausted, InvalidArgument
from lorarep_runtime.text import chat_template
from lorarep_runtime.text.tokenizer import Tokenizer
from tests.support.models import save_tokenizer

CHAT = [{"role": "user", "content": "hié\ud800\n"}, {"role": "assistant", "content": "b"}]
TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}>{{ eos_token }}{% endif %}"
)
LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return Tokenizer(folder)


def test_an_untrusted_template_gives_the_same_tokens(tokenizer: Tokenizer) -> None:
    chat = [{**message, "content": message["content"].replace("\ud800", "")} for message in CHAT]
    trusted, untrusted = (tokenizer.with_chat_template(TEMPLATE, trusted=trusted) for trusted in (True, False))
    assert untrusted.chat(chat) == trusted.chat(chat)
    assert chat_template.render("{{ messages[0].content }}", CHAT, {}) == CHAT[0]["content"]


def test_a_template_that_refuses_says_why() -> None:
    with pytest.raises(InvalidArgument, match=r"prompt\.chat: the chat template refuses it: no such thing"):
        chat_template.render("{{ raise_exception('no such thing') }}", CHAT, {})


@pytest.mark.parametrize("hostile", [LOOP, "{% for i in range(99999) %}{% set x = 'a' * 10**9 %}{% endfor %}"])
def test_a_template_that_takes_too_much_is_ended_and_the_next_is_rendered(hostile: str) -> None:
    chat_template.render("", CHAT, {})  # a process is there
    began = time.monotonic()
    with pytest.raises(InvalidArgument, match=r"prompt\.chat: the chat template (takes over|refuses it: MemoryError)"):
        chat_template.render(hostile, CHAT, {})
    assert time.monotonic() - began < chat_template.RENDER_SECONDS + 20  # on a busy machine
    assert chat_template.render("{{ messages[1].content }}", CHAT, {}) == "b"


def test_a_template_that_has_taken_too_much_is_refused_at_once_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(process_pool, "ask", lambda process, question: asked.append(question))
    monkeypatch.setattr(chat_template, "_refused", {})
    with pytest.raises(InvalidArgument, match="takes over 3 s"):
        chat_template.render(LOOP, CHAT, {})
    with pytest.raises(InvalidArgument, match=r"took over 3 s .* not rendered for (60|59) s"):
        chat_template.render(LOOP, CHAT, {})
    assert len(asked) == 1
    monkeypatch.setattr(chat_template, "_refused", dict.fromkeys(chat_template._refused, time.monotonic()))
    with pytest.raises(InvalidArgument, match="takes over 3 s"):
        chat_template.render(LOOP + "{# another #}", CHAT, {})
    assert len(chat_template._refused) == 1


def test_a_long_conversation_refuses_no_shorter_one_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """An honest template may take long for it."""

    def ask(process: object, question: list[Any]) -> dict[str, str] | None:
        _, messages, variables = question
        return None if len(messages) * len(messages[0]["content"]) >= 1000 or "slow" in variables else {"text": "fast"}

    def is_refused_at_once(count: int, characters: int, **variables: str) -> bool:
        with pytest.raises(InvalidArgument) as error:
            chat_template.render(TEMPLATE, [{"content": "x" * characters}] * count, variables)
        return "is not rendered" in error.value.message

    monkeypatch.setattr(process_pool, "ask", ask)
    monkeypatch.setattr(chat_template, "_refused", {})
    assert not is_refused_at_once(100, 10)
    assert is_refused_at_once(100, 10)
    assert is_refused_at_once(200, 10)
    assert not is_refused_at_once(1, 2000), "another long one"
    assert not is_refused_at_once(1, 10, slow="for whoever says so")
    assert chat_template.render(TEMPLATE, CHAT, {}) == "fast"


def test_callers_of_templates_without_end_leave_threads_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many callers as the server has threads for admission, each with a template of its own."""
    over = threading.Event()

    def take_all_time(process: object, question: object) -> None:
        over.wait()

    monkeypatch.setattr(process_pool, "ask", take_all_time)
    monkeypatch.setattr(chat_template, "_refused", {})
    with ThreadPoolExecutor(8) as threads:
        hostile = [threads.submit(chat_template.render, str(i), CHAT, {}) for i in range(8)]
        try:
            threads.submit(int).result(timeout=20)
            # Before the others end: their places would be free.
            for _ in islice(as_completed(hostile, timeout=20), 8 - chat_template.MAX_CALLERS):
                pass
        finally:
            over.set()
        ended = [type(call.exception()) for call in hostile]
    assert ended.count(InvalidArgument) == chat_template.MAX_CALLERS
    assert ended.count(Exhausted) == 8 - chat_template.MAX_CALLERS


def test_a_text_without_end_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="over 8388608 characters"):
        chat_template.render("{{ 'a' * 9000000 }}", CHAT, {})
    with pytest.raises(InvalidArgument, match="over 8388608 characters"):
        chat_template.render("a" * 9_000_000, CHAT, {})


def test_callers_share_few_processes() -> None:
    with ThreadPoolExecutor(chat_template.MAX_CALLERS) as threads:
        texts = threads.map(lambda i: chat_template.render(f"{i}", CHAT, {}), range(40))
        assert list(texts) == [str(i) for i in range(40)]
    assert chat_template._processes._idle.qsize() == chat_template.PROCESSES


def test_a_process_knows_nothing_of_the_servers_environment_and_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    process = start_process(chat_template.__name__, "serve")
    try:
        assert process_pool.ask(process, ["a", CHAT, {}]) == {"text": "a"}
        assert b"secret" not in Path(f"/proc/{process.pid}/environ").read_bytes()
        assert os.getsid(process.pid) == process.pid
        time.sleep(1.2)
        assert process.poll() is None, "the clock of a rendering goes on after it"
    finally:
        end_process(process)
