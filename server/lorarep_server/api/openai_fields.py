"""What the JSON requests of OpenAI's API have in common: their types, and how they take unknown fields.

An unknown field is refused, unless it asks for nothing. A validation whose context is a list ignores it instead, and
adds its name to that.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationInfo, model_validator
from pydantic_core import PydanticCustomError

from lorarep_runtime.errors import shown

UInt32 = Annotated[int, Field(ge=0, lt=1 << 32)]
Token = Annotated[int, Field(strict=False, ge=0, lt=1 << 32)]
"""A token as a key, which JSON writes as a text."""
Int64 = Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)]
Name = Annotated[str, Field(max_length=256)]
Nothing = Annotated[list[Any], Field(max_length=0)]
"""An empty list."""
NEUTRAL: tuple[object, ...] = (None, "", [], {}, "auto")
"""Values of an unknown field that ask for nothing."""
MOST_CHOICES = 128
"""Most answers to one prompt."""
MOST_DEPTH = 16
"""Most objects and lists in each other: protobuf, whose messages are three for each, takes 100 messages."""
T = TypeVar("T")
Listed = Annotated[list[T], Field(fail_fast=True, max_length=1 << 20)]
"""A list that is checked up to its first wrong item: reports of a million items would block the server for seconds."""


class Message(BaseModel):
    """A JSON object of a request: types are not converted, unknown fields are refused, and null means unset."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _without_neutral(cls, given: Any, info: ValidationInfo) -> Any:
        if not isinstance(given, dict):
            return given
        aliases = {known.alias for known in cls.model_fields.values()}
        unknown = [name for name in given if name not in cls.model_fields and name not in aliases]
        left_out = {name for name in unknown if given[name] in NEUTRAL}
        if isinstance(info.context, list):
            info.context.extend(sorted(set(unknown) - left_out))
            left_out.update(unknown)
        return {name: value for name, value in given.items() if value is not None and name not in left_out}


class WeightedAdapter(Message):
    """An adapter of several that an answer is computed with."""

    name: Name
    weight: float = 1.0


class StreamOptions(Message):
    """The options of a streamed response."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False
    continuous_usage_stats: bool = False
    """Whether each chunk has the usage so far, where `include_usage` asks for any."""


class TextPart(Message):
    """A text part of a chat message's content."""

    type: Literal["text"]
    text: str

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, given: Any) -> Any:
        kind = given.get("type") if isinstance(given, dict) else None
        if isinstance(kind, str) and kind != "text":
            raise PydanticCustomError("part", "a part of type {kind}: only text is supported", {"kind": shown(kind)})
        return given


def _content_kind(content: Any) -> str:
    return "its parts" if isinstance(content, list) else "its text"


Content = Annotated[
    Annotated[str, Tag("its text")] | Annotated[Listed[TextPart], Tag("its parts")], Discriminator(_content_kind)
]
"""The content of a chat message. Told apart by its type, so that an error is about the kind that it is."""
