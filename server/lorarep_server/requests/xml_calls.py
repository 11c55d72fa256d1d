"""Calls of tools as Qwen3-Coder writes them: each argument between marks of its own, texts as they are.

<function=weather>
<parameter=city>
Köln
</parameter>
</function>
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from lorarep_runtime.errors import InvalidArgument
from lorarep_runtime.text.json_space import bounded_space

ABOUT = {"title", "description", "default", "examples", "deprecated"}
"""Keywords of a schema that do not restrict values."""
OF_TEXTS = ABOUT | {"type", "enum", "const"}
"""Keywords of texts that a grammar of this format keeps."""
OF_ARGUMENTS = ABOUT | {"type", "properties", "required", "additionalProperties", "$defs", "definitions", "$schema"}
OF_ARGUMENTS |= {"strict", "x-guidance"}
"""Keywords of a tool's parameters that a grammar of this format keeps."""
MOST_REFERENCES = 16
KEY = re.compile(r"[^<>\n]{1,256}")
END = "\n</parameter>\n"


def value_of(written: str, key: str, parameters: Mapping[str, Any]) -> Any:
    """An argument's value: the text where that is its type or none is known, else the JSON that it is.

    Args:
        written: the text between the marks, with the line breaks there.
        parameters: the schema of the tool's arguments.
    """
    text = written.removeprefix("\n").removesuffix("\n")
    properties = parameters.get("properties")
    schema = properties.get(key) if isinstance(properties, Mapping) else None
    if schema is None:
        return text
    if (of_text := _text_schema(schema, parameters)) is not None:
        return None if of_text[1] and text.lower() in ("null", "none") else text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # Python's True is JSON's true
        return {"true": True, "false": False, "none": None, "null": None}.get(text.strip().lower(), text)


def call_grammar(name: str, number: int, parameters: Mapping[str, Any], field: str) -> Iterator[str]:
    """The rules of Lark of a call: `call_NUMBER`, and those that it uses. Arguments come in the order of `properties`.

    Args:
        field: to name in errors.

    Raises:
        InvalidArgument: the schema has a keyword that the grammar cannot keep.
        ValueError: it is no schema.
    """
    properties, required = parameters.get("properties", {}), parameters.get("required", [])
    bound = {"maxProperties"} if parameters.get("maxProperties", 0) >= len(properties) else set()
    _check_keywords(parameters, OF_ARGUMENTS | bound, f"the parameters of {name!r}", field)
    if unknown := [key for key in required if key not in properties]:
        raise InvalidArgument(f"{unknown[0]!r} of {name!r} is required, and no property", field=field)
    parts = []
    for place, (key, schema) in enumerate(properties.items()):
        if not KEY.fullmatch(key):
            raise InvalidArgument(f"{key[:80]!r} of {name!r} cannot be written in the model's format", field=field)
        value = f"value_{number}_{place}"
        rule, end = _value(f"{name!r}: {key!r}", schema, parameters, field)
        part = f"{_literal(f'<parameter={key}>' + chr(10))} {value}"
        if end:
            yield f"{value}: {rule} {_literal(END)}"
        else:
            yield f"{value}[suffix={_literal(END)}]: {rule}"
        parts.append(part if key in required else f"({part})?")
    yield f"call_{number}: {_literal(f'<function={name}>' + chr(10))} {' '.join(parts)} {_literal('</function>')}"


def _value(named: str, schema: Any, parameters: Mapping[str, Any], field: str) -> tuple[str, bool]:
    """An argument's value in Lark, and whether its end has to be added: a free text goes up to it."""
    of_text = _text_schema(schema, parameters)
    if of_text is None:
        inside = {key: parameters[key] for key in ("$defs", "definitions", "x-guidance") if key in parameters}
        return json_by(inside | schema if isinstance(schema, dict) else schema), True
    resolved, is_nullable = of_text
    _check_keywords(resolved, OF_TEXTS, named, field)
    if (texts := resolved.get("enum", [resolved["const"]] if "const" in resolved else None)) is not None:
        texts = [text for text in texts if isinstance(text, str)]
        if not texts:
            raise InvalidArgument(f"no text is valid for {named}", field=field)
        return f"({' | '.join(map(_literal, texts + ['null'] * is_nullable))})", True
    return "/(?s:.*)/", False


def json_by(schema: Any) -> str:
    """JSON by a schema in Lark. Raises ValueError if it is none."""
    return f"%json {json.dumps(bounded_space(schema))}"


def _text_schema(schema: Any, root: Mapping[str, Any]) -> tuple[Mapping[str, Any], bool] | None:
    """The schema of a text, and whether null may be in its place, which is written like one; None of all others."""
    resolved = _resolved(schema, root)
    if not isinstance(resolved, Mapping):
        return None
    if (kinds := resolved.get("type")) is not None:
        kinds = [kinds] if isinstance(kinds, str) else kinds
        return (resolved, "null" in kinds) if sorted(kinds) in (["string"], ["null", "string"]) else None
    options = [_resolved(option, root) for option in resolved.get("anyOf", ())]
    if set(resolved) - ABOUT != {"anyOf"} or not all(isinstance(option, Mapping) for option in options):
        return None
    texts = [option for option in options if option.get("type") == "string"]
    others = [option for option in options if option.get("type") != "string"]
    return (texts[0], bool(others)) if len(texts) == 1 and all(o.get("type") == "null" for o in others) else None


def _resolved(schema: Any, root: Mapping[str, Any]) -> Any:
    """A schema, or the one inside of the same document that it refers to."""
    for _ in range(MOST_REFERENCES):
        reference = schema.get("$ref") if isinstance(schema, Mapping) else None
        if not isinstance(reference, str) or not reference.startswith("#/"):
            break
        schema = root
        for key in reference.removeprefix("#/").split("/"):
            schema = schema.get(key) if isinstance(schema, Mapping) else None
    return schema


def _check_keywords(schema: Mapping[str, Any], known: set[str], named: str, field: str) -> None:
    if other := sorted(set(schema) - known):
        raise InvalidArgument(
            f"{other[0]!r} of {named} cannot be kept in the model's format of calls: leave it out, or the model free",
            field=field,
        )


def _literal(text: str) -> str:
    return json.dumps(text)
