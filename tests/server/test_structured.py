"""Forms of answers and calls of tools as clients ask for them, over each protocol."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import jsonschema
import openai
import pytest
from fmaas import generation_pb2 as fmaas_pb
from lorarep.v1 import generation_pb2 as pb
from pydantic import BaseModel
from transformers import AutoTokenizer

from benchmarks.cpu import soak_requests
from tests.server.test_clients import CLIENTS, NODE
from tests.server.test_fmaas import parameters, whole
from tests.server.test_frameworks import PYTHON, printed, url
from tests.server.test_openai import refused
from tests.support.callers import request
from tests.support.servers import Server
from tests.support.world import HERMES, World

MISTRAL = "{{ tools | length }}{% for m in messages %}{{ m.content }}{% endfor %}[TOOL_CALLS]"
TEMPLATES = {
    "hermes": HERMES,
    "mistral": MISTRAL,
    "mistral-v13": f"{MISTRAL}[ARGS]",
    "qwen3-coder": HERMES.replace("In <tool_call>", "In <tool_call><function="),
    "unknown": "{{ tools }}{{ messages }}",
}
PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"enum": ["Köln", "Rom"]}, "days": {"$ref": "#/$defs/days"}},
    "required": ["city", "days"],
    "additionalProperties": False,
    "$defs": {"days": {"type": "integer", "minimum": 1, "maximum": 14}},
    "x-guidance": {"whitespace_flexible": False},
}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "weather", "description": "The weather.", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "stop.now", "parameters": {"type": "object", "maxProperties": 0}}},
]
CHAT: list[Any] = [{"role": "user", "content": "Hi!"}]


@pytest.fixture(scope="module")
def models(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Adapters with chat templates that tell tools, by their format."""
    for name, template in TEMPLATES.items():
        folder = Path(shutil.copytree(world.adapters["plain"], tmp_path_factory.mktemp("tools") / name))
        (folder / "chat_template.jinja").write_text(template)
        world.hub.publish(f"org/{name}", folder)
    return {name: f"org/{name}" for name in TEMPLATES}


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with server.openai() as client:
        yield client
    server.wait_idle()


class Place(BaseModel):
    kind: Literal["city", "river"]
    size: int | None


class Trip(BaseModel):
    place: Place
    days: Literal[1, 2]


def test_what_the_client_parses_is_what_it_asked_for(client: openai.OpenAI) -> None:
    for seed in range(4):
        answer = client.chat.completions.parse(
            model="dora", messages=CHAT, response_format=Trip, max_completion_tokens=400, seed=seed
        ).choices[0]
        assert answer.finish_reason == "stop"
        assert isinstance(answer.message.parsed, Trip)


SCHEMA = {"type": "object", "properties": {"a": {"const": [1]}}, "required": ["a"], "additionalProperties": False}


@pytest.mark.parametrize(
    ("asked", "pattern"),
    [
        ({"structured_outputs": {"json": SCHEMA}}, r'\s*\{\s*"a"\s*:\s*\[\s*1\s*\]\s*\}'),
        ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, r'\s*\{\s*"a"\s*:\s*\[\s*1\s*\]\s*\}'),
        ({"structured_outputs": {"json": SCHEMA, "disable_any_whitespace": True}}, r'\{"a":\[1\]\}'),
        ({"structured_outputs": {"json": json.dumps(SCHEMA), "disable_any_whitespace": True}}, r'\{"a":\[1\]\}'),
        ({"structured_outputs": {"regex": "[0-9]{4}-x"}}, "[0-9]{4}-x"),
        ({"structured_outputs": {"choice": ["ja", "nein"]}}, "ja|nein"),
        ({"structured_outputs": {"grammar": 'root ::= "a" | "bc"'}}, "a|bc"),
        ({"guided_json": SCHEMA}, r'\s*\{\s*"a"\s*:\s*\[\s*1\s*\]\s*\}'),
        ({"guided_regex": "x{3}"}, "xxx"),
        ({"guided_choice": ["ja", "nein"]}, "ja|nein"),
        ({"guided_grammar": 'start: "q" /[0-9]/'}, "q[0-9]"),
    ],
    ids=str,
)
def test_answers_have_the_forms_of_vllm(client: openai.OpenAI, asked: dict[str, Any], pattern: str) -> None:
    whole = client.completions.create(model="lora", prompt="x", max_tokens=400, extra_body=asked, n=2, seed=5)
    for choice in whole.choices:
        assert choice.finish_reason == "stop"
        assert re.fullmatch(pattern, choice.text)
    chunks = client.chat.completions.create(
        model="dora", messages=CHAT, max_tokens=400, extra_body=asked, stream=True, seed=5
    )
    assert re.fullmatch(pattern, "".join(chunk.choices[0].delta.content or "" for chunk in chunks))


def test_any_json_object_is_one_also_where_it_is_cut(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="dora", messages=CHAT, response_format={"type": "json_object"}, max_tokens=30
    ).choices[0]
    assert answer.message.content.startswith("{")
    if answer.finish_reason == "stop":
        assert isinstance(json.loads(answer.message.content), dict)
    else:
        assert answer.finish_reason == "length"


FORM = pb.StructuredOutput


@pytest.mark.parametrize(
    ("form", "fmaas", "pattern"),
    [
        (FORM(regex="[a-c]{5}"), dict(regex="[a-c]{5}"), "[a-c]{5}"),
        (FORM(choice=FORM.Choices(choices=["u", "vv"])), dict(choice=dict(choices=["u", "vv"])), "u|vv"),
        (FORM(grammar='start: "a"'), dict(grammar='start: "a"'), "a"),
        (FORM(json_schema='{"const": 7}'), dict(json_schema='{"const": 7}'), "7"),
        (FORM(json_object=FORM.AnyObject()), dict(format=fmaas_pb.DecodingParameters.JSON), r"\{.*"),
    ],
    ids=str,
)
def test_answers_over_grpc_have_their_forms(server: Server, form: Any, fmaas: dict[str, Any], pattern: str) -> None:
    prompt, stopping = pb.Prompt(text="x"), pb.Stopping(max_new_tokens=40)
    answer = server.generation.Generate(pb.GenerateRequest(prompt=prompt, stopping=stopping, structured_output=form))
    told = whole(server, "x", params=parameters(40, decoding=fmaas))
    assert re.fullmatch(pattern, answer.text, re.DOTALL)
    assert told.text == answer.text


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (
            dict(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "no"}}}),
            "response_format",
        ),
        (dict(response_format={"type": "json_schema"}), "response_format"),
        (dict(response_format={"type": "json_object"}, ignore_eos=True), "ignore_eos"),
        (dict(structured_outputs={"regex": "("}), "structured_outputs"),
        (dict(structured_outputs={"regex": "a", "choice": ["a"]}), "structured_outputs"),
        (dict(guided_json={"a": 1}, guided_regex="a"), "guided_regex"),
        (dict(guided_grammar="nothing"), "guided_grammar"),
        (dict(guided_choice=["a"] * 1025), "guided_choice"),
        (dict(guided_regex="a", allowed_token_ids=[5]), "allowed_token_ids"),
        (dict(tools=TOOLS), "tools"),  # whose template tells none
        (dict(tool_choice="required"), "tools"),
        (dict(tools=TOOLS, tool_choice={"type": "function", "function": {"name": "none"}}), "tool_choice"),
        (dict(tools=[TOOLS[0], TOOLS[0]]), "tools"),
        (dict(tools=[{"type": "function", "function": {"name": "no name"}}]), "tools"),
        (dict(model="org/unknown", tools=TOOLS), "tools"),
        (dict(model="org/hermes", tools=TOOLS, tool_choice="required", guided_regex="a"), "guided_regex"),
        (
            dict(
                model="org/hermes",
                tools=[{"type": "function", "function": {"name": "a", "parameters": {"not": {}}}}],
                tool_choice="required",
            ),
            "tools",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_kept_is_refused_by_name(
    server: Server, models: dict[str, str], body: dict[str, Any], param: str
) -> None:
    for stream in (False, True):
        sent = {"model": "dora", "messages": CHAT, "max_tokens": 5, "stream": stream, **body}
        status, told = refused(server, "chat/completions", json.dumps(sent).encode())
        assert (status, told["error"]["param"]) == (400, param), told


@pytest.mark.parametrize(
    ("name", "choice"),
    [
        ("hermes", "required"),
        ("hermes", "weather"),
        ("mistral", "required"),
        ("mistral", "weather"),
        ("mistral-v13", "required"),
        ("qwen3-coder", "weather"),
    ],
)
def test_calls_that_are_required_are_made(
    client: openai.OpenAI, models: dict[str, str], name: str, choice: str
) -> None:
    tool_choice: Any = choice if choice == "required" else {"type": "function", "function": {"name": choice}}
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in TOOLS}
    for seed in range(2):
        asked: dict[str, Any] = dict(
            model=models[name], messages=CHAT, tools=TOOLS, tool_choice=tool_choice, max_tokens=300, seed=seed
        )
        answer = client.chat.completions.create(**asked).choices[0]
        assert (answer.finish_reason, answer.message.content) == ("tool_calls", None)
        calls = answer.message.tool_calls
        for call in calls:
            jsonschema.validate(json.loads(call.function.arguments), schemas[call.function.name])
        if choice == "weather":
            assert [call.function.name for call in calls] == ["weather"]
        with client.chat.completions.stream(**asked) as stream:
            kinds = [event.type for event in stream]
            streamed = stream.get_final_completion().choices[0]
        assert "tool_calls.function.arguments.delta" in kinds
        assert streamed.finish_reason == "tool_calls"
        assert [(c.function.name, c.function.arguments) for c in streamed.message.tool_calls] == [
            (c.function.name, c.function.arguments) for c in calls
        ]


TRIP: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"enum": [1, 2, 3]}},
    "required": ["city", "days"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}
"""The schema of the objects that clients of `tests/clients` ask for."""


@pytest.fixture(scope="module")
def trip(server: Server, models: dict[str, str]) -> Any:
    """The object over gRPC."""
    chat = pb.Chat(messages=[pb.ChatMessage(role="user", content="Hi!")])
    asked = pb.GenerateRequest(
        prompt=pb.Prompt(chat=chat),
        adapters=[pb.AdapterRef(name=models["hermes"])],
        sampling=pb.Sampling(temperature=1, seed=5),
        stopping=pb.Stopping(max_new_tokens=200),
        structured_output=FORM(json_schema=json.dumps(TRIP)),
    )
    return json.loads(server.generation.Generate(asked).text)


def test_frameworks_get_the_objects_and_calls_that_they_ask_for(
    server: Server, models: dict[str, str], trip: Any
) -> None:
    """And an agent calls its own function, and answers in the form that it wants."""
    got = printed(PYTHON, CLIENTS / "structured.py", url(server), models["hermes"], "Hi!")
    parsed, agent = got["with_instructor"], got["with_pydantic_ai"]
    for framework in (parsed, agent):
        assert framework["object"] == framework["object, streamed"] == trip
    assert parsed["call"] == parsed["call, streamed"]
    called, result, answer = agent["tools"]
    assert result == "rain"
    for one in (parsed["call"], called, answer):
        jsonschema.validate(one, TRIP)
    server.wait_idle()


def test_vercels_sdk_gets_texts_objects_and_calls(server: Server, models: dict[str, str], trip: Any) -> None:
    got = printed(NODE, CLIENTS / "vercel.js", url(server), "dora", models["hermes"], "Hi!")
    roles = (("system", "Be brief."), ("user", "Hi!"))
    chat = pb.Prompt(chat=pb.Chat(messages=[pb.ChatMessage(role=role, content=content) for role, content in roles]))
    answer = server.generation.Generate(request("", "dora", prompt=chat, stopping=pb.Stopping(max_new_tokens=9)))
    assert got["chat"] == got["chat, streamed"] == answer.text
    assert got["usage"] == len(answer.token_ids)
    assert got["object"] == got["object, streamed"] == trip
    assert got["calls"] == got["calls, streamed"]
    assert got["results"] == ["rain"] * len(got["calls"])
    for one in got["calls"]:
        jsonschema.validate(one, TRIP)
    assert got["steps"][0] == 1
    assert len(got["steps"]) == 2
    server.wait_idle()


def test_answers_are_those_alone_whatever_is_asked_at_the_same_time(server: Server, models: dict[str, str]) -> None:
    """Several answers, prompts with log-probabilities, forms and calls: half an hour of them is in the soak."""
    asked = soak_requests.bodies(random.Random(2), 15, models["hermes"])
    alone = [soak_requests.answer_to(server, *body) for body in asked]
    assert [status for status, _ in alone] == [200] * len(asked), alone
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda body: soak_requests.answer_to(server, *body), [*asked, *reversed(asked)]))
    for (_, expected), (status, got) in zip([*alone, *reversed(alone)], together, strict=True):
        assert status == 200
        assert soak_requests.are_same(got, expected)
    server.wait_idle()


def test_a_call_and_its_result_are_told_as_transformers_tells_them(
    server: Server, client: openai.OpenAI, world: World, models: dict[str, str]
) -> None:
    asked: dict[str, Any] = dict(model=models["hermes"], tools=TOOLS, max_tokens=300, seed=1)
    first = client.chat.completions.create(messages=CHAT, tool_choice="required", parallel_tool_calls=False, **asked)
    (call,) = first.choices[0].message.tool_calls
    messages = [*CHAT, first.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "12 °C"}]
    whole = client.chat.completions.create(messages=messages, tool_choice="auto", **{**asked, "max_tokens": 1})
    told = {"name": call.function.name, "arguments": json.loads(call.function.arguments)}
    plain = [
        *CHAT,
        {"role": "assistant", "content": "", "tool_calls": [{"id": call.id, "type": "function", "function": told}]},
        {"role": "tool", "content": "12 °C", "tool_call_id": call.id},
    ]
    tools = [{"type": "function", "function": {"description": "", **tool["function"]}} for tool in TOOLS]
    tools = [
        {"type": "function", "function": {key: tool["function"][key] for key in ("name", "description", "parameters")}}
        for tool in tools
    ]
    tokenizer = AutoTokenizer.from_pretrained(world.base)
    text = tokenizer.apply_chat_template(
        plain, tools=tools, chat_template=HERMES, add_generation_prompt=True, tokenize=False
    )
    assert whole.usage.prompt_tokens == len(tokenizer.encode(text, add_special_tokens=False))
    without = client.chat.completions.create(messages=CHAT, tool_choice="none", **{**asked, "max_tokens": 1})
    plain_text = tokenizer.apply_chat_template(CHAT, chat_template=HERMES, add_generation_prompt=True, tokenize=False)
    assert without.usage.prompt_tokens == len(tokenizer.encode(plain_text, add_special_tokens=False))
