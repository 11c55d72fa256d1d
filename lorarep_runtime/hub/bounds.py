"""What a repository may send that no operator has named: whose commit, which files, and how many bytes of each.

Anybody may open a pull request at a repository of the Hub, and so put files there under the repository's name. The
bounds hold before a file is on the disk: names and sizes come from the Hub's list of the commit.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

from huggingface_hub import HfApi, RepoFile, get_cached_repo_tree
from huggingface_hub.errors import CachedRepoTreeNotFoundError
from huggingface_hub.utils import build_hf_headers, paginate  # type: ignore[attr-defined]  # public, but in no __all__

from lorarep_runtime.errors import FailedPrecondition, NotFound, PermissionDenied
from lorarep_runtime.hub.cache import snapshot_folder
from lorarep_runtime.hub.files import Part

MAX_FILES = 10_000
"""Most files of a repository, its subfolders included."""
MAX_COMMITS = 1000
"""Most commits, of all branches and tags together, among which a commit is looked for: a request shows 50 of them."""
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Bounds:
    """Most bytes of an adapter's files."""

    config: int
    """Most bytes of its config."""
    tokenizer: int
    """Most bytes of all files of its tokenizer together."""
    weights: Callable[[Path], int]
    """Most bytes of its weights, by the folder that holds its config. May raise a LorarepError."""
    make_room: Callable[[int], None]
    """Told of the bytes that are about to come; raises Exhausted where the disk has no room for them."""
    allowed: Sequence[str]
    """Patterns of what callers may name, as in `hub.snapshot.check_allowed`: no message speaks of other folders."""


def resolve(api: HfApi, repository: str, revision: str | None, part: Part, cache_dir: Path | None) -> str:
    """The commit of a revision, which is a branch, a tag, or a commit of one of them.

    A commit of which the cache has the part's weights is taken without asking: it has been resolved here, or an
    operator has fetched it. Other parts of that commit may come from anybody.

    Raises:
        NotFound: no branch or tag has the name.
        PermissionDenied: it is a pull request, or a commit of no branch or tag.
    """
    if revision is None:
        return _commit(api, repository, None)
    if revision.startswith("refs/"):
        raise PermissionDenied(
            f"{revision!r} may be a pull request; a branch, a tag or a commit of one is permitted", field="revision"
        )
    is_commit = _COMMIT.fullmatch(revision) is not None
    if is_commit and _has_weights(snapshot_folder(repository, revision, cache_dir), part):
        return revision
    refs = api.list_repo_refs(repository)
    ours = [*refs.branches, *refs.tags]
    if any(ref.name == revision for ref in ours):
        return _commit(api, repository, revision)
    if not is_commit:
        raise NotFound(f"{repository} has no branch or tag {revision!r}", field="revision")
    heads = dict.fromkeys(ref.target_commit for ref in ours)
    histories = chain(heads, *(_history(api, repository, head) for head in heads))
    if revision in islice(histories, len(heads) + MAX_COMMITS):
        return revision
    raise PermissionDenied(
        f"{revision} is none of the latest {MAX_COMMITS} commits of the branches and tags of {repository}",
        field="revision",
    )


def listed(api: HfApi, repository: str, commit: str, part: Part, cache_dir: Path | None) -> Sequence[RepoFile]:
    """The files of a commit, of which a part is wanted.

    Raises:
        FailedPrecondition: they are too many.
    """
    folder = snapshot_folder(repository, commit, cache_dir)
    if _has_weights(folder, part):
        with suppress(CachedRepoTreeNotFoundError):
            return get_cached_repo_tree(repository, revision=commit, cache_dir=cache_dir)
    # Anew, as long as there are no weights: the client remembers a list, and a wrong one would be remembered too.
    found = list(islice(api.list_repo_tree(repository, recursive=True, revision=commit), MAX_FILES + 1))
    if len(found) > MAX_FILES:
        raise FailedPrecondition(f"{repository} has over {MAX_FILES} files", field="repository")
    return [file for file in found if isinstance(file, RepoFile)]


def check_small(files: Sequence[RepoFile], part: Part, bounds: Bounds) -> None:
    """Checks the sizes of an adapter's config and tokenizer.

    Raises:
        FailedPrecondition: naming a file that is too large.
    """
    _check_size([file for file in files if file.path == part.config], bounds.config)
    _check_size([file for file in files if part.is_of_tokenizer(file.path)], bounds.tokenizer)


def check_weights(files: Sequence[RepoFile], part: Part, folder: Path, bounds: Bounds) -> None:
    """Checks the size of weights that a commit's folder does not hold yet, by the config there.

    Raises:
        LorarepError: as `Bounds.weights`; FailedPrecondition if the weights are too large.
    """
    weights = [file for file in files if file.path in part.weights and not (folder / file.path).exists()]
    if weights and (folder / part.config).exists():
        _check_size(weights, bounds.weights(folder / part.subfolder))


def _has_weights(folder: Path, part: Part) -> bool:
    return any((folder / name).exists() for name in part.weights)


def _check_size(files: Sequence[RepoFile], most: int) -> None:
    size = sum(file.size for file in files)
    if size > most:
        largest = max(files, key=lambda file: file.size)
        raise FailedPrecondition(
            f"{size} bytes are over the limit of {most}; nothing is downloaded", field=largest.path
        )


def _commit(api: HfApi, repository: str, revision: str | None) -> str:
    commit = api.model_info(repository, revision=revision).sha
    if commit is None:
        raise ValueError("the hub names no commit")
    return commit


def _history(api: HfApi, repository: str, head: str) -> Iterator[str]:
    """The commits that lead to a head, the latest first; each page is asked for when it is needed.

    `HfApi.list_repo_commits` asks for all pages at once.
    """
    headers = build_hf_headers(token=api.token, library_name=api.library_name)
    path = f"{api.endpoint}/api/models/{repository}/commits/{head}"
    for commit in paginate(path, params={}, headers=headers):
        yield commit["id"]
