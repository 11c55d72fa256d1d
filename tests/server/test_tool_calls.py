"""Calls of tools in the text of an answer, in each format, however the text comes."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer
from lorarep.v1 import generation_pb2
from lorarep_server.api.openai_other_calls import tool_call_parser
from lorarep_server.requests.tools import FIELD, FORMATS, NAMED, required_calls, told_tools, tool_format

from lorarep_runtime.errors import FailedPrecondition, InvalidArgument
from lorarep_runtime.text.tokenizer import Tokenizer
from tests.support.models import save_tokenizer

CITY = {"city": 'Köln "[}]" \\ {', "days": [1, {"a": None}], "tight": True}
HERMES = '<tool_call>\n{"name": "weather", "arguments": %s}\n</tool_call>'
CASES: list[tuple[str, str, str, list[tuple[str, Any]]]] = [
    ("hermes", HERMES % json.dumps(CITY), "", [("weather", CITY)]),
    (
        "hermes",
        "I look.\n" + HERMES % "{}" + "\n" + '<tool_call>{"arguments": {"x": 1}, "name": "other"}</tool_call>',
        "I look.\n",
        [("weather", {}), ("other", {"x": 1})],
    ),
    ("hermes", "2 < 3 <tool_ and <tool_call", "2 < 3 <tool_ and <tool_call", []),
    ("hermes", "<tool_call>no object", "<tool_call>no object", []),
    ("hermes", '<tool_call>{"no": "name"}</tool_call>', '<tool_call>{"no": "name"}</tool_call>', []),
    (
        "hermes",
        r'<tool_call>{"name": "\q", "arguments": {}}</tool_call>',
        r'<tool_call>{"name": "\q", "arguments": {}}</tool_call>',
        [],
    ),
    ("hermes", "", "", []),
    ("llama3_json", '{"name": "weather", "parameters": {"city": "x"}}', "", [("weather", {"city": "x"})]),
    (
        "llama3_json",
        ' {"name": "a", "parameters": {}}; {"name": "b", "parameters": {"y": [2]}}',
        "",
        [("a", {}), ("b", {"y": [2]})],
    ),
    ("llama3_json", 'It is {"name": "a", "parameters": {}}', 'It is {"name": "a", "parameters": {}}', []),
    ("llama3_json", '{"weather": "fine"}', '{"weather": "fine"}', []),
    (
        "mistral",
        '[TOOL_CALLS][{"name": "a", "arguments": {"x": -1.5e3}}, {"name": "b", "arguments": {}}]',
        "",
        [("a", {"x": -1.5e3}), ("b", {})],
    ),
    ("mistral", "No [TOOL_", "No [TOOL_", []),
    ("named", "Well.[TOOL_CALLS]weather[ARGS]" + json.dumps(CITY), "Well.", [("weather", CITY)]),
    (
        "named",
        '[TOOL_CALLS]a[CALL_ID]Ab3dEf9hI[ARGS]{"x": {}}[TOOL_CALLS]b.c-d[ARGS]{}',
        "",
        [("a", {"x": {}}), ("b.c-d", {})],
    ),
    ("named", '[TOOL_CALLS]weather{"city": "x"}', "", [("weather", {"city": "x"})]),
    ("named", "[TOOL_CALLS] and so on", "[TOOL_CALLS] and so on", []),
    ("named", "[TOOL_CALLS]two words[ARGS]{}", "[TOOL_CALLS]two words[ARGS]{}", []),
    (
        "qwen3_coder",
        "I look.\n<tool_call>\n<function=weather>\n<parameter=city>\nKöln\n\n2 < 3 </param\n</parameter>\n"
        "<parameter=days>\n3\n</parameter>\n<parameter=dry>\nTrue\n</parameter>\n<parameter=at>\n"
        '[{"a": null}]\n</parameter>\n<parameter=more>\n5\n</parameter>\n<parameter=code>5</parameter>'
        "<parameter=unit>12</parameter><parameter=zone>None</parameter>\n"
        "</function>\n</tool_call>",
        "I look.\n",
        [
            (
                "weather",
                dict(
                    city="Köln\n\n2 < 3 </param",
                    days=3,
                    dry=True,
                    at=[{"a": None}],
                    more="5",
                    code="5",
                    unit="12",
                    zone=None,
                ),
            )
        ],
    ),
    (
        "qwen3_coder",
        "<tool_call>\n<function=a>\n</function>\n</tool_call>\n<tool_call><function=weather>\n<parameter=days>\nmany\n"
        "</parameter>\n</tool_call> ",
        "",
        [("a", {}), ("weather", {"days": "many"})],
    ),
    ("qwen3_coder", "<tool_call>\n<function>", "<tool_call>\n<function>", []),
    ("qwen3_coder", "<tool_call><function=a b>", "<tool_call><function=a b>", []),
]
KNOWN = {**FORMATS, "named": NAMED}
PARAMETERS = {
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "dry": {"type": "boolean"},
        "at": {"items": {}},
        "code": {"$ref": "#/$defs/code"},
        "unit": {"anyOf": [{"type": "string"}, {"type": "null"}], "default": None},
        "zone": {"type": ["string", "null"]},
    },
    "$defs": {"code": {"type": "string"}},
}
"""The schema of the arguments of "weather"."""


def read(known: str, pieces: list[str]) -> tuple[str, list[tuple[str, str]], list[int]]:
    """The content, the names and arguments of calls, and the number of pieces that each call's arguments came in."""
    parser, content = tool_call_parser(KNOWN[known], {"weather": PARAMETERS}), ""
    calls: dict[int, dict[str, str]] = {}
    counts: dict[int, int] = {}
    for number, piece in enumerate(pieces):
        message = parser.message(piece, is_last=number == len(pieces) - 1)
        content += message["content"]
        for call in message.get("tool_calls", ()):
            if call["index"] not in calls:
                assert call["type"] == "function"
                assert len(call["id"]) == 9
                calls[call["index"]] = {"name": call["function"]["name"], "arguments": ""}
            else:
                assert call.keys() == {"index", "function"}
            calls[call["index"]]["arguments"] += call["function"]["arguments"]
            counts[call["index"]] = counts.get(call["index"], 0) + 1
    assert list(calls) == list(range(len(calls)))
    assert parser.count == len(calls)
    return content, [(call["name"], call["arguments"]) for call in calls.values()], list(counts.values())


@pytest.mark.parametrize(("known", "text", "content", "calls"), CASES, ids=str)
def test_calls_are_found_however_the_text_is_cut(
    known: str, text: str, content: str, calls: list[tuple[str, Any]]
) -> None:
    draw = random.Random(3)
    for cuts in [0, len(text), *(draw.randint(1, 8) for _ in range(60))]:
        at = sorted({0, len(text), *draw.sample(range(len(text) + 1), min(cuts, len(text)))})
        pieces = [text[i:j] for i, j in pairwise(at)] or [""]
        got, found, _ = read(known, pieces)
        assert (got, [(name, json.loads(arguments)) for name, arguments in found]) == (content, calls), pieces


def test_arguments_come_as_they_are_written() -> None:
    text = HERMES % json.dumps(CITY)
    _, ((_, arguments),), (count,) = read("hermes", list(text))
    assert arguments == json.dumps(CITY)
    assert count > len(arguments) / 2


def test_an_answer_that_ends_in_a_call_has_what_there_is_of_it() -> None:
    assert read("hermes", ['<tool_call>{"name": "a", "arguments": {"x": [1, '])[:2] == ("", [("a", '{"x": [1, ')])


@pytest.mark.parametrize("known", KNOWN)
def test_long_text_is_looked_at_once(known: str) -> None:
    """Characters that are looked at again and again would hold the event loop: this would take minutes."""
    begin = KNOWN[known].begin
    for text in (begin + "[" * 200_000, begin + '{"a": "' + "x" * 200_000, "<" * 200_000):
        content, calls, _ = read(known, [text[i : i + 4] for i in range(0, len(text), 4)])
        assert (content, calls) == (text, []), known


@pytest.mark.parametrize("rest", ["<" * 200_000, "<parameter=" * 20_000, "<parameter=a>" + "</param" * 30_000], ids=len)
def test_a_long_call_is_looked_at_once(rest: str) -> None:
    text = "<tool_call><function=weather>" + rest
    assert read("qwen3_coder", [text[i : i + 4] for i in range(0, len(text), 4)])[1] == [("weather", "")]


def test_the_template_tells_which_format_it_is(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    begins = {"<tool_call>": "hermes", "<tool_call><function=": "qwen3_coder", "[TOOL_CALLS]": "mistral"}
    begins |= {"[TOOL_CALLS][ARGS]": "named"}
    for marks, known in begins.items():
        tokenizer = Tokenizer(tmp_path).with_chat_template("{{ tools }}" + marks)
        assert tool_format(tokenizer, None) is KNOWN[known]
        assert tool_format(tokenizer, "mistral") is (NAMED if known == "named" else FORMATS["mistral"])
    with pytest.raises(FailedPrecondition, match="qwen3_coder"):
        tool_format(Tokenizer(tmp_path).with_chat_template("{{ tools }}<tool_call><arg_key>"), None)


TEXTS = {
    "type": "object",
    "properties": {
        "a": {"type": "string"},
        "b": {"type": "integer"},
        "c": {"anyOf": [{"type": "null"}, {"type": "string", "enum": ["x"]}]},
    },
    "required": ["b"],
}


def may_be_written(text: str, known: str, parameters: dict[str, Any], tokenizer: Tokenizer) -> bool:
    """Whether a text is an answer that has to call the tool f."""
    tool = generation_pb2.Tool(name="f", parameters=json.dumps(parameters))
    chat = generation_pb2.Chat(tools=[tool], tool_choice=generation_pb2.TOOL_CHOICE_REQUIRED)
    form = required_calls(chat, told_tools(chat), KNOWN[known], tokenizer)
    assert form is not None
    vocabulary = LLTokenizer("byte")
    matcher = LLMatcher(vocabulary, form.text)
    tokens = vocabulary.tokenize_str(text)
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


@pytest.mark.parametrize(
    ("arguments", "is_call"),
    [
        ("<parameter=a>\nany <text>\n\n</parameter>\n<parameter=b>\n5\n</parameter>\n", True),
        ("<parameter=b>\n5\n</parameter>\n", True),
        ("<parameter=b>\n5\n</parameter>\n<parameter=c>\nnull\n</parameter>\n", True),
        ("<parameter=b>\n5\n</parameter>\n<parameter=c>\ny\n</parameter>\n", False),
        ("<parameter=a>\nx\n</parameter>\n", False),
        ("<parameter=b>\nx\n</parameter>\n", False),
        ("<parameter=d>\n5\n</parameter>\n<parameter=b>\n5\n</parameter>\n", False),
    ],
)
def test_a_required_call_is_one_by_its_schema(tmp_path: Path, arguments: str, is_call: bool) -> None:
    save_tokenizer(tmp_path)
    tool = generation_pb2.Tool(name="f", parameters=json.dumps(TEXTS))
    chat = generation_pb2.Chat(tools=[tool], tool_choice=generation_pb2.TOOL_CHOICE_REQUIRED)
    form = required_calls(chat, told_tools(chat), FORMATS["qwen3_coder"], Tokenizer(tmp_path))
    assert form is not None
    vocabulary = LLTokenizer("byte")
    matcher = LLMatcher(vocabulary, form.text)
    tokens = vocabulary.tokenize_str(f"<tool_call>\n<function=f>\n{arguments}</function>\n</tool_call>")
    assert (matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()) is is_call, (
        matcher.get_error()
    )


@pytest.mark.parametrize(
    "parameters",
    [
        {"properties": {"a": {"type": "string", "pattern": "x"}}},
        {"properties": {"a": {"type": "string", "enum": [5]}}},
        {"properties": {"a>": {}}},
        {"required": ["a"]},
        {"anyOf": [{}]},
    ],
    ids=str,
)
def test_what_a_format_cannot_keep_is_refused_by_name(tmp_path: Path, parameters: dict[str, Any]) -> None:
    save_tokenizer(tmp_path)
    tool = generation_pb2.Tool(name="f", parameters=json.dumps(parameters))
    chat = generation_pb2.Chat(tools=[tool], tool_choice=generation_pb2.TOOL_CHOICE_REQUIRED)
    with pytest.raises(InvalidArgument, match="'f'") as refused:
        required_calls(chat, told_tools(chat), FORMATS["qwen3_coder"], Tokenizer(tmp_path))
    assert refused.value.field == FIELD
