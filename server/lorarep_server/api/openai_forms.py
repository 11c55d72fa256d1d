"""Forms of answers, and tools, as OpenAI's API and vLLM's fields have them, and their translation into lorarep.v1's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from lorarep.v1 import generation_pb2
from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from lorarep_runtime.errors import InvalidArgument, first_line
from lorarep_server.api.openai_fields import Listed, Message, Name, Nothing
from lorarep_server.requests.tools import json_object

Json = dict[str, Any]
Choices = Annotated[Listed[str], Field(max_length=1024)]


class JsonSchema(Message):
    """The schema of a response format."""

    name: Name
    description: str = ""
    schema_: Json = Field({}, alias="schema")
    strict: bool = False
    """Has no effect: an answer is always valid by its schema."""


class ResponseFormat(Message):
    """The format of a response: free text, any JSON object, or JSON by a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise PydanticCustomError("schema", "json_schema is for the type json_schema, which needs one")
        return self


class StructuredOutputs(Message):
    """vLLM's form of an answer: one of the fields is set."""

    json_: Json | str | None = Field(None, alias="json")
    regex: str | None = None
    choice: Choices | None = None
    grammar: str | None = None
    json_object: bool = False
    disable_any_whitespace: bool = False
    """Whether JSON by a schema has no space between its parts."""
    disable_additional_properties: Literal[False] = False

    def forms(self) -> Iterator[tuple[str, Any]]:
        """Each form that is asked for: its kind, and its value."""
        spaces = {"x-guidance": {"whitespace_flexible": False}} if self.disable_any_whitespace else {}
        if (schema := self.json_) and spaces:
            schema = json_object(schema, "structured_outputs") if isinstance(schema, str) else schema
            schema = spaces | schema
        values = {"json_schema": schema, "regex": self.regex, "choice": self.choice, "grammar": self.grammar}
        yield from ((kind, value) for kind, value in values.items() if value)
        if self.json_object:
            yield ("json_schema", {"type": "object"} | spaces) if spaces else ("json_object", None)


class Function(Message):
    """A function that a model may call."""

    name: Annotated[str, Field(max_length=64)]
    description: str = ""
    parameters: Json = {}
    strict: bool = False
    """Has no effect: arguments of a required call are always valid, those of others as the model writes them."""


class Tool(Message):
    """A tool that a model may call."""

    type: Literal["function"]
    function: Function

    def to_tool(self) -> generation_pb2.Tool:
        parameters = _text_of(self.function.parameters, "tools") if self.function.parameters else ""
        return generation_pb2.Tool(
            name=self.function.name, description=self.function.description, parameters=parameters
        )


class NamedFunction(Message):
    """The name of a function."""

    name: str


class NamedTool(Message):
    """The tool that a model has to call."""

    type: Literal["function"]
    function: NamedFunction


class CalledFunction(Message):
    """A function that a model has called."""

    name: str
    arguments: str
    """A JSON object."""


class ToolCall(BaseModel):
    """A call in an assistant's message. Clients send back what they were given, with fields of their own."""

    model_config = ConfigDict(extra="ignore", strict=True)

    id: str = ""
    type: Literal["function"] = "function"
    function: CalledFunction

    def to_call(self) -> generation_pb2.ToolCall:
        return generation_pb2.ToolCall(id=self.id, name=self.function.name, arguments=self.function.arguments)


class Formed(Message):
    """The fields of both kinds of completions that say what form an answer has."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Json | str | None = None
    guided_regex: str | None = None
    guided_choice: Choices | None = None
    guided_grammar: str | None = None
    guided_decoding_backend: Name = ""
    """Has no effect: there is one."""
    guided_whitespace_pattern: Nothing = []

    def to_form(self) -> tuple[str, generation_pb2.StructuredOutput] | None:
        """The field that asks for a form, and the form; None where none does: an empty value asks for nothing.

        Raises:
            InvalidArgument: several do.
        """
        given = self.structured_outputs
        found: list[tuple[str, str, Any]] = []
        if (format_ := self.response_format) is not None and format_.type == "json_object":
            found.append(("response_format", "json_object", None))
        elif format_ is not None and format_.json_schema is not None:
            found.append(("response_format", "json_schema", format_.json_schema.schema_))
        if given is not None:
            found += [("structured_outputs", kind, value) for kind, value in given.forms()]
        guided = {"json": "json_schema", "regex": "regex", "choice": "choice", "grammar": "grammar"}
        values = {name: getattr(self, f"guided_{name}") for name in guided}
        found += [(f"guided_{name}", guided[name], value) for name, value in values.items() if value]
        if len(found) > 1:
            raise InvalidArgument(f"asks for a form, and so does {found[0][0]}", field=found[1][0])
        return (found[0][0], _form(*found[0])) if found else None

    def form_fields(self) -> dict[str, str]:
        """The name of the field that asks for a form, by lorarep's own names."""
        form = self.to_form()
        if form is None:
            return {}
        kind = form[1].WhichOneof("form")
        return dict.fromkeys(
            ("structured_output", "structured_output.json_schema", f"structured_output.{kind}"), form[0]
        )


def _form(field: str, kind: str, value: Any) -> generation_pb2.StructuredOutput:
    form = generation_pb2.StructuredOutput
    match kind:
        case "json_object":
            return form(json_object=form.AnyObject())
        case "json_schema":
            return form(json_schema=value if isinstance(value, str) else _text_of(value, field))
        case "choice":
            return form(choice=form.Choices(choices=value))
        case "regex":
            return form(regex=value)
    return form(grammar=value)


def _text_of(value: Json, field: str) -> str:
    """A JSON value as text. Raises InvalidArgument if it is nested too deep."""
    try:
        return json.dumps(value, ensure_ascii=False)
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(first_line(error), field=field) from error
