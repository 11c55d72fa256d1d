"""An adapter's weights file, from its check to its last read: what is written to it meanwhile ends one load alone.

It is read into plain memory. A mapped file that somebody cuts ends the whole process, by SIGBUS.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lorarep_runtime.errors import DataLoss


@dataclass(frozen=True)
class WeightsFile:
    """A file at one moment."""

    path: Path
    version: tuple[int, ...]
    """Device, inode, bytes, and nanoseconds of the last change: others once it is overwritten or replaced."""

    @classmethod
    def at(cls, path: Path) -> WeightsFile:
        """The file that is at a path now. Raises DataLoss where there is none to read."""
        try:
            return cls(path, _version(path))
        except OSError as error:
            raise DataLoss(str(error), field=path.name) from error

    @property
    def is_there(self) -> bool:
        """Whether the path still leads to the file as it was."""
        try:
            return _version(self.path) == self.version
        except OSError:
            return False

    @contextmanager
    def opened(self) -> Iterator[int]:
        """A context of the file's descriptor, in which all that is read is of the file as it was.

        Raises:
            DataLoss: the file cannot be read, is another one, or has been written to before the context's end.
        """
        try:
            file = os.open(self.path, os.O_RDONLY)
            try:
                self._check(file)
                yield file
                self._check(file)
            finally:
                os.close(file)
        except (OSError, EOFError) as error:
            raise DataLoss(str(error), field=self.path.name) from error

    def _check(self, file: int) -> None:
        if _version(file) != self.version:
            raise DataLoss("is not what it was when it was checked", field=self.path.name)


def _version(file: Path | int) -> tuple[int, ...]:
    found = os.stat(file)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
