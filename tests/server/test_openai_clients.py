"""What OpenAI's clients, and those of vLLM, send and look for."""

from __future__ import annotations

import asyncio
import json
import math
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import openai
import pytest
import tokenizers
from lorarep.v1 import generation_pb2 as pb
from lorarep_server.api.openai_choices import send, stream_choice
from lorarep_server.api.openai_errors import json_response
from lorarep_server.api.openai_requests import ChatRequest, CompletionRequest, GenerationRequest
from lorarep_server.api.openai_responses import ChatResponse, CompletionResponse, Identity
from lorarep_server.requests import messages
from lorarep_server.requests.event_stream import EventStream
from tokenizers import models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lorarep_runtime.errors import InvalidArgument
from lorarep_runtime.request import Finished, FinishReason, Output, Timings, TokenLogprob
from lorarep_runtime.text.tokenizer import Tokenizer
from tests.support.callers import request
from tests.support.models import save_tokenizer
from tests.support.servers import SECONDS, Server

CHAT: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
COMPLETION: dict[str, Any] = dict(model="lora", prompt="x", max_tokens=4)
CONVERSATION: dict[str, Any] = dict(model="dora", messages=CHAT, max_tokens=4)
FINISHED = Finished(FinishReason.LENGTH, 1, 1, Timings(0, 0, 0))
IMAGE = [{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {"url": "x"}}]


def post(server: Server, path: str, body: Any) -> tuple[int, Any]:
    """The status and the JSON of a response."""
    url, headers = f"http://127.0.0.1:{server.openai_port}/v1/{path}", {"Content-Type": "application/json"}
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url, json.dumps(body).encode(), headers), timeout=SECONDS
        ) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        with error as response:
            return response.code, json.loads(response.read())


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("completions", dict(model="lora", prompt="x" * 600), "prompt"),
        ("completions", dict(model="lora", prompt="x" * 512), "prompt"),
        ("completions", dict(model="lora", prompt=[5] * 600, max_tokens=4), "prompt"),
        ("completions", dict(model="lora", prompt="x" * 5000), "prompt"),
        ("completions", dict(model="lora", prompt="x" * 400, max_tokens=200), "max_tokens"),
        ("completions", dict(model="lora", prompt="x" * 400_000), "body"),
        ("chat/completions", dict(model="dora", messages=[{"role": "user", "content": "x" * 600}]), "messages"),
        ("chat/completions", dict(model="dora", messages=[{"role": "user", "content": "x" * 5000}]), "messages"),
        ("chat/completions", dict(model="dora", messages=CHAT, max_completion_tokens=511), "max_completion_tokens"),
    ],
)
def test_what_is_too_long_has_the_code_that_clients_look_for(
    server: Server, path: str, body: dict[str, Any], param: str
) -> None:
    status, told = post(server, path, body)
    assert status == 400
    assert (told["error"]["code"], told["error"]["param"]) == ("context_length_exceeded", param), told


@pytest.mark.parametrize("prompt", [["x" * 500] * 800, [[5, 6] * 100] * 800], ids=["texts", "tokens"])
def test_a_list_that_is_too_long_is_told_apart_from_a_prompt_that_is(server: Server, prompt: list[Any]) -> None:
    """Shorter prompts would not help its client: fewer at a time do."""
    status, told = post(server, "completions", dict(model="lora", max_tokens=1, prompt=prompt))
    assert (status, told["error"]["code"], told["error"]["param"]) == (400, None, "prompt"), told
    assert "for all prompts of a list together" in told["error"]["message"]


def test_other_fields_that_are_wrong_are_not_too_long(server: Server) -> None:
    assert post(server, "completions", COMPLETION | dict(top_p=2))[1]["error"]["code"] is None


def test_a_part_that_is_no_text_is_named(server: Server) -> None:
    status, told = post(server, "chat/completions", CONVERSATION | dict(messages=[{"role": "user", "content": IMAGE}]))
    assert (status, told["error"]["param"]) == (400, "messages.0.content.1")
    assert told["error"]["message"] == "messages.0.content.1: a part of type 'image_url': only text is supported"
    _, told = post(server, "chat/completions", CONVERSATION | dict(messages=[{"role": "user", "content": 5}]))
    assert told["error"]["message"] == "messages.0.content: Input should be a valid string"


def test_what_was_cached_is_told_and_a_salt_keeps_it_apart(server: Server) -> None:
    """By both APIs, which share what they have computed."""
    before = server.metrics()
    prompt = list(range(30, 70))
    asked: dict[str, Any] = dict(model="dora", prompt=prompt, max_tokens=2)
    salted = dict(extra_body=dict(cache_salt="mine"))
    with server.openai() as client:
        told = [client.completions.create(**asked, **extra).usage for extra in ({}, {}, salted, salted)]
        *_, last = client.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    cached = [usage.prompt_tokens_details.cached_tokens for usage in [*told, last.usage]]
    assert cached == [0, 32, 0, 32, 32]
    answers = [server.generation.Generate(request(prompt, "dora", cache_salt=salt)) for salt in ("", "mine", "yours")]
    assert [answer.usage.cached_tokens for answer in answers] == [32, 32, 0]
    after = server.metrics()
    more = [
        after[f"lorarep_prefix_cache_{name}_total"] - before[f"lorarep_prefix_cache_{name}_total"]
        for name in ("queries", "hits")
    ]
    assert more == [8 * 40, 5 * 32]
    for salt in ("", "s" * 257):
        status, refusal = post(server, "completions", asked | dict(cache_salt=salt))
        assert (status, refusal["error"]["param"]) == (400, "cache_salt")


@pytest.mark.parametrize("prompts", [["a", "bb", "", "a"], [[64], [65, 65]]], ids=["texts", "tokens"])
def test_prompts_of_a_list_are_answered_in_order(server: Server, prompts: list[Any]) -> None:
    asked: dict[str, Any] = dict(model="lora", max_tokens=8, seed=3, extra_body=dict(ignore_eos=True))
    prompts = [prompt for prompt in prompts if prompt]
    with server.openai() as client:
        alone = [client.completions.create(prompt=prompt, **asked) for prompt in prompts]
        whole = client.completions.create(prompt=prompts, **asked)
        *chunks, last = client.completions.create(
            prompt=prompts, stream=True, stream_options={"include_usage": True}, **asked
        )
    choices = [each.choices[0].model_copy(update={"index": i}) for i, each in enumerate(alone)]
    assert whole.choices == choices
    assert last.usage == whole.usage
    assert whole.usage.prompt_tokens == sum(map(len, prompts))
    assert whole.usage.completion_tokens == 8 * len(prompts)
    assert {chunk.id for chunk in chunks} == {last.id}
    for choice in choices:
        own = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == choice.index]
        assert "".join(part.text for part in own) == choice.text
        assert [part.finish_reason for part in own] == [None] * (len(own) - 1) + ["length"]
    server.wait_idle()


@pytest.mark.parametrize("stream", [True, False])
def test_a_prompt_that_is_refused_ends_the_others_of_its_list(server: Server, stream: bool) -> None:
    body = dict(model="lora", prompt=["x", "x" * 600], max_tokens=400, stream=stream)
    got, told = post(server, "completions", body)
    assert (got, told["error"]["code"]) == (400, "context_length_exceeded")
    server.wait_idle()
    got, told = post(server, "completions", dict(model="lora", prompt=["x"] * 1025))
    assert (got, told["error"]["param"]) == (400, "prompt")


@pytest.mark.usefixtures("slow_steps")
def test_a_client_that_leaves_a_list_gives_its_pages_back(server: Server) -> None:
    with server.openai(timeout=0.5) as client, pytest.raises(openai.APITimeoutError):
        client.completions.create(model="lora", prompt=["x", "y"], max_tokens=500, extra_body=dict(ignore_eos=True))
    server.wait_idle()


def test_what_answers_said_of_themselves_may_come_back(server: Server) -> None:
    """Histories have messages as OpenAI's client wrote them."""
    called = {"role": "assistant", "content": None, "refusal": None, "annotations": [], "audio": None, "tool_calls": []}
    for sent, plain in (
        ([CHAT[1], called], [CHAT[1], {"role": "assistant", "content": ""}]),
        ([CHAT[1], {"role": "assistant"}], [CHAT[1], {"role": "assistant", "content": ""}]),
        ([{**CHAT[1], "name": "Ann", "tool_calls": None}], [CHAT[1]]),  # a template that reads no name
    ):
        asked = CONVERSATION | dict(temperature=0)
        _, answer = post(server, "chat/completions", asked | dict(messages=sent))
        _, expected = post(server, "chat/completions", asked | dict(messages=plain))
        assert answer["choices"] == expected["choices"], answer


@pytest.mark.parametrize("trusted", [True, False])
def test_templates_get_names_and_arguments(tmp_path: Path, trusted: bool) -> None:
    save_tokenizer(tmp_path)
    template = "{{ messages[0].name }} {{ messages[1].name is defined }} {{ think }} {{ most }} {{ deep.list }}"
    tokenizer = Tokenizer(tmp_path).with_chat_template(template, trusted=trusted)
    arguments = {"think": False, "most": 3, "deep": {"list": [1.5, None, "x", 2]}}
    named: list[Any] = [{**CHAT[0], "name": "Ann"}, CHAT[1]]
    asked = ChatRequest(model="base", messages=named, chat_template_kwargs=arguments)
    tokens = messages.prompt_tokens(asked.to_prompts()[0], tokenizer, max_tokens=512)
    assert tokenizer.decode(tokens) == "Ann False False 3 [1.5, None, 'x', 2]"
    for taken in ("messages", "tools", "eos_token", "tokenize"):
        asked = ChatRequest(model="base", messages=CHAT, chat_template_kwargs={taken: "x"})
        with pytest.raises(InvalidArgument, match=taken):
            messages.prompt_tokens(asked.to_prompts()[0], tokenizer, max_tokens=512)


@pytest.mark.parametrize("adds", [True, False])
def test_special_tokens_and_the_ends_of_prompts_are_those_of_transformers(tmp_path: Path, adds: bool) -> None:
    save_tokenizer(tmp_path)
    own = AutoTokenizer.from_pretrained(tmp_path)
    begin = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 257)])
    own.backend_tokenizer.post_processor = begin
    own.save_pretrained(tmp_path)
    tokenizer, text = Tokenizer(tmp_path), "Größe</s>x"
    whole = own.encode(text, add_special_tokens=adds)
    assert (whole[0] == 257) is adds
    asked = CompletionRequest(**COMPLETION | dict(prompt=[text]), add_special_tokens=adds, truncate_prompt_tokens=4)
    prompt = asked.to_prompts()[0]
    assert messages.prompt_tokens(prompt, tokenizer, 512) == tuple(whole)
    own.truncation_side = "left"
    cut = own.encode(text, add_special_tokens=adds, truncation=True, max_length=asked.longest_prompt)
    assert messages.prompt_tokens(prompt, tokenizer, 512, asked.longest_prompt) == tuple(cut)
    numbers = CompletionRequest(**COMPLETION | dict(prompt=[5, 6, 7]), truncate_prompt_tokens=2)
    assert generate(numbers).prompt.token_ids.ids == [6, 7]


def test_bad_words_do_not_come(server: Server) -> None:
    x, y = server.generation.Tokenize(pb.TokenizeRequest(prompt=pb.Prompt(text="xy"))).token_ids
    asked = COMPLETION | dict(prompt="yy", max_tokens=6, temperature=0, logit_bias={x: 90, y: 100})
    for words, text in (([], "yyyyyy"), (["y"], "xxxxxx"), (["yy"], "yxyxyx"), ([" yyy", "xyx"], "yyxyyx")):
        _, told = post(server, "completions", asked | dict(bad_words=words))
        assert told["choices"][0]["text"] == text
    wrong: list[dict[str, Any]] = [dict(bad_words=words) for words in ([""], ["y" * 33], ["y" * 1025], ["y"] * 1025)]
    wrong += [dict(bad_words=["y"]) | more for more in (dict(guided_regex="y"), dict(allowed_token_ids=[x]))]
    for fields in wrong:
        status, told = post(server, "completions", COMPLETION | fields)
        assert (status, told["error"]["param"]) == (400, "bad_words"), told


def test_a_bad_word_after_a_space_is_another_as_in_vllm(tmp_path: Path) -> None:
    """If it begins with another token, and has as many."""
    vocab = {token: number for number, token in enumerate(("x", "y", "Ġ", "Ġy", "xx", "Ġx"))}
    own = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[("Ġ", "y"), ("x", "x"), ("Ġ", "x")]))
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=own).save_pretrained(tmp_path)
    words = messages.bad_words(pb.Sampling(bad_words=["y", " yx", "xx", "  xy"]), Tokenizer(tmp_path))
    # vLLM's: [y], [Ġy]; [y, x], [Ġy, x]; [xx] but not [Ġ, xx]; [x, y], [Ġx, y].
    assert words == ((1,), (3,), (1, 0), (3, 0), (4,), (0, 1), (5, 1))


def generate(request: GenerationRequest) -> pb.GenerateRequest:
    (prompt,) = request.to_prompts()
    return request.to_generate(prompt)


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        (dict(top_p=0), dict(top_k=1)),
        (dict(seed=-1), {}),
        (dict(seed=-(1 << 63)), dict(seed=0)),
        (dict(seed=-2), dict(seed=(1 << 63) - 2)),
        (dict(seed=5, top_p=0.5, top_k=-1), dict(seed=5, top_p=0.5)),
    ],
)
def test_values_at_the_ends_of_their_ranges_mean_what_clients_mean(
    sent: dict[str, Any], expected: dict[str, Any]
) -> None:
    sampling = generate(CompletionRequest(**COMPLETION, **sent)).sampling
    assert {field.name: value for field, value in sampling.ListFields()} == {"temperature": 1.0, **expected} | (
        {} if "top_k" in expected else {"top_k": 0}
    )


@pytest.mark.parametrize(
    "neutral",
    [
        dict(bad_words=[], use_beam_search=False, skip_special_tokens=True, include_stop_str_in_output=False),
        dict(return_token_ids=False, return_tokens_as_token_ids=False, priority=0, prompt_logprobs=None),
        dict(unheard_of=None, guided_json={}, mm_processor_kwargs={}, kv_transfer_params="", truncation="auto"),
        dict(length_penalty=0.5, early_stopping=False, spaces_between_special_tokens=False, request_id="x"),
        dict(n=1, adapters=[], allowed_token_ids=[], stop="", stream_options={"include_usage": False}),
        dict(user="me", store=True, metadata={"run": "5"}, service_tier="flex"),
        dict(
            safety_identifier="me", prompt_cache_key="mine", stream=True, stream_options={"include_obfuscation": False}
        ),
    ],
)
def test_what_says_what_is_done_anyway_is_taken(neutral: dict[str, Any]) -> None:
    plain = generate(CompletionRequest(**COMPLETION))
    assert generate(CompletionRequest(**COMPLETION, **neutral)) == plain
    chat = dict(functions=[], function_call="none", verbosity="medium", documents=[], echo=False)
    chat |= dict(add_generation_prompt=True, continue_final_message=False, add_special_tokens=False)
    assert generate(ChatRequest(**CONVERSATION, **neutral, **chat)) == generate(ChatRequest(**CONVERSATION))


@pytest.mark.parametrize("chat", [True, False])
def test_json_has_no_nan_and_no_infinity(tmp_path: Path, chat: bool) -> None:
    save_tokenizer(tmp_path)
    kind, builder = (ChatRequest, ChatResponse) if chat else (CompletionRequest, CompletionResponse)
    asked = kind(**(CONVERSATION | dict(logprobs=True, top_logprobs=2) if chat else COMPLETION | dict(logprobs=2)))
    # A vocabulary may have tokens that never come.
    place = TokenLogprob(65, -math.inf, 1, ((66, 0.0), (67, -math.inf)))
    response = builder(asked, Tokenizer(tmp_path), Identity())
    sent = json_response(response.whole([response.choice([Output((65,), "a", (place,))], FINISHED)], [FINISHED])).text
    assert "-9999" in sent
    json.loads(sent, parse_constant=pytest.fail)
    nan = TokenLogprob(65, math.nan, 1)
    with pytest.raises(ValueError, match="JSON"):
        json_response(response.whole([response.choice([Output((65,), "a", (nan,))], FINISHED)], [FINISHED]))
    with pytest.raises(ValueError, match="JSON"):
        asyncio.run(send(Sent(), {"logprob": math.nan}))


class Sent:
    """What was written to a stream."""

    def __init__(self) -> None:
        self.chunks: list[Any] = []
        self.has_two = asyncio.Event()

    async def write(self, data: bytes) -> None:
        self.chunks.append(json.loads(data.removeprefix(b"data: "))["choices"][0])
        if len(self.chunks) == 2:
            self.has_two.set()


def test_the_role_comes_with_the_first_token_and_not_before() -> None:
    asyncio.run(role_and_first_token())


async def role_and_first_token() -> None:
    sent, events = Sent(), EventStream(max_unread=10, patience=60)
    response = ChatResponse(ChatRequest(model="base", messages=[]), None, Identity())
    streaming = asyncio.create_task(stream_choice(sent, response, events))
    for _ in range(10):
        await asyncio.sleep(0.001)
    assert sent.chunks == []
    events.put(Output((5,), "a"))
    await sent.has_two.wait()
    role, first = (chunk["delta"] for chunk in sent.chunks)
    assert (role, first) == ({"role": "assistant", "content": ""}, {"content": "a"})
    events.put(FINISHED)
    await streaming
    assert [chunk["finish_reason"] for chunk in sent.chunks[2:]] == ["length"]
