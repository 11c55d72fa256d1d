"""Calls of tools in the text of an answer, as it comes: a call's name, then its arguments piece by piece."""

from __future__ import annotations

import json
import re
import secrets
import string
from dataclasses import dataclass
from typing import Any

from lorarep_server.requests.tools import ToolFormat

ID_CHARACTERS = string.ascii_letters + string.digits
ID_LENGTH = 9
"""Mistral's templates take ids of nine letters and digits alone."""
MAX_HEAD = 512
"""Most characters of an object up to its arguments; a longer one is read when it is whole."""
SPACES = " \n\r\t"


@dataclass(frozen=True)
class Part:
    """What some text adds to an answer: to its content, or to one of its calls."""

    content: str = ""
    call: int | None = None
    """Number of the call; None where it is content."""
    name: str | None = None
    """The name, where a call begins."""
    arguments: str = ""

    def delta(self) -> dict[str, Any]:
        """The call as a chunk has it."""
        function = {"arguments": self.arguments}
        if self.name is None:
            return {"index": self.call, "function": function}
        number = "".join(secrets.choice(ID_CHARACTERS) for _ in range(ID_LENGTH))
        return {"index": self.call, "id": number, "type": "function", "function": {"name": self.name, **function}}


class Value:
    """Finds the end of a JSON value in text that comes piece by piece. Each character is looked at once."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = self._is_escaped = False
        self._begun = False

    def end(self, text: str) -> int | None:
        """Number of characters of `text` that are of the value, if it ends there; None if it goes on."""
        for i, character in enumerate(text):
            if self._in_string:
                if self._is_escaped:
                    self._is_escaped = False
                elif character == "\\":
                    self._is_escaped = True
                elif character == '"':
                    self._in_string = False
                    if not self._depth:
                        return i + 1
            elif character == '"':
                self._in_string = self._begun = True
            elif character in "{[":
                self._depth, self._begun = self._depth + 1, True
            elif character in "}]" and self._depth:
                self._depth -= 1
                if not self._depth:
                    return i + 1
            elif not self._depth and self._begun and character in ",}" + SPACES:
                return i
            elif character not in SPACES:
                self._begun = True
        return None


class ToolCallParser:
    """Divides the text of one answer into content and calls. What is no call after all is content."""

    def __init__(self, known: ToolFormat) -> None:
        self._format = known
        self._head = re.compile(rf'\s*\{{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"{known.arguments}"\s*:\s*')
        self._rest = ""
        """Text that has not been read."""
        self._state = self._content
        self._scanned = 0
        self._object = Value()
        self._arguments = Value()
        self._parts: list[Part] = []
        self.count = 0
        """Number of calls so far."""

    def feed(self, text: str) -> list[Part]:
        """What the next text of the answer adds."""
        self._rest += text
        while self._rest and self._state():
            pass
        parts, self._parts = self._parts, []
        return parts

    def finish(self) -> list[Part]:
        """What is left at the answer's end: text that might have been the beginning of a call."""
        if self._state == self._before_object and not (self._format.is_list and self.count):
            self._parts.append(Part(self._format.begin + self._rest))
        elif self._state in (self._content, self._plain) and (self._rest.strip() or not self.count):
            self._parts.append(Part(self._rest))
        self._rest = ""
        return [part for part in self._parts if part.call is not None or part.content]

    def message(self, text: str, *, is_last: bool) -> dict[str, Any]:
        """The content, and the calls if there are any, that the next text of the answer adds to a message.

        Args:
            is_last: whether the answer ends with it.
        """
        parts = self.feed(text) + (self.finish() if is_last else [])
        calls: dict[int, Part] = {}
        for part in parts:
            if part.call is not None:
                first = calls.get(part.call, Part(call=part.call))
                calls[part.call] = Part("", part.call, first.name or part.name, first.arguments + part.arguments)
        content = "".join(part.content for part in parts)
        return {"content": content, **({"tool_calls": [call.delta() for call in calls.values()]} if calls else {})}

    # Each state reads some of the rest, and says whether another has to go on.

    def _content(self) -> bool:
        """Text before a call, or between two."""
        begin, text = self._format.begin, self._rest
        if not begin:  # an answer is calls from its first character, or none at all
            stripped = text.lstrip(SPACES)
            if not stripped and len(text) <= MAX_HEAD:
                return False
            self._state = self._before_object if stripped.startswith("{") else self._plain
            return True
        at = text.find(begin)
        if at >= 0:
            self._add_content(text[:at])
            self._rest, self._state = text[at + len(begin) :], self._before_object
            return True
        held = next((n for n in range(min(len(begin) - 1, len(text)), 0, -1) if begin.startswith(text[-n:])), 0)
        self._add_content(text[: len(text) - held])
        self._rest = text[len(text) - held :]
        return False

    def _add_content(self, text: str) -> None:
        if text.strip() or (text and not self.count):
            self._parts.append(Part(text))

    def _plain(self) -> bool:
        """Text after which no call comes."""
        self._parts.append(Part(self._rest))
        self._rest = ""
        return False

    def _before_object(self) -> bool:
        """The object of a call, up to its arguments."""
        text = self._rest
        if self._format.is_list:
            text = text.lstrip(SPACES + ("," if self.count else "["))
        text = text.lstrip(SPACES)
        if not text:
            return len(self._rest) > MAX_HEAD and self._is_no_call()
        if self._format.is_list and self.count and text[0] == "]":
            self._rest, self._state = text[1:], self._after_list
            return True
        if text[0] != "{":
            return self._is_no_call()
        if len(text) < len(self._rest):
            self._rest, self._scanned = text, 0
        if (head := self._head.match(text, 0, MAX_HEAD)) and head.end() < len(text):
            try:
                self._begin(json.loads(head[1]))
            except ValueError:  # an escape or a character that JSON does not know
                return self._is_no_call()
            self._rest, self._state, self._arguments = text[head.end() :], self._in_arguments, Value()
            return True
        end = self._object.end(text[self._scanned :])
        if end is None:
            self._scanned = len(text)
            return False
        return self._whole_object(text, self._scanned + end)

    def _whole_object(self, text: str, end: int) -> bool:
        try:
            call = json.loads(text[:end])
            name, arguments = call["name"], call.get(self._format.arguments, {})
        except (ValueError, KeyError, RecursionError):
            return self._is_no_call()
        if not isinstance(name, str):
            return self._is_no_call()
        self._begin(name)
        self._parts.append(Part(call=self.count - 1, arguments=json.dumps(arguments, ensure_ascii=False)))
        self._rest, self._state = text[end:], self._after_object
        return True

    def _begin(self, name: str) -> None:
        self._parts.append(Part(call=self.count, name=name))
        self.count += 1
        self._object, self._scanned = Value(), 0

    def _is_no_call(self) -> bool:
        self._rest = ("" if self.count and self._format.is_list else self._format.begin) + self._rest
        self._state = self._plain
        return True

    def _in_arguments(self) -> bool:
        end = self._arguments.end(self._rest)
        self._parts.append(Part(call=self.count - 1, arguments=self._rest[:end]))
        self._rest = "" if end is None else self._rest[end:]
        if end is not None:
            self._state = self._after_arguments
        return end is not None

    def _after_arguments(self) -> bool:
        self._rest = text = self._rest.lstrip(SPACES)
        if text:
            self._rest, self._state = text.removeprefix("}"), self._after_object
        return bool(self._rest)

    def _after_object(self) -> bool:
        self._rest = text = self._rest.lstrip(SPACES)
        end = self._format.end
        if not text or (end and end.startswith(text) and text != end):
            return False
        if self._format.is_list:
            self._rest, self._state = text, self._before_object
        elif end or self._format.begin:
            self._rest, self._state = text.removeprefix(end), self._content
        else:
            self._rest = text.lstrip(";," + SPACES)
            if self._rest:
                self._state = self._before_object if self._rest[0] == "{" else self._after_list
        return bool(self._rest)

    def _after_list(self) -> bool:
        """Text after the last call."""
        self._add_content(self._rest)
        self._rest = ""
        return False
