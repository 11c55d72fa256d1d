"""Sources of adapters and bases as people write them: Hub repositories and folders."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AdapterSource:
    """An adapter to load, written NAME=SOURCE[@REVISION]."""

    name: str
    source: str
    """A Hub repository id, also followed by a folder in it; or a folder, absolute or beginning with "." or "~"."""
    revision: str | None
    """A branch, tag or commit; None is the default branch."""

    @property
    def is_folder(self) -> bool:
        """Whether the source is a folder."""
        return is_folder(self.source)


def is_folder(source: str) -> bool:
    """Whether a source is a folder and not a Hub repository, by its spelling alone."""
    return source.startswith(("/", ".", "~"))


def split_revision(source: str) -> tuple[str, str | None]:
    """The source and the revision of "SOURCE[@REVISION]". A folder has no revision; its name may contain an @."""
    repository, at, revision = source.partition("@")
    return (source, None) if is_folder(source) or not at else (repository, revision)


def found_here(source: str) -> str:
    """What an operator's source means on this machine, where a folder that exists goes before a repository of its name,
    as in `transformers` and PEFT: such a folder is spelled "./...".

    For sources of callers this is not: they may not choose among the server's folders.
    """
    if is_folder(source) or not os.path.isdir(source):
        return source
    if source.count("/") <= 1:
        log.warning("%r is a folder here, so the Hub is not asked for a repository of that name", source)
    return f"./{source}"


def split_here(source: str) -> tuple[str, str | None]:
    """As `split_revision`, of an operator's source: the source is as `found_here` spells it."""
    whole = found_here(source)
    if is_folder(whole):
        return whole, None
    repository, revision = split_revision(source)
    return found_here(repository), revision
