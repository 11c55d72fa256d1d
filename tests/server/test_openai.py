"""OpenAI's API, called by OpenAI's own client."""

from __future__ import annotations

import json
import re
import signal
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from grpc_health.v1 import health_pb2
from lorarep.v1 import generation_pb2 as pb
from lorarep_server.api.openai_requests import ChatRequest, CompletionRequest, GenerationRequest
from pydantic import ValidationError

from tests.support.callers import health, request, stream
from tests.support.servers import SECONDS, Server, serving, wait_for
from tests.support.world import World

PROMPT = "The capital of France"
SAMPLED: dict[str, Any] = dict(temperature=0.9, top_p=0.95, seed=7, presence_penalty=0.5, frequency_penalty=0.25)
VLLM: dict[str, Any] = dict(top_k=40, min_p=0.01, repetition_penalty=1.1)
FOREVER: dict[str, Any] = dict(extra_body=dict(ignore_eos=True))
CHAT: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    """A client of the server. After each test the server holds nothing."""
    with server.openai() as client:
        yield client
    server.wait_idle()


def over_grpc(server: Server, wanted: pb.GenerateRequest) -> tuple[str, int]:
    """The text and the number of tokens of a stream."""
    chunks = [message.chunk for message in stream(server, wanted)]
    return "".join(chunk.text for chunk in chunks), sum(len(chunk.token_ids) for chunk in chunks)


def test_adapters_of_different_stacks_stream_at_once_what_grpc_streams(server: Server, client: openai.OpenAI) -> None:
    targets: dict[str, dict[str, Any]] = {
        "lora": dict(adapters=[pb.AdapterRef(name="lora")]),
        "dora": dict(adapters=[pb.AdapterRef(name="dora")]),
        "deep": dict(stack="deep"),
        "org/base": {},
        "org/plain": dict(adapters=[pb.AdapterRef(name="org/plain")]),  # loaded on demand
    }
    greedy = dict(temperature=0.0)

    def streamed(model: str, sampling: dict[str, Any]) -> tuple[str, int]:
        *parts, last = client.completions.create(
            model=model,
            prompt=PROMPT,
            max_tokens=40,
            stream=True,
            stream_options={"include_usage": True},
            extra_body=dict(ignore_eos=True, **(VLLM if sampling is SAMPLED else {})),
            **sampling,
        )
        assert {part.usage for part in parts} == {None}
        assert (parts[-1].choices[0].finish_reason, last.choices) == ("length", [])
        assert last.usage.prompt_tokens == len(PROMPT)
        assert {(part.id, part.model, part.object) for part in parts} == {(last.id, model, "text_completion")}
        return "".join(part.choices[0].text for part in parts), last.usage.completion_tokens

    asked = [(model, sampling) for model in targets for sampling in (greedy, SAMPLED)]
    with ThreadPoolExecutor(len(asked)) as threads:
        answers = list(threads.map(lambda each: streamed(*each), asked))
    for (model, sampling), answer in zip(asked, answers, strict=True):
        fields = SAMPLED | VLLM if sampling is SAMPLED else greedy
        wanted = request(PROMPT, new_tokens=40, **{"sampling": pb.Sampling(**fields), **targets[model]})
        assert answer == over_grpc(server, wanted), (model, sampling)
        assert answer[1] == 40
    assert len({text for text, _ in answers}) == len(answers)


def test_chat(server: Server, client: openai.OpenAI) -> None:
    asked: dict[str, Any] = dict(model="dora", messages=CHAT, max_completion_tokens=30, temperature=0)
    whole = client.chat.completions.create(**asked)
    chat = pb.Chat(messages=[pb.ChatMessage(**message) for message in CHAT])
    wanted = request("", "dora", prompt=pb.Prompt(chat=chat), stopping=pb.Stopping(max_new_tokens=30))
    expected = server.generation.Generate(wanted)
    (choice,) = whole.choices
    assert (choice.message.role, choice.message.content) == ("assistant", expected.text)
    assert choice.finish_reason == ("length" if expected.finish_reason == pb.FINISH_REASON_LENGTH else "stop")
    used = expected.usage.prompt_tokens, expected.usage.completion_tokens
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens, whole.usage.total_tokens) == (*used, sum(used))
    asked["messages"] = [{"role": "system", "content": [{"type": "text", "text": "Be brief."}]}, CHAT[1]]
    first, *rest = client.chat.completions.create(**asked, stream=True)
    assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
    assert "".join(chunk.choices[0].delta.content or "" for chunk in rest) == expected.text
    assert [chunk.choices[0].finish_reason for chunk in rest] == [None] * (len(rest) - 1) + [choice.finish_reason]


def test_a_length_that_is_unset_is_that_of_openai(client: openai.OpenAI) -> None:
    completion = client.completions.create(model="lora", prompt=PROMPT, **FOREVER)
    assert completion.usage.completion_tokens == 16
    chat = client.chat.completions.create(model="dora", messages=CHAT, **FOREVER)
    assert chat.usage.total_tokens == 512


def test_logprobs_are_those_of_grpc(server: Server, client: openai.OpenAI) -> None:
    expected = server.generation.Generate(request(PROMPT, "lora", new_tokens=6, logprobs=2))
    texts = [place.text for place in expected.logprobs]
    asked: dict[str, Any] = dict(model="lora", prompt=PROMPT, max_tokens=6, temperature=0, logprobs=2, **FOREVER)
    found = client.completions.create(**asked).choices[0].logprobs
    assert found.tokens == texts
    assert found.token_logprobs == pytest.approx([place.logprob for place in expected.logprobs], abs=1e-5)
    for top, place in zip(found.top_logprobs, expected.logprobs, strict=True):
        assert top == pytest.approx({other.text: other.logprob for other in reversed(place.top)}, abs=1e-5)
    streamed = [part.choices[0].logprobs for part in client.completions.create(**asked, stream=True)]
    assert [token for part in streamed if part for token in part.tokens] == texts
    assert [at for part in streamed if part for at in part.text_offset] == found.text_offset
    chat: dict[str, Any] = dict(model="dora", messages=CHAT, max_tokens=4, temperature=0, logprobs=True)
    places = client.chat.completions.create(**chat, top_logprobs=3).choices[0].logprobs.content
    for place in places:
        assert (len(place.top_logprobs), place.top_logprobs[0].logprob) == (3, place.logprob)
        assert place.bytes is None or bytes(place.bytes).decode() == place.token
    assert client.chat.completions.create(**chat).choices[0].logprobs.content[0].top_logprobs == []


def test_a_stop_ends_an_answer_and_is_not_in_it(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = dict(model="lora", prompt=PROMPT, max_tokens=60, temperature=0)
    text = client.completions.create(**asked, **FOREVER).choices[0].text
    stop = text[10:13]
    for given in (stop, ["never that", stop]):
        choice = client.completions.create(**asked, stop=given, **FOREVER).choices[0]
        assert (choice.text, choice.finish_reason) == (text[: text.index(stop)], "stop")
    late = client.completions.create(**asked, stop=stop, extra_body=dict(ignore_eos=True, min_tokens=60))
    assert late.usage.completion_tokens == 60


def test_a_prompt_may_be_tokens_or_the_one_of_a_list(client: openai.OpenAI) -> None:
    def text(prompt: Any) -> str:
        return client.completions.create(model="lora", prompt=prompt, max_tokens=8, temperature=0).choices[0].text

    assert text("Aa") == text(["Aa"])
    assert text([32, 64]) == text([[32, 64]]) == text("Aa")


def test_models_are_base_stacks_and_adapters(client: openai.OpenAI) -> None:
    models = {model.id: model for model in client.models.list()}
    assert models.keys() >= {"org/base", "base", "deep", "lora", "dora"}
    assert client.models.retrieve("org/base") == models["org/base"]
    assert models["dora"].to_dict() | {"root": "org/dora", "parent": "org/base"} == models["dora"].to_dict()
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("absent")


COMPLETION: dict[str, Any] = dict(model="lora", prompt="x", max_tokens=4)
CONVERSATION: dict[str, Any] = dict(model="dora", messages=CHAT, max_tokens=4)


def nested(depth: int) -> dict[str, Any]:
    """An object in an object, and so on."""
    return {"x": nested(depth - 1)} if depth > 1 else {}


def test_arguments_of_templates_may_be_nested(client: openai.OpenAI) -> None:
    client.chat.completions.create(
        model="dora", messages=CHAT, max_tokens=1, extra_body=dict(chat_template_kwargs=nested(16))
    )


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("completions", COMPLETION | dict(model="absent"), 404, "model"),
        ("completions", COMPLETION | dict(model="other/lora"), 403, "model"),
        ("completions", COMPLETION | dict(unheard_of=1), 400, "unheard_of"),
        ("completions", COMPLETION | dict(model=None), 400, "model"),
        ("completions", COMPLETION | dict(prompt=["a", [1]]), 400, "prompt"),
        ("completions", COMPLETION | dict(prompt=[]), 400, "prompt"),
        ("completions", COMPLETION | dict(prompt=[1, 272]), 400, "prompt"),
        ("completions", COMPLETION | dict(prompt=[-1]), 400, "prompt"),
        ("completions", COMPLETION | dict(prompt={}), 400, "prompt"),
        ("completions", COMPLETION | dict(n=0), 400, "n"),
        ("completions", COMPLETION | dict(n=129), 400, "n"),
        ("completions", COMPLETION | dict(n=2, best_of=1), 400, "best_of"),
        ("completions", COMPLETION | dict(suffix="x"), 400, "suffix"),
        ("completions", COMPLETION | dict(logit_bias={"5": 101}), 400, "logit_bias"),
        ("completions", COMPLETION | dict(logit_bias={"272": 1}), 400, "logit_bias"),
        ("completions", COMPLETION | dict(logit_bias={"five": 1}), 400, "logit_bias.five"),
        ("completions", COMPLETION | dict(allowed_token_ids=[272]), 400, "allowed_token_ids"),
        ("completions", COMPLETION | dict(prompt_logprobs=21), 400, "prompt_logprobs"),
        ("completions", COMPLETION | dict(prompt_logprobs=-1), 400, "prompt_logprobs"),
        ("completions", COMPLETION | dict(adapters=[{"name": "dora"}]), 400, "model"),
        ("completions", COMPLETION | dict(model="base", adapters=[{"name": "absent"}]), 404, "adapters"),
        ("completions", COMPLETION | dict(model="base", adapters=[{"weight": 1}]), 400, "adapters.0.name"),
        ("completions", COMPLETION | dict(stream_options={"include_usage": True}), 400, "stream_options"),
        ("completions", COMPLETION | dict(stream=True, stream_options={"x": 1}), 400, "stream_options.x"),
        ("completions", COMPLETION | dict(max_tokens=0), 400, "max_tokens"),
        ("completions", COMPLETION | dict(max_tokens=-1), 400, "max_tokens"),
        ("completions", COMPLETION | dict(max_tokens="4"), 400, "max_tokens"),
        ("completions", COMPLETION | dict(max_tokens=512), 400, "max_tokens"),
        ("completions", COMPLETION | dict(min_tokens=5), 400, "min_tokens"),
        ("completions", COMPLETION | dict(temperature=float("nan")), 400, "temperature"),
        ("completions", COMPLETION | dict(top_p=-1), 400, "top_p"),
        ("completions", COMPLETION | dict(top_k=-2), 400, "top_k"),
        ("completions", COMPLETION | dict(presence_penalty=3), 400, "presence_penalty"),
        ("completions", COMPLETION | dict(seed=2**63), 400, "seed"),
        ("completions", COMPLETION | dict(stop=[""]), 400, "stop"),
        ("completions", COMPLETION | dict(logprobs=21), 400, "logprobs"),
        ("completions", COMPLETION | dict(max_completion_tokens=4), 400, "max_completion_tokens"),
        ("completions", b"{", 400, "body"),
        ("completions", b"[]", 400, "body"),
        ("completions", b"\xff", 400, "body"),
        ("chat/completions", CONVERSATION | dict(max_completion_tokens=5), 400, "max_tokens"),
        (
            "chat/completions",
            CONVERSATION | dict(add_generation_prompt=True, continue_final_message=True),
            400,
            "add_generation_prompt",
        ),
        ("chat/completions", dict(model="dora", messages=CHAT, max_completion_tokens=0), 400, "max_completion_tokens"),
        ("chat/completions", CONVERSATION | dict(model="lora"), 400, "messages"),
        ("chat/completions", CONVERSATION | dict(messages=[]), 400, "messages"),
        ("chat/completions", CONVERSATION | dict(messages=[{"role": "user"}]), 400, "messages.0.content"),
        (
            "chat/completions",
            CONVERSATION | dict(messages=[{**CHAT[1], "audio": {"id": "x"}}]),
            400,
            "messages.0.audio",
        ),
        (
            "chat/completions",
            CONVERSATION | dict(messages=[{**CHAT[1], "tool_calls": [1]}]),
            400,
            "messages.0.tool_calls.0",
        ),
        ("chat/completions", CONVERSATION | dict(chat_template_kwargs={"messages": []}), 400, "chat_template_kwargs"),
        ("chat/completions", CONVERSATION | dict(chat_template_kwargs={"x": 10**400}), 400, "chat_template_kwargs"),
        ("chat/completions", CONVERSATION | dict(chat_template_kwargs={"x": "x" * 17000}), 400, "chat_template_kwargs"),
        ("chat/completions", CONVERSATION | dict(chat_template_kwargs=nested(17)), 400, "chat_template_kwargs"),
        ("chat/completions", CONVERSATION | dict(chat_template_kwargs=nested(60)), 400, "chat_template_kwargs"),
        ("chat/completions", CONVERSATION | dict(tools=[{"type": "function"}]), 400, "tools.0.function"),
        ("chat/completions", CONVERSATION | dict(response_format={"type": "grammar"}), 400, "response_format.type"),
        ("chat/completions", CONVERSATION | dict(top_logprobs=2), 400, "top_logprobs"),
        ("chat/completions", CONVERSATION | dict(logprobs=True, top_logprobs=21), 400, "top_logprobs"),
        ("embeddings", COMPLETION, 404, None),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_refused_by_name(
    server: Server, path: str, body: dict[str, Any] | bytes, status: int, param: str | None
) -> None:
    bodies = [body if isinstance(body, bytes) else json.dumps(body).encode()]
    if isinstance(body, dict) and "stream_options" not in body:
        bodies.append(json.dumps(body | {"stream": True}).encode())
    for sent in bodies:
        got, told = refused(server, path, sent)
        error = told["error"]
        assert (got, error["param"]) == (status, param), error
        assert error.keys() == {"message", "type", "param", "code"}
        assert error["type"] == ("permission_error" if status == 403 else "invalid_request_error")
        assert param is None or error["message"].startswith(f"{param}: ")


def refused(server: Server, path: str, body: bytes, content_type: str = "application/json") -> tuple[int, Any]:
    """The status and the body of a response."""
    url = f"http://127.0.0.1:{server.openai_port}/v1/{path}"
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(urllib.request.Request(url, body, {"Content-Type": content_type}), timeout=SECONDS)
    with error.value as response:
        return response.code, json.loads(response.read())


def test_what_says_what_is_done_anyway_is_taken(client: openai.OpenAI) -> None:
    plain = client.completions.create(**COMPLETION, seed=1)
    neutral: dict[str, Any] = dict(n=1, best_of=1, echo=False, suffix=None, logit_bias={}, user="me", stream=False)
    neutral["extra_body"] = dict(store=False, metadata={}, service_tier="auto")
    assert client.completions.create(**COMPLETION, seed=1, **neutral).choices == plain.choices
    kept: dict[str, Any] = dict(store=False, metadata={}, parallel_tool_calls=True, modalities=["text"])
    client.chat.completions.create(
        **CONVERSATION, tools=[], tool_choice="none", response_format={"type": "text"}, **kept
    )


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (CompletionRequest, COMPLETION | dict(prompt=[True] * 5000)),
        (CompletionRequest, COMPLETION | dict(prompt=[[None]] * 5000)),
        (CompletionRequest, COMPLETION | dict(stop=[1] * 5000)),
        (CompletionRequest, COMPLETION | dict(stop_token_ids=[-1] * 5000)),
        (ChatRequest, CONVERSATION | dict(messages=[1] * 5000)),
        (ChatRequest, CONVERSATION | dict(messages=[{"role": "user", "content": [1] * 5000}])),
    ],
    ids=["prompt", "prompts", "stop", "stop_token_ids", "messages", "content"],
)
def test_of_a_million_wrong_items_few_are_looked_at(kind: type[GenerationRequest], body: dict[str, Any]) -> None:
    """A validation of a million items would block all other requests."""
    with pytest.raises(ValidationError) as error:
        kind.model_validate_json(json.dumps(body))
    assert error.value.error_count() < 8


def test_a_body_that_is_not_what_its_encoding_says_is_refused(server: Server) -> None:
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    url = f"http://127.0.0.1:{server.openai_port}/v1/completions"
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(urllib.request.Request(url, json.dumps(COMPLETION).encode(), headers), timeout=SECONDS)
    with error.value as response:
        assert (response.code, json.loads(response.read())["error"]["type"]) == (400, "invalid_request_error")


def test_other_content_and_too_much_of_it_are_refused(server: Server) -> None:
    status, told = refused(server, "completions", json.dumps(COMPLETION).encode(), "text/plain")
    assert (status, told["error"]["param"]) == (400, "content-type")
    for size in ((16 << 20) + 1, 64 * 512 + (256 << 10) + 1):
        status, told = refused(server, "completions", b" " * size)
        assert (status, told["error"]["param"]) == (400, "body")


@pytest.mark.usefixtures("slow_steps")
def test_a_client_that_leaves_gives_its_pages_back(server: Server, client: openai.OpenAI) -> None:
    long: dict[str, Any] = dict(model="lora", prompt="x", max_tokens=500, **FOREVER)
    logged = len(server.log)
    with client.completions.create(**long, stream=True) as answer:
        next(answer)
        assert server.metrics()["lorarep_kv_pages_used"] > 0
    server.wait_idle()
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.3).completions.create(**long)
    server.wait_idle()
    cancelled = re.compile(r"POST /v1/completions CANCELLED")
    wait_for(lambda: len(list(filter(cancelled.search, server.log[logged:]))) == 2, "both to be logged")


def test_sigterm_lets_an_answer_finish_and_takes_no_more(world: World, tmp_path: Path) -> None:
    env = {**world.env, "LORAREP_FAILPOINTS": str(tmp_path), "LORAREP_SERVE_OPENAI_LISTEN": "127.0.0.1:0"}
    with serving([*world.flags(), f"--grace-seconds={SECONDS}"], env) as server, server.openai() as client:
        server.wait_ready()
        step = tmp_path / "step"
        step.write_text("hold")  # the stream must not end before the check
        asked: dict[str, Any] = dict(model="base", prompt="abc", max_tokens=400, **FOREVER)
        answer = client.completions.create(**asked, stream=True, stream_options={"include_usage": True})
        server.process.send_signal(signal.SIGTERM)
        gone = health_pb2.HealthCheckResponse.NOT_SERVING
        wait_for(lambda: health(server, "readiness") == gone, "readiness to go")
        with pytest.raises(openai.InternalServerError) as error:
            client.completions.create(**asked)
        assert (error.value.status_code, error.value.type) == (503, "server_error")
        step.unlink()
        *_, last = answer
        assert last.usage.completion_tokens == 400
        assert server.process.wait(SECONDS) == 0


@pytest.mark.usefixtures("slow_steps")
def test_the_grace_time_ends_an_answer_with_an_error(world: World) -> None:
    flags = [*world.flags(), "--grace-seconds=0.2", "--openai-listen=127.0.0.1:0"]
    with serving(flags, world.env) as server, server.openai() as client:
        server.wait_ready()
        answer = client.completions.create(model="base", prompt="abc", max_tokens=500, stream=True, **FOREVER)
        next(answer)
        server.process.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError, match="the server has shut down"):
            list(answer)
        assert server.process.wait(SECONDS) == 0


def test_bytes_that_are_no_http_harm_nobody(server: Server, client: openai.OpenAI) -> None:
    no_length = b"POST /v1/completions HTTP/1.1\r\nContent-Length: x\r\n\r\n"
    for sent in (b"\x00" * 64, b"GET / HTTP/9.9\r\n\r\n", no_length):
        with socket.create_connection(("127.0.0.1", server.openai_port), timeout=SECONDS) as connection:
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)
            connection.recv(1024)
    assert "lora" in {model.id for model in client.models.list()}
    assert "Traceback" not in "".join(server.log)
