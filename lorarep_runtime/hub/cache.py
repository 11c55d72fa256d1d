"""The Hub cache of one repository: contents that are known to be whole, and the removal of all others.

models--org--name/
  blobs/      contents, each named by its hash; parts of downloads end in ".incomplete"
  snapshots/  one folder a commit, whose files are links to blobs
  refs/       one file a branch or tag: its commit
  trees/      one file a commit: the files that the Hub lists, with their hashes
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path

from huggingface_hub import RepoFile, constants
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils.sha import git_hash

from lorarep_runtime.errors import DataLoss
from lorarep_runtime.hub.files import file_digest

ABANDONED_SECONDS = 3600.0
"""Age of a partial download, since its last byte, from which on its process is taken for dead."""


def known_blobs(repository: str, cache_dir: Path | None) -> set[str]:
    """Names of the contents that the cache holds of a repository, before anything else is downloaded.

    Args:
        repository: its id.
        cache_dir: Hub cache; None is huggingface_hub's default.
    """
    return {path.name for path in _blobs(repository, cache_dir).glob("*")}


def remove_abandoned_parts(repository: str, cache_dir: Path | None) -> None:
    """Removes parts that killed processes have left of a repository's downloads: no client continues another's."""
    for part in _blobs(repository, cache_dir).glob("*.incomplete"):
        with suppress(OSError):
            if time.time() - part.stat().st_mtime > ABANDONED_SECONDS:
                part.unlink()


def check_contents(folder: Path, tree: Sequence[RepoFile], known: Collection[str]) -> None:
    """Checks new contents of a snapshot against the Hub's list, and removes wrong ones from the cache.

    The client compares sizes alone, and those with the headers of the same answer.

    Args:
        folder: the snapshot's.
        tree: the files of the commit, as the Hub lists them.
        known: blobs that were checked earlier.

    Raises:
        DataLoss: a file has other contents.
    """
    wrong = [file.path for file in tree if (folder / file.path).exists() and not _is_whole(folder, file, known)]
    for name in wrong:
        path = folder / name
        with suppress(FileNotFoundError):  # another load of the repository has removed it
            (path.parent / path.readlink() if path.is_symlink() else path).unlink()
        path.unlink(missing_ok=True)
    if wrong:
        # The list goes as well: it may be the wrong one of the two.
        (folder.parents[1] / "trees" / f"{folder.name}.json").unlink(missing_ok=True)
        raise DataLoss("what came is not what the hub lists", field=wrong[0])


def _is_whole(folder: Path, file: RepoFile, known: Collection[str]) -> bool:
    path = folder / file.path
    try:
        if path.is_symlink() and path.readlink().name in known:
            return True
        return git_hash(path.read_bytes()) == file.blob_id if file.lfs is None else file_digest(path) == file.lfs.sha256
    except FileNotFoundError:  # another load of the repository has found it wrong
        return False


def snapshot_folder(repository: str, commit: str, cache_dir: Path | None) -> Path:
    """The folder of a commit's snapshot, which may not exist."""
    return _folder(repository, cache_dir) / "snapshots" / commit


def remember_ref(repository: str, name: str, commit: str, cache_dir: Path | None) -> None:
    """Notes the commit of a branch or tag where clients look while the Hub cannot be reached."""
    ref = _folder(repository, cache_dir) / "refs" / name
    ref.parent.mkdir(parents=True, exist_ok=True)
    new = ref.with_name(f".{ref.name}.{uuid.uuid4().hex}")
    new.write_text(commit)
    new.replace(ref)


def _blobs(repository: str, cache_dir: Path | None) -> Path:
    return _folder(repository, cache_dir) / "blobs"


def _folder(repository: str, cache_dir: Path | None) -> Path:
    return Path(cache_dir or constants.HF_HUB_CACHE, repo_folder_name(repo_id=repository, repo_type="model"))
