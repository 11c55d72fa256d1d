"""A stand-in for the Hugging Face Hub on loopback, for the demo and the tests.

It implements the part of the Hub's HTTP API that `huggingface_hub` needs to resolve a revision, list its files and
download them: https://huggingface.co/docs/hub/api. Clients find it at the `url` that `HF_ENDPOINT` names.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import parse_qs, unquote, urlsplit

LARGE_FILES = (".safetensors", ".bin", ".pt", ".pth", ".model")
"""Suffixes of files in LFS. Their entity tag is their SHA-256; that of other files is their git blob id."""
PAGE_COMMITS = 50
"""Commits of a history in one answer."""

_API = re.compile(r"/api/models/([^/]+(?:/[^/]+)??)(?:/(revision|tree|commits)/([^/]+)|/(refs))?")
_RESOLVE = re.compile(r"/([^/]+(?:/[^/]+)??)/resolve/([^/]+)/(.+)")
_RANGE = re.compile(r"bytes=(\d+)-(\d*)")


@dataclass(frozen=True)
class File:
    """A file of a commit."""

    data: bytes
    large: bool
    """Whether the file is in LFS."""

    @cached_property
    def blob_id(self) -> str:
        """The git blob id, in hex."""
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()

    @cached_property
    def sha256(self) -> str:
        """The SHA-256 of the content, in hex."""
        return hashlib.sha256(self.data).hexdigest()


@dataclass
class Repository:
    """The commits and references of a repository."""

    commits: dict[str, Mapping[str, File]] = field(default_factory=dict)
    """The files of each commit, by path; commits are by hash."""
    refs: dict[str, str] = field(default_factory=dict)
    """The commits of branches and tags, by name, and of pull requests, by "refs/pr/" and number."""
    parents: dict[str, str] = field(default_factory=dict)
    """The commit before each commit that has one."""


class HubStandIn:
    """Serves published repositories from memory. Use as a context manager, or call `close` at the end."""

    def __init__(self, handler: type[HubHandler] | None = None) -> None:
        self.repositories: dict[str, Repository] = {}
        self._server = HubServer(("127.0.0.1", 0), handler or HubHandler)
        self._server.hub = self
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()

    def publish(self, repository: str, folder: Path, *, branch: str = "main") -> str:
        """Commits the files of a folder, and moves a branch to the commit. Earlier commits stay.

        Returns:
            The hash of the commit.
        """
        files = {
            path.relative_to(folder).as_posix(): File(path.read_bytes(), path.suffix in LARGE_FILES)
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        stored = self.repositories.setdefault(repository, Repository())
        parent = stored.refs.get(branch, "")
        tree = [parent, *(f"{path} {file.blob_id}" for path, file in files.items())]
        commit = hashlib.sha1("\n".join(tree).encode()).hexdigest()
        stored.commits[commit] = files
        stored.refs[branch] = commit
        if parent and parent != commit:
            stored.parents[commit] = parent
        return commit

    def tag(self, repository: str, name: str, commit: str) -> None:
        """Makes a tag of a commit."""
        self.repositories[repository].refs[name] = commit

    def close(self) -> None:
        """Stops listening: further connections are refused."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class HubServer(ThreadingHTTPServer):
    """The HTTP server: a thread for each connection, and one request for each connection."""

    hub: HubStandIn


class HubHandler(BaseHTTPRequestHandler):
    """Answers one request. Tests override `answer` and `send_body` to inject faults."""

    server: HubServer

    def do_GET(self) -> None:
        self.answer()

    def do_HEAD(self) -> None:
        self.answer()

    def answer(self) -> None:
        """Answers a GET or HEAD request."""
        path = urlsplit(self.path).path
        try:
            if match := _API.fullmatch(path):
                repository, kind, revision, refs = match.groups()
                commit, files = self._find(repository, unquote(revision or "main"))
                stored = self.server.hub.repositories[repository]
                if refs:
                    self.send_json(_refs(stored))
                elif kind == "commits":
                    self._send_history(_history(stored, commit))
                else:
                    self.send_json(_tree(files) if kind == "tree" else _info(repository, commit, files))
            elif match := _RESOLVE.fullmatch(path):
                repository, revision, name = match.groups()
                commit, files = self._find(repository, unquote(revision))
                self._send_file(commit, files, unquote(name))
            else:
                self.send(404)
        except _MissingError as missing:
            code, message = missing.args
            self.send(404, {"X-Error-Code": code, "X-Error-Message": message})

    def send(self, status: int, headers: Mapping[str, str] | None = None, body: bytes = b"") -> None:
        """Sends a whole response; for HEAD without the body."""
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.send_body(body)

    def send_json(self, value: object, headers: Mapping[str, str] | None = None) -> None:
        """Sends a response of JSON."""
        self.send(200, {"Content-Type": "application/json", **(headers or {})}, json.dumps(value).encode())

    def send_body(self, body: bytes) -> None:
        """Sends the body of a response."""
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Logs nothing, where `BaseHTTPRequestHandler` writes each request to stderr."""

    def _find(self, repository: str, revision: str) -> tuple[str, Mapping[str, File]]:
        stored = self.server.hub.repositories.get(repository)
        if stored is None:
            raise _MissingError("RepoNotFound", "Repository not found")
        commit = stored.refs.get(revision, revision)
        if commit not in stored.commits:
            raise _MissingError("RevisionNotFound", f"Invalid rev id: {revision}")
        return commit, stored.commits[commit]

    def _send_history(self, history: Sequence[object]) -> None:
        url = urlsplit(self.path)
        page = int(parse_qs(url.query).get("p", ["0"])[0])
        end = (page + 1) * PAGE_COMMITS
        link = {"Link": f'<{self.server.hub.url}{url.path}?p={page + 1}>; rel="next"'} if end < len(history) else {}
        self.send_json(history[end - PAGE_COMMITS : end], link)

    def _send_file(self, commit: str, files: Mapping[str, File], name: str) -> None:
        if name not in files:
            raise _MissingError("EntryNotFound", "Entry not found")
        file = files[name]
        size = len(file.data)
        headers = {
            "X-Repo-Commit": commit,
            "ETag": f'"{file.sha256 if file.large else file.blob_id}"',
            "Accept-Ranges": "bytes",
            "Content-Type": "application/octet-stream",
        }
        if file.large:
            headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(size)}
        asked = _RANGE.fullmatch(self.headers.get("Range", ""))
        if asked is None:
            self.send(200, headers, file.data)
        elif (start := int(asked[1])) >= size:
            self.send(416, {**headers, "Content-Range": f"bytes */{size}"})
        else:
            stop = min(int(asked[2]) + 1, size) if asked[2] else size
            self.send(206, {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{size}"}, file.data[start:stop])


class _MissingError(Exception):
    """An object that does not exist; the arguments are the Hub's error code and message."""


def _info(repository: str, commit: str, files: Mapping[str, File]) -> object:
    siblings = [
        {"rfilename": path, "size": len(file.data), "blobId": file.blob_id, **_large(file, "sha256")}
        for path, file in files.items()
    ]
    return {"id": repository, "sha": commit, "private": False, "gated": False, "tags": [], "siblings": siblings}


def _refs(stored: Repository) -> object:
    branches = [
        {"name": name, "ref": f"refs/heads/{name}", "targetCommit": commit}
        for name, commit in stored.refs.items()
        if not name.startswith("refs/")
    ]
    return {"branches": branches, "tags": [], "converts": []}


def _history(stored: Repository, commit: str | None) -> Sequence[object]:
    found = []
    while commit is not None:
        date = "2026-01-01T00:00:00.000Z"
        found.append({"id": commit, "authors": [], "date": date, "title": "", "message": ""})
        commit = stored.parents.get(commit)
    return found


def _tree(files: Mapping[str, File]) -> object:
    return [
        {"type": "file", "path": path, "size": len(file.data), "oid": file.blob_id, **_large(file, "oid")}
        for path, file in files.items()
    ]


def _large(file: File, digest: str) -> Mapping[str, object]:
    if not file.large:
        return {}
    return {"lfs": {digest: file.sha256, "size": len(file.data), "pointerSize": 134}}
