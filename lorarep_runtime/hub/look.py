"""A look at an adapter before its weights come: at its config, and at the header that its weights begin with."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Protocol

from huggingface_hub import HfApi, RepoFile, hf_hub_url
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status  # type: ignore[attr-defined]

from lorarep_runtime.errors import FailedPrecondition, InvalidArgument, first_line
from lorarep_runtime.hub.files import Part, check_pointers

log = logging.getLogger(__name__)

LENGTH = 8
"""Bytes that say how many bytes a safetensors header has (https://huggingface.co/docs/safetensors)."""


class Look(Protocol):
    """What is to be said of an adapter before its weights come."""

    def config(self, folder: Path) -> int:
        """Looks at the config in a folder.

        Returns:
            Most bytes of the header of weights that fit it.

        Raises:
            LorarepError: the adapter is refused.
        """

    def header(self, file: Path) -> None:
        """Looks at a file that is as long as the weights and begins with their header, by the config looked at before.

        Raises:
            LorarepError: the adapter is refused, or, as DataLoss, the file is not whole.
        """


def look_at(
    look: Look, api: HfApi, repository: str, part: Part, folder: Path, files: Sequence[RepoFile] | None
) -> None:
    """Looks at an adapter whose config is here. What cannot be seen before the download will be seen after it.

    Args:
        folder: of the commit in the cache.
        files: of the commit; None where nobody has listed them.

    Raises:
        FailedPrecondition, InvalidArgument: the adapter is refused.
    """
    if not (folder / part.config).exists():
        return
    check_pointers(folder / part.subfolder, part.kind)
    most = look.config(folder / part.subfolder)
    weights = [file for file in files or () if file.path in part.weights]
    for file in weights if part.kind == "adapter" else ():
        if (folder / file.path).exists():
            continue
        try:
            with _beginning(api, repository, folder.name, file, most) as begun:
                look.header(begun)
        except (FailedPrecondition, InvalidArgument):
            raise
        except Exception as error:  # of any class: the download asks again, and tries more often
            log.info("%s: the header of its weights is looked at after the download: %s", repository, first_line(error))


@contextmanager
def _beginning(api: HfApi, repository: str, commit: str, file: RepoFile, most: int) -> Iterator[Path]:
    """A file that is as long as one of the Hub's and begins with its header; what follows is zeros, and takes no disk.

    Args:
        most: bytes of the header that are asked for.

    Raises:
        Exception: of any class, if the Hub does not answer properly.
    """
    url = hf_hub_url(repository, file.path, revision=commit, endpoint=api.endpoint)
    headers = build_hf_headers(token=api.token, library_name=api.library_name)
    last = min(LENGTH + most, file.size) - 1
    with get_session().stream(
        "GET", url, headers={**headers, "Range": f"bytes=0-{last}"}, follow_redirects=True
    ) as response:
        hf_raise_for_status(response)
        begun, wanted = bytearray(), last + 1
        for chunk in response.iter_raw():
            begun += chunk
            if len(begun) >= LENGTH:
                wanted = min(last + 1, LENGTH + int.from_bytes(begun[:LENGTH], "little"))
            if len(begun) >= wanted:
                break  # also of a storage that does not know ranges
    if len(begun) < wanted:
        raise ConnectionError("the connection broke")
    with tempfile.TemporaryDirectory(prefix="lorarep-header-") as folder:
        path = Path(folder, PurePosixPath(file.path).name)
        with path.open("wb") as opened:
            opened.write(begun[:wanted])
            opened.truncate(file.size)
        yield path
