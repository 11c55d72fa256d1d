"""Files that are read again when they change while the server runs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from lorarep_runtime.errors import InvalidArgument

log = logging.getLogger(__name__)

T = TypeVar("T")


class WatchedFiles(Generic[T]):
    """The content of some files, as `read` parses it, and their changes."""

    def __init__(self, files: Sequence[Path], read: Callable[[], T]) -> None:
        """
        Args:
            files: the files whose changes are noticed.
            read: reads and parses the files.

        Raises:
            InvalidArgument: `read` cannot use the files.
        """
        self._files = files
        self._read = read
        self._complaint = ""
        # The state is taken before the content: a write between the two makes the files read again.
        self._seen = self._state()
        self.first = read()
        """The content at the start."""

    def changed(self) -> T | None:
        """The content, if the files have changed and can be used; else None. Unusable files are logged once."""
        state = self._state()
        if state == self._seen:
            return None
        try:
            value = self._read()
        except InvalidArgument as error:
            if (complaint := str(error)) != self._complaint:
                log.error("%s; what was read before stays in force", complaint)
            self._complaint = complaint
            return None
        self._seen, self._complaint = state, ""
        log.info("read again: %s", ", ".join(map(str, self._files)))
        return value

    def _state(self) -> list[tuple[int, ...] | None]:
        return [_state(file) for file in self._files]


def _state(file: Path) -> tuple[int, ...] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino, found.st_dev
