"""Calls of tools that are no JSON objects: Mistral's since its tokenizers v11, and Qwen3-Coder's."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from lorarep_server.api.openai_tool_calls import MAX_HEAD, SPACES, Part, ToolCallParser, Value
from lorarep_server.requests.tools import ToolFormat
from lorarep_server.requests.xml_calls import value_of

NAMED_HEAD = re.compile(r"\s*([\w.-]{1,64})(?:\[CALL_ID\]\w{1,64})?(?:\[ARGS\])?\s*(?=\{)")
"""A call up to its arguments. Tokenizers v11 write an id, v13 none; the marks are special tokens."""
FUNCTION = re.compile(r"\s*<function=([\w.-]{1,64})>")
NEXT = re.compile(r"<parameter=([^<>\n]{1,256})>|</function>|(?=</tool_call>)")
PARAMETER_END = "</parameter>"


def tool_call_parser(known: ToolFormat, parameters: Mapping[str, Mapping[str, Any]]) -> ToolCallParser:
    """The parser of one answer.

    Args:
        parameters: the schemas of arguments, by the names of the tools.
    """
    match known.style:
        case "named":
            return NamedCallParser(known)
        case "xml":
            return XmlCallParser(known, parameters)
    return ToolCallParser(known)


class NamedCallParser(ToolCallParser):
    """`[TOOL_CALLS]`, a name, `[ARGS]` and the arguments, for each call."""

    def _before_object(self) -> bool:
        head = NAMED_HEAD.match(self._rest, 0, MAX_HEAD)
        if head is None:
            is_none = "{" in self._rest[:MAX_HEAD] or len(self._rest) > MAX_HEAD
            return is_none and self._is_no_call()
        self._begin(head[1])
        self._rest, self._state, self._arguments = self._rest[head.end() :], self._in_arguments, Value()
        return True

    def _after_arguments(self) -> bool:
        self._state = self._content
        return bool(self._rest)


class XmlCallParser(ToolCallParser):
    """The arguments between marks of their own. Each comes as JSON when it is whole."""

    def __init__(self, known: ToolFormat, parameters: Mapping[str, Mapping[str, Any]]) -> None:
        super().__init__(known)
        self._parameters = parameters
        self._own: Mapping[str, Any] = {}
        """The schema of the call's arguments."""
        self._keys: set[str] = set()
        """The arguments of the call so far."""
        self._key = ""

    def _before_object(self) -> bool:
        head = FUNCTION.match(self._rest, 0, MAX_HEAD)
        if head is None:
            text = self._rest.lstrip(SPACES)
            may_be = text.startswith("<function=") or "<function=".startswith(text)
            is_none = len(self._rest) > MAX_HEAD or not may_be or ">" in text
            return is_none and self._is_no_call()
        self._begin(head[1])
        self._own, self._keys = self._parameters.get(head[1], {}), set()
        self._rest, self._state = self._rest[head.end() :], self._in_function
        return True

    def _in_function(self) -> bool:
        """Between arguments. What is no argument is left out."""
        found = NEXT.search(self._rest)
        if found is None:
            self._rest = self._rest[-MAX_HEAD:]
            return False
        self._rest = self._rest[found.end() :]
        if found[1] is None:
            self._add_arguments("}" if self._keys else "{}")
            self._state = self._after_object
        else:
            self._key, self._state, self._scanned = found[1], self._in_parameter, 0
        return bool(self._rest)

    def _in_parameter(self) -> bool:
        end = self._rest.find(PARAMETER_END, self._scanned)
        if end < 0:
            self._scanned = max(0, len(self._rest) - len(PARAMETER_END) + 1)
            return False
        value = value_of(self._rest[:end], self._key, self._own)
        if self._key not in self._keys:  # twice would be no object of JSON that all read alike
            before = ", " if self._keys else "{"
            self._add_arguments(f"{before}{_json(self._key)}: {_json(value)}")
            self._keys.add(self._key)
        self._rest, self._state = self._rest[end + len(PARAMETER_END) :], self._in_function
        return bool(self._rest)

    def _add_arguments(self, text: str) -> None:
        self._parts.append(Part(call=self.count - 1, arguments=text))


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
