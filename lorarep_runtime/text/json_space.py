"""Space in answers of JSON."""

from __future__ import annotations

from typing import Any

WHITESPACE = r"[ \n\r\t]{1,64}"
"""Space at a place where JSON may have any: a model that writes nothing else would never end."""


def bounded_space(schema: Any) -> dict[str, Any]:
    """A JSON Schema, as llguidance takes it, with a bound of the space in its texts, unless it has one.

    Raises:
        ValueError: it is no schema, or one of nothing.
    """
    if not isinstance(schema, dict | bool):
        raise ValueError("a schema is an object or a boolean")
    if schema is False:
        raise ValueError("nothing is valid by this schema")
    schema = {} if schema is True else schema
    own = schema.get("x-guidance", {})
    if not isinstance(own, dict):
        raise ValueError("x-guidance is no object")
    # The pattern would decide where both are there.
    bound = {} if own.get("whitespace_flexible") is False else {"whitespace_pattern": WHITESPACE}
    return {**schema, "x-guidance": {**bound, **own}}
