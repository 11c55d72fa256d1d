"""Tools that a model may call: how chat templates have them, and the formats in which models call them.

A format is that of a family of models; their chat templates tell it. The table has vLLM's names of the parsers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from lorarep.v1 import generation_pb2

from lorarep_runtime.errors import FailedPrecondition, InvalidArgument, first_line
from lorarep_runtime.request import StructuredOutput
from lorarep_server.requests.xml_calls import call_grammar, json_by

if TYPE_CHECKING:
    from lorarep_runtime.text.tokenizer import Tokenizer

MAX_TOOLS = 128
NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
FIELD = "prompt.chat.tools"


@dataclass(frozen=True)
class ToolFormat:
    """How a model writes calls: `begin`, then name and arguments by `style`, then `end`, for each call."""

    begin: str
    """"" where an answer that begins with an object is a call."""
    end: str
    between: str
    """The text between two calls."""
    arguments: str
    """The key of the arguments."""
    mark: str
    """A part of the chat templates that tell this format."""
    style: Literal["object", "list", "named", "xml"] = "object"
    """An object; a JSON list of all objects after one `begin`; a name, `[ARGS]` and arguments; as in `xml_calls`."""
    older: str = ""
    """The mark of another format, which templates of this one have as well."""

    @property
    def is_list(self) -> bool:
        return self.style == "list"


FORMATS: Mapping[str, ToolFormat] = {
    "hermes": ToolFormat("<tool_call>", "</tool_call>", "\n", "arguments", mark="<tool_call>"),
    "llama3_json": ToolFormat("", "", "; ", "parameters", mark='"parameters": dictionary'),
    "mistral": ToolFormat("[TOOL_CALLS]", "", ", ", "arguments", mark="[TOOL_CALLS]", style="list"),
    "qwen3_coder": ToolFormat(
        "<tool_call>", "</tool_call>", "\n", "", mark="<function=", style="xml", older="<tool_call>"
    ),
}
NAMED = ToolFormat("[TOOL_CALLS]", "", "", "", mark="[ARGS]", style="named", older="[TOOL_CALLS]")
"""Mistral's format since its tokenizers v11; vLLM has one name for both."""
OTHER_MARKS = ("<｜tool", "<arg_key>")
"""Parts of templates of other formats, which have a mark of the table as well."""


def tool_format(tokenizer: Tokenizer, named: str | None) -> ToolFormat:
    """The format in which the model of a tokenizer calls tools.

    Args:
        named: by the operator (`--tool-call-parser`).

    Raises:
        FailedPrecondition: the chat template knows no tools, or does not tell which format it is.
    """
    template = tokenizer.chat_template or ""
    if "tools" not in template:
        raise FailedPrecondition("the chat template does not tell the model of tools", field=FIELD)
    if named is not None:
        return NAMED if named == "mistral" and NAMED.mark in template else FORMATS[named]
    told = [known for known in (*FORMATS.values(), NAMED) if known.mark in template]
    told = [known for known in told if known.mark not in {each.older for each in told}]
    if len(told) != 1 or any(mark in template for mark in OTHER_MARKS):
        raise FailedPrecondition(
            f"the chat template does not tell in which format of {', '.join(FORMATS)} the model calls them: "
            "--tool-call-parser names it",
            field=FIELD,
        )
    return told[0]


def told_tools(chat: generation_pb2.Chat) -> list[dict[str, Any]]:
    """The tools of a conversation as chat templates have them; none where none may be called.

    Raises:
        InvalidArgument: there are too many, or one is malformed.
    """
    if len(chat.tools) > MAX_TOOLS:
        raise InvalidArgument(f"{len(chat.tools)} are over the limit of {MAX_TOOLS}", field=FIELD)
    names = [tool.name for tool in chat.tools]
    for name in names:
        if not NAME.fullmatch(name):
            raise InvalidArgument(f"{name[:80]!r} is no name of letters, digits, '_', '-' and '.'", field=FIELD)
    if len(set(names)) < len(names):
        raise InvalidArgument("two have one name", field=FIELD)
    if chat.tool_choice == generation_pb2.TOOL_CHOICE_REQUIRED:
        if not names:
            raise InvalidArgument("has none, and a call is required", field=FIELD)
        if chat.tool_name and chat.tool_name not in names:
            raise InvalidArgument(f"{chat.tool_name!r} is none of the tools", field="prompt.chat.tool_name")
    tools = [
        {"type": "function", "function": {"name": t.name, "description": t.description, "parameters": _schema(t)}}
        for t in chat.tools
    ]
    return [] if chat.tool_choice == generation_pb2.TOOL_CHOICE_NONE else tools


def _schema(tool: generation_pb2.Tool) -> dict[str, Any]:
    return json_object(tool.parameters, f"{FIELD}.parameters") if tool.parameters else {"type": "object"}


def told_calls(message: generation_pb2.ChatMessage) -> dict[str, Any]:
    """The fields of a message that are about calls, as chat templates have them."""
    fields: dict[str, Any] = {}
    if message.tool_calls:
        fields["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {
                    "name": call.name,
                    "arguments": json_object(call.arguments or "{}", "prompt.chat.messages.tool_calls"),
                },
            }
            for call in message.tool_calls
        ]
    if message.tool_call_id:
        fields["tool_call_id"] = message.tool_call_id
    return fields


def json_object(text: str, field: str) -> dict[str, Any]:
    """The JSON object that a text is. Raises InvalidArgument."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(first_line(error), field=field) from error
    if not isinstance(value, dict):
        raise InvalidArgument("is no JSON object", field=field)
    return value


def required_calls(
    chat: generation_pb2.Chat, tools: Sequence[Mapping[str, Any]], known: ToolFormat, tokenizer: Tokenizer
) -> StructuredOutput | None:
    """The form of an answer that has to call tools; None where it need not.

    Args:
        tools: by `told_tools`.
    """
    if chat.tool_choice != generation_pb2.TOOL_CHOICE_REQUIRED:
        return None
    functions = [tool["function"] for tool in tools if chat.tool_name in ("", tool["function"]["name"])]
    try:
        rules = [rule for number, function in enumerate(functions) for rule in _call(number, function, known)]
    except ValueError as error:
        raise InvalidArgument(str(error), field=FIELD) from error
    calls = " | ".join(f"call_{number}" for number in range(len(functions)))
    line = '"\\n"' if known.end else ""
    call = f"{line} call {line}"
    if not known.is_list:
        call = f"{_mark(known.begin, tokenizer)} {call} {_mark(known.end, tokenizer)}"
    is_one = chat.single_tool_call or bool(chat.tool_name)
    answer = call if is_one else f"{call} ({_text(known.between)} {call})*"
    if known.is_list:
        answer = f'{_mark(known.begin, tokenizer)} "[" {answer} "]"'
    rules = [f"start: {answer}", f"call: {calls}", *rules]
    if known.style == "named":
        rules.append(f"args: {_mark(NAMED.mark, tokenizer)}")
    return StructuredOutput("grammar", "\n".join(rules) + "\n", asked_as=FIELD)


def _call(number: int, function: Mapping[str, Any], known: ToolFormat) -> Iterator[str]:
    """The rules of Lark of a call of a function: `call_NUMBER`, and those that it uses."""
    name, parameters = function["name"], {"type": "object"} | function["parameters"]
    match known.style:
        case "xml":
            yield from call_grammar(name, number, parameters, FIELD)
        case "named":
            yield f"call_{number}: {_text(name)} args {json_by(parameters)}"
        case _:
            yield f'call_{number}: {_text(_head(name, known))} {json_by(parameters)} "}}"'


def _head(name: str, known: ToolFormat) -> str:
    """A call's object up to its arguments, as models are trained to write it."""
    return f'{{"name": {json.dumps(name)}, "{known.arguments}": '


def _mark(mark: str, tokenizer: Tokenizer) -> str:
    """A mark of a format in Lark: the special token that it is, or its text."""
    token = tokenizer.special_token(mark)
    return _text(mark) if token is None else f"<[{token}]>"


def _text(text: str) -> str:
    return json.dumps(text) if text else ""
