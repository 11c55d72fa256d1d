"""What is said of an adapter before its weights come: by its config, and by the header that its weights begin with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lorarep_runtime.adapters.header import Expected, Header, checked_header, most_file_bytes, most_header_bytes
from lorarep_runtime.adapters.peft_config import AdapterConfig
from lorarep_runtime.errors import FailedPrecondition, InvalidArgument, shown
from lorarep_runtime.model.compiled_adapter import Layout


class AdapterLook:
    """The look at one adapter of a base: a `hub.look.Look`.

    Args:
        expected: what the config in a folder says. May raise a LorarepError.
        prefix: path of the base's list of layers.
        base: repository or folder of the base.
    """

    def __init__(self, expected: Callable[[Path], Expected], prefix: str, base: str) -> None:
        self._expect = expected
        self._prefix = prefix
        self._base = base
        self._found: Expected | None = None
        self._layout: Layout | None = None
        """The entries that the header has, once it has been seen."""

    def expected(self, folder: Path) -> Expected:
        """What the config in a folder says, found once. Raises as `expected` does."""
        if self._found is None:
            self._found = self._expect(folder)
        return self._found

    def config(self, folder: Path) -> int:
        found = self.expected(folder)
        return most_header_bytes(found.config, found.layout, self._prefix)

    def most_file_bytes(self, folder: Path) -> int:
        """Most bytes of the weights, by the config in a folder and the header, if that has been seen.

        Raises as `expected` does.
        """
        found = self.expected(folder)
        return most_file_bytes(found, found.layout if self._layout is None else self._layout, self._prefix)

    def header(self, file: Path) -> None:
        assert self._found is not None
        _, self._layout = fitting_header(file, self._found, self._prefix, self._base)


def fitting_header(file: Path, expected: Expected, prefix: str, base: str) -> tuple[Header, Layout]:
    """The header of a weights file that is what a config promises, and its entries.

    Args:
        prefix, base: as for `AdapterLook`.

    Raises:
        LorarepError: as `checked_header`.
    """
    with naming_bases(expected.config, base):
        return checked_header(file, expected, prefix)


@contextmanager
def naming_bases(config: AdapterConfig, base: str) -> Iterator[None]:
    """Adds to the reason why an adapter does not fit a base which base it was trained on, if that has another name."""
    try:
        yield
    except (FailedPrecondition, InvalidArgument) as error:
        if (trained_on := other_base(config, base)) is None:
            raise
        bases = f"it was trained on {shown(trained_on)}, and the base here is {base}"
        raise type(error)(f"{error.message}; {bases}", field=error.field) from error


def other_base(config: AdapterConfig, base: str) -> str | None:
    """The base that an adapter was trained on, by its config, if that has another name than a base."""
    trained_on = config.base_model_name_or_path
    is_same = trained_on is None or Path(trained_on).name.lower() == Path(base).name.lower()
    return None if is_same else trained_on
