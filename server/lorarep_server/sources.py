"""Sources of adapters as people write them: Hub repositories and folders."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AdapterSource:
    """An adapter to load, written NAME=SOURCE[@REVISION]."""

    name: str
    source: str
    """A Hub repository id; or a folder, absolute or beginning with "." or "~"."""
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
