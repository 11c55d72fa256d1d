"""The adapters file, which lists the adapters that a server keeps loaded: YAML, a mapping by name or a list.

metamath:
  repository: abacusai/Fewshot-Metamath-OrcaVicuna-Mistral-10B   # or a folder in one: org/name/checkpoint-430
  revision: main     # branch, tag or commit; default: the repository's default branch
  stack: deep        # named stack that its layer numbers count; default: its own `layer_replication`
  pinned: true       # never leaves the device for others; default: false
  priority: 10       # of those that may leave, the lowest goes first; default: 0
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lorarep_runtime.adapters.peft_config import check_name
from lorarep_runtime.errors import InvalidArgument
from lorarep_server.loading.load_queue import LoadRequest
from lorarep_server.sources import found_here, is_folder


@dataclass(frozen=True)
class DesiredAdapter:
    """An entry of the adapters file."""

    name: str
    repository: str
    """A Hub repository id, also followed by a folder in it; or a folder, absolute or beginning with "." or "~"."""
    revision: str | None = None
    stack: str | None = None
    pinned: bool = False
    priority: int = 0

    @property
    def load_request(self) -> LoadRequest:
        """The load of this entry, if nothing else has its name."""
        return LoadRequest(
            self.name,
            self.repository,
            self.revision,
            self.stack,
            trusted=True,
            pinned=self.pinned,
            priority=self.priority,
        )


TYPES: Mapping[str, tuple[type, str]] = {
    "repository": (str, "text"),
    "revision": (str, "text; numbers need quotes"),
    "stack": (str, "text; numbers need quotes"),
    "pinned": (bool, "true or false"),
    "priority": (int, "a whole number"),
}
FIELD = "adapters_file"
"""The field of errors about the file."""
PRIORITIES = range(-(1 << 31), 1 << 31)


def read_adapters(file: Path) -> dict[str, DesiredAdapter]:
    """The entries by their names.

    Raises:
        InvalidArgument: the file cannot be read, or is malformed. The message names the entry and its key.
    """
    at = repr(str(file))
    try:
        content = yaml.load(file.read_bytes(), _Loader)
    except Exception as error:  # malformed files make PyYAML raise many kinds of errors
        raise InvalidArgument(" ".join(f"{at}: {type(error).__name__}: {error}".split()), field=FIELD) from error
    if isinstance(content, dict):
        named = list(content.items())
    elif isinstance(content, list):
        named = [(_name_of(entry, f"{at}: entry {number}"), entry) for number, entry in enumerate(content, 1)]
    else:
        # An empty file is refused too: a truncated file must not unload all adapters.
        raise InvalidArgument(f"{at}: neither a mapping of names nor a list; {{}} stands for no adapters", field=FIELD)
    adapters: dict[str, DesiredAdapter] = {}
    for name, entry in named:
        try:
            adapter = _adapter(name, entry)
        except InvalidArgument as error:
            raise InvalidArgument(f"{at}: {name!r}: {error}", field=FIELD) from error
        if name in adapters:
            raise InvalidArgument(f"{at}: {name!r} is named twice", field=FIELD)
        adapters[name] = adapter
    return adapters


def _name_of(entry: object, at: str) -> object:
    if not isinstance(entry, dict) or "name" not in entry:
        raise InvalidArgument(f"{at}: not a mapping with a name", field=FIELD)
    return entry.pop("name")


def _adapter(name: object, entry: object) -> DesiredAdapter:
    from lorarep_runtime.hub.snapshot import check_allowed  # takes a while to import

    if not isinstance(name, str):
        raise InvalidArgument("has to be text; numbers need quotes", field="name")
    check_name(name)
    if not isinstance(entry, dict):
        raise InvalidArgument("not a mapping with a repository")
    for key, value in entry.items():
        if key not in TYPES:
            raise InvalidArgument(f"is none of {', '.join(TYPES)}", field=key)
        expected, description = TYPES[key]
        if type(value) is not expected:
            raise InvalidArgument(f"{value!r} has to be {description}", field=key)
    if "repository" not in entry:
        raise InvalidArgument("is missing", field="repository")
    adapter = DesiredAdapter(name, **{**entry, "repository": found_here(entry["repository"])})
    if not is_folder(adapter.repository):
        check_allowed(adapter.repository, ("*",))
    if adapter.priority not in PRIORITIES:
        raise InvalidArgument(f"{adapter.priority} is not within 32 bits", field="priority")
    return adapter


class _Loader(yaml.SafeLoader):
    """A safe loader that refuses duplicate keys, which YAML forbids and PyYAML accepts."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := {key for key in keys if keys.count(key) > 1}:
            raise yaml.constructor.ConstructorError(None, None, f"{min(twice)!r} is there twice", node.start_mark)
        return super().construct_mapping(node, deep)
