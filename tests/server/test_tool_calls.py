"""Calls of tools in the text of an answer, in each format, however the text comes."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from typing import Any

import pytest
from lorarep_server.api.openai_tool_calls import ToolCallParser
from lorarep_server.requests.tools import FORMATS

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
]


def read(known: str, pieces: list[str]) -> tuple[str, list[tuple[str, str]], list[int]]:
    """The content, the names and arguments of calls, and the number of pieces that each call's arguments came in."""
    parser, content = ToolCallParser(FORMATS[known]), ""
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


@pytest.mark.parametrize("known", FORMATS)
def test_long_text_is_looked_at_once(known: str) -> None:
    """Characters that are looked at again and again would hold the event loop: this would take minutes."""
    for text in (FORMATS[known].begin + "[" * 200_000, FORMATS[known].begin + '{"a": "' + "x" * 200_000, "<" * 200_000):
        content, calls, _ = read(known, [text[i : i + 4] for i in range(0, len(text), 4)])
        assert (content, calls) == (text, []), known
