"""Several answers to a prompt, prompts that come back with their log-probabilities, and vLLM's fields of answers."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import openai
import pytest
import torch
from lorarep.v1 import generation_pb2 as pb
from lorarep_server.api.openai_choices import Answer, best
from lorarep_server.api.openai_requests import CompletionRequest

from tests.support.callers import request
from tests.support.models import reference, reference_logits, stack_of
from tests.support.servers import Server
from tests.support.world import ADAPTERS, World

TOKENS = [(37 * i) % 250 for i in range(40)]
CHAT: list[Any] = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Well"}]


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    """A client of the server. After each test the server holds nothing."""
    with server.openai() as client:
        yield client
    server.wait_idle()


@pytest.fixture(scope="module")
def scores(world: World) -> torch.Tensor:
    """Log-probabilities (tokens, vocab) of TOKENS with the adapter lora, by `transformers` and PEFT."""
    stack = stack_of(ADAPTERS["lora"]["layer_replication"])
    return reference_logits(reference(world.base, world.adapters["lora"], stack), TOKENS).log_softmax(-1)


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_n_answers_are_those_of_as_many_seeds_and_compute_the_prompt_once(
    server: Server, client: openai.OpenAI, chat: bool, stream: bool
) -> None:
    made: Any = client.chat.completions.create if chat else client.completions.create
    text = f"a prompt of its own {chat} {stream}" * 2
    prompt = dict(messages=[{"role": "user", "content": text}]) if chat else dict(prompt=[text, "another"])
    asked: dict[str, Any] = dict(model="dora", max_tokens=6, seed=5, temperature=2.0, extra_body=dict(ignore_eos=True))

    def texts(**more: Any) -> list[str]:
        answer = made(**{**asked, **prompt, **more})
        return [c.message.content if chat else c.text for c in sorted(answer.choices, key=lambda c: c.index)]

    before = server.metrics()
    if stream:
        *chunks, last = made(**asked, **prompt, n=3, stream=True, stream_options={"include_usage": True})
        got: dict[int, str] = {}
        for part in (chunk.choices[0] for chunk in chunks):
            got[part.index] = got.get(part.index, "") + ((part.delta.content or "") if chat else part.text)
        several, usage = [got[index] for index in sorted(got)], last.usage
    else:
        whole = made(**asked, **prompt, n=3)
        several, usage = [c.message.content if chat else c.text for c in whole.choices], whole.usage
    computed = server.metrics()["lorarep_prefix_cache_hits_total"] - before["lorarep_prefix_cache_hits_total"]
    alone = [texts(seed=5 + choice) for choice in range(3)]
    assert several == [one[i] for i in range(len(alone[0])) for one in alone]
    assert len(set(several)) > 1
    assert usage.completion_tokens == 6 * len(several)
    assert usage.prompt_tokens == made(**asked, **prompt).usage.prompt_tokens
    # All full pages of the long prompt, found by two answers.
    assert computed >= 2 * (len(text) - 16)


def test_the_best_are_the_likeliest_by_their_mean(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = dict(model="lora", prompt="x", max_tokens=5, seed=1, temperature=2.0, logprobs=0)
    eight = client.completions.create(**asked, n=8)
    two = client.completions.create(**asked, n=2, best_of=8)
    shown = sorted(eight.choices, key=lambda c: -sum(c.logprobs.token_logprobs) / len(c.logprobs.tokens))[:2]
    assert [choice.text for choice in two.choices] == [choice.text for choice in shown]
    assert [choice.index for choice in two.choices] == [0, 1]
    assert two.usage == eight.usage
    asked.pop("logprobs")
    assert [c.logprobs for c in client.completions.create(**asked, n=1, best_of=3).choices] == [None]
    for wrong in (dict(n=2, best_of=1), dict(best_of=2, stream=True)):
        with pytest.raises(openai.BadRequestError, match="best_of"):
            client.completions.create(**asked, **wrong)
    # Of each prompt its own.
    asked_for = CompletionRequest(model="x", prompt=["a", "b"], n=1, best_of=2)
    answers = [
        Answer(None, None, {"text": text}, likelihood)
        for text, likelihood in zip("abcd", (-2, -1, -3, -4), strict=True)
    ]
    assert [(choice["index"], choice["text"]) for choice in best(asked_for, answers)] == [(0, "b"), (1, "c")]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("new_tokens", [0, 3])
def test_a_prompt_comes_back_with_the_log_probabilities_of_transformers(
    client: openai.OpenAI, scores: torch.Tensor, new_tokens: int, stream: bool
) -> None:
    asked: dict[str, Any] = dict(model="lora", prompt=TOKENS, echo=True, logprobs=2, temperature=0, stream=stream)
    asked |= dict(max_tokens=new_tokens, extra_body=dict(ignore_eos=True))
    answer = client.completions.create(**asked)
    text, tokens, logprobs, tops, offsets = "", [], [], [], []
    for part in answer if stream else [answer]:
        text += part.choices[0].text
        if (of_part := part.choices[0].logprobs) is not None:
            tokens += of_part.tokens
            logprobs += of_part.token_logprobs
            tops += of_part.top_logprobs
            offsets += of_part.text_offset
    assert len(tokens) == len(logprobs) == len(tops) == len(offsets) == len(TOKENS) + new_tokens
    assert (logprobs[0], tops[0]) == (None, None)
    expected = [scores[i, token].item() for i, token in enumerate(TOKENS[1:])]
    assert logprobs[1 : len(TOKENS)] == pytest.approx(expected, abs=1e-4)
    for top, row in zip(tops[1 : len(TOKENS)], scores, strict=False):
        assert max(top.values()) == pytest.approx(row.max().item(), abs=1e-4)
    assert offsets == sorted(offsets)
    for at, token in zip(offsets, tokens, strict=True):  # half a character goes before
        assert text[at:].lstrip("\ufffd").startswith(token.lstrip("\ufffd"))
    if not stream:
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(TOKENS), new_tokens)


def test_a_text_comes_back_as_it_was(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = dict(model="lora", max_tokens=2, temperature=0, extra_body=dict(ignore_eos=True))
    prompts = ["Größe 🦜", "x"]
    plain = client.completions.create(**asked, prompt=prompts)
    echoed = client.completions.create(**asked, prompt=prompts, echo=True, n=2)
    texts = [prompt + choice.text for prompt, choice in zip(prompts, plain.choices, strict=True) for _ in range(2)]
    assert [choice.text for choice in echoed.choices] == texts


@pytest.mark.parametrize("chat", [False, True])
def test_prompt_logprobs_are_as_vllm_has_them(client: openai.OpenAI, scores: torch.Tensor, chat: bool) -> None:
    extra: dict[str, Any] = dict(prompt_logprobs=2, return_token_ids=True)
    if chat:
        answer: Any = client.chat.completions.create(model="dora", messages=CHAT, max_tokens=2, extra_body=extra)
        where, choices = answer, answer.choices
    else:
        answer = client.completions.create(model="lora", prompt=TOKENS, max_tokens=2, n=2, extra_body=extra)
        where, choices = answer.choices[1], answer.choices
        assert answer.choices[0].prompt_logprobs == where.prompt_logprobs
        for row, token, place in zip(scores, TOKENS[1:], where.prompt_logprobs[1:], strict=False):
            assert place[str(token)]["logprob"] == pytest.approx(row[token].item(), abs=1e-4)
            assert {one["rank"] for one in place.values()} >= {1, 2}
    assert where.prompt_logprobs[0] is None
    assert len(where.prompt_logprobs) == len(where.prompt_token_ids) == answer.usage.prompt_tokens
    for token, place in zip(where.prompt_token_ids[1:], where.prompt_logprobs[1:], strict=True):
        assert place[str(token)].keys() == {"logprob", "rank", "decoded_token"}
    assert sum(len(choice.token_ids) for choice in choices) == answer.usage.completion_tokens
    many = dict(prompt=[TOKENS * 10] * 9, n=4)  # more of them than one prompt may have
    for asked, field in (
        (dict(stream=True, extra_body=dict(prompt_logprobs=1)), "prompt_logprobs"),
        (dict(extra_body=dict(prompt_logprobs=20), **many), "prompt_logprobs"),
        (dict(echo=True, logprobs=20, **many), "logprobs"),
    ):
        with pytest.raises(openai.BadRequestError) as error:
            client.completions.create(**{"model": "lora", "prompt": "x", "max_tokens": 2, **asked})
        assert error.value.param == field


def test_adapters_by_name_and_weight_are_those_of_grpc(server: Server, client: openai.OpenAI) -> None:
    def text(model: str, *adapters: dict[str, Any]) -> str:
        extra = dict(ignore_eos=True, adapters=list(adapters))
        return (
            client.completions.create(model=model, prompt="xyz", max_tokens=9, temperature=0, extra_body=extra)
            .choices[0]
            .text
        )

    for model, stack in (("base", {}), ("org/base", {}), ("deep", {"stack": "deep"})):
        if stack:
            continue
        refs = [pb.AdapterRef(name="lora", weight=0.5)]
        expected = server.generation.Generate(request("xyz", adapters=refs, new_tokens=9)).text
        assert text(model, {"name": "lora", "weight": 0.5}) == expected != text("lora")
    assert text("base", {"name": "lora"}) == text("lora")


def test_what_stopped_an_answer_is_in_it_where_it_is_wanted(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = dict(model="lora", prompt="xyz", max_tokens=30, temperature=2.0, seed=3)
    letters: dict[str, Any] = dict(ignore_eos=True, allowed_token_ids=list(range(64, 90)), return_token_ids=True)

    def choice(stream: bool = False, stop: str = "", **extra: Any) -> tuple[str, Any]:
        answer: Any = client.completions.create(**asked, stop=stop, stream=stream, extra_body={**letters, **extra})
        parts = [part.choices[0] for part in answer] if stream else [answer.choices[0]]
        return "".join(part.text for part in parts), [token for part in parts for token in part.token_ids]

    whole, tokens = choice()
    assert len(whole) == len(tokens) == 30
    for stream in (False, True):
        stop = whole[5:8]
        at = whole.index(stop)
        assert choice(stream, stop)[0] == whole[:at]
        assert choice(stream, stop, include_stop_str_in_output=True)[0] == whole[: at + 3]
        at = tokens.index(tokens[7])
        last = dict(stop_token_ids=[tokens[7]])
        assert choice(stream, **last) == (whole[:at], tokens[: at + 1])
        assert choice(stream, **last, include_stop_str_in_output=True) == (whole[: at + 1], tokens[: at + 1])


def test_special_tokens_and_ids_are_shown_where_they_are_wanted(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = dict(
        model="base", prompt="x", max_tokens=3, temperature=0, logit_bias={"257": 100}, logprobs=1
    )
    extra: dict[str, Any] = dict(return_tokens_as_token_ids=True)
    plain, shown = (
        client.completions.create(**asked, extra_body=extra | dict(skip_special_tokens=skip)).choices[0]
        for skip in (True, False)
    )
    assert (plain.text, shown.text) == ("", "<s><s><s>")
    assert plain.logprobs.tokens == ["token_id:257"] * 3
    assert all(name.startswith("token_id:") for top in plain.logprobs.top_logprobs for name in top)


def test_each_chunk_may_have_the_usage_so_far(client: openai.OpenAI) -> None:
    options: Any = {"include_usage": True, "continuous_usage_stats": True}
    asked: dict[str, Any] = dict(model="dora", messages=CHAT, max_tokens=5, extra_body=dict(ignore_eos=True))
    *chunks, last = client.chat.completions.create(**asked, stream=True, stream_options=options)
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert (counts[0], counts[-1], last.usage.completion_tokens) == (0, 5, 5)
    assert all(one <= other for one, other in pairwise(counts))
    assert {chunk.usage.prompt_tokens for chunk in chunks} == {last.usage.prompt_tokens}


def test_a_conversation_is_continued_as_transformers_writes_it(server: Server, client: openai.OpenAI) -> None:
    def prompt(**extra: Any) -> list[int]:
        asked = dict(extra, return_token_ids=True)
        answer: Any = client.chat.completions.create(model="dora", messages=CHAT, max_tokens=1, extra_body=asked)
        return answer.prompt_token_ids

    def tokens(text: str) -> list[int]:
        return list(server.generation.Tokenize(pb.TokenizeRequest(prompt=pb.Prompt(text=text))).token_ids)

    assert prompt() == prompt(add_generation_prompt=False) == tokens("user: hi\nassistant: Well\n")
    assert prompt(continue_final_message=True) == tokens("user: hi\nassistant: Well")
    assert prompt(reasoning_effort="high") == prompt()
