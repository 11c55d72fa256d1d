"""Where adapters come from: Hub repositories and folders, as people write them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AdapterSource:
    """An adapter to load, as NAME=SOURCE[@REVISION]."""

    name: str
    source: str
    """Hub repository id; or a folder, absolute or beginning with "." or "~"."""
    revision: str | None

    @property
    def is_folder(self) -> bool:
        return is_folder(self.source)


def is_folder(source: str) -> bool:
    """Whether a source is a folder and no Hub repository, by its looks alone."""
    return source.startswith(("/", ".", "~"))


def split_revision(source: str) -> tuple[str, str | None]:
    """SOURCE and REVISION of "SOURCE[@REVISION]"; a folder has no revision, and may have an @ in its name."""
    repository, at, revision = source.partition("@")
    return (source, None) if is_folder(source) or not at else (repository, revision)
