"""Folders that a command names, checked before torch is imported, which takes seconds."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from lorarep_server.sources import is_folder


def check_folders(base: str, kind: Literal["base", "config"], adapters: Iterable[str]) -> None:
    """Checks that the folders among the sources hold what they have to. Hub repositories are not looked at.

    Args:
        base: source of the base.
        kind: the part of the base that is needed.
        adapters: sources of adapters.

    Raises:
        LorarepError: as `hub.snapshot.fetch`.
    """
    from lorarep_runtime.hub.snapshot import fetch

    if is_folder(base):
        fetch(base, None, kind=kind, cache_dir=None)
    for source in filter(is_folder, adapters):
        fetch(source, None, kind="adapter", cache_dir=None)
