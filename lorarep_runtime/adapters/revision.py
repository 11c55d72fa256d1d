"""A revision of an adapter: its repository at a commit, checked against the base, compiled whenever it is wanted."""

from __future__ import annotations

from dataclasses import dataclass

from lorarep_runtime.adapters.files import AdapterFiles, CheckedFiles
from lorarep_runtime.adapters.resident import Resident, Tier
from lorarep_runtime.errors import FailedPrecondition
from lorarep_runtime.hub.snapshot import LOCAL
from lorarep_runtime.model.compiled_adapter import Adapter, file_parameters, largest_rank
from lorarep_runtime.model.stack import Stack
from lorarep_runtime.progress import Progress
from lorarep_runtime.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class AdapterInfo:
    """A named adapter as callers see it. Repository, commit, digest and stack identify its revision."""

    name: str
    repository: str
    """Repository id, also followed by a folder in it, or the path of a folder of this machine."""
    commit: str
    digest: str
    """SHA-256 of the weights file, in hexadecimal."""
    stack: Stack
    kind: str
    """"lora" or "dora"."""
    rank: int
    """Largest rank of its modules."""
    parameters: int
    """Numbers in its weights file."""
    tier: Tier
    """The fastest memory that it is in. The next request gets this revision whatever memory that is."""
    bytes: int
    """Bytes that it takes on the device."""
    references: int
    """Number of requests that hold it."""
    pinned: bool
    """Whether it never leaves the device."""
    priority: int
    """The adapter with the lowest priority leaves the device first, of those that may leave."""


class Revision(Resident):
    """The adapter behind a name. It stays the same for as long as the server runs, whichever memory its weights are in.

    Args:
        files: finds and compiles the files again when no memory holds the weights.
        name: of the adapter.
        stack_name: named stack that the adapter was loaded for; None is its own.
        checked: its files.
        trusted: as for `AdapterRegistry.load`.

    Raises:
        FailedPrecondition: its tokenizer cannot be loaded.
    """

    def __init__(
        self, files: AdapterFiles, name: str, stack_name: str | None, checked: CheckedFiles, *, trusted: bool
    ) -> None:
        super().__init__(files.maker.size(checked.layout))
        self.name = name
        self.repository, self.commit = checked.snapshot.source, checked.snapshot.commit
        self.cached_repository = checked.snapshot.repository
        """The repository in the Hub cache, without a folder in it."""
        self.stack = checked.stack
        self.kind = "dora" if checked.config.use_dora else "lora"
        self.rank = largest_rank(checked.layout.values())
        self.parameters = file_parameters(checked.layout)
        self._files = files
        self._stack_name = stack_name
        self._checked: CheckedFiles | None = checked
        self._digest = checked.digest
        self._fingerprint = checked.config.fingerprint
        self._trusted = trusted
        self.vocab_size = files.vocab_size(checked.layout)
        """Number of tokens of its vocabulary."""
        self.invocation = checked.config.alora_invocation_tokens
        """Tokens from which on it adapts a sequence, as for `Lease`."""
        self._tokenizer: Tokenizer | None = files.tokenizer(checked.snapshot.folder, self.vocab_size, trusted=trusted)

    @property
    def label(self) -> str:
        return self.name

    @property
    def digest(self) -> str:
        """SHA-256 of the weights file, in hexadecimal; blocks until it is computed. Raises DataLoss."""
        return self._digest.result()

    @property
    def content(self) -> str:
        """What it computes on its stack: equal where weights and config are equal. Blocks as `digest`."""
        return f"{self.digest} {self._fingerprint}"

    def wait_for_digest(self) -> None:
        """Blocks until `digest` has something to return. Raises DataLoss where the file cannot be read."""
        self._digest.result()

    def is_same(self, checked: CheckedFiles) -> bool:
        """Whether files are those of this revision. Blocks until their digest is computed."""
        snapshot = checked.snapshot
        ours = (self.repository, self.commit, self.stack, self._fingerprint)
        theirs = (snapshot.source, snapshot.commit, checked.stack, checked.config.fingerprint)
        return ours == theirs and self.digest == checked.digest.result()

    @property
    def has_tokenizer(self) -> bool:
        """Whether `tokenizer` returns without a look at the disk."""
        return self._tokenizer is not None

    def tokenizer(self) -> Tokenizer:
        """The tokenizer of its requests, loaded again if it has gone with the weights.

        Raises:
            LorarepError: as `hub.snapshot.fetch` and `Tokenizer`.
        """
        tokenizer = self._tokenizer
        if tokenizer is None:
            folder = self._files.fetch(*self._source, trusted=True).folder
            tokenizer = self._tokenizer = self._files.tokenizer(folder, self.vocab_size, trusted=self._trusted)
        return tokenizer

    def info(self) -> AdapterInfo:
        """The revision as callers see it now. Blocks until its digest is computed."""
        tier = self.tier
        return AdapterInfo(
            name=self.name,
            repository=self.repository,
            commit=self.commit,
            digest=self.digest,
            stack=self.stack,
            kind=self.kind,
            rank=self.rank,
            parameters=self.parameters,
            tier=tier,
            bytes=self.size if tier == "device" else 0,
            references=self.leases,
            pinned=self.pinned,
            priority=self.priority,
        )

    @property
    def _source(self) -> tuple[str, str | None]:
        """The repository or folder, and the revision to ask for: trusted, since this commit has been checked once."""
        return self.repository, None if self.commit == LOCAL else self.commit

    def make(self, progress: Progress | None) -> Adapter:
        # Used once: layouts of thousands of adapters would be gigabytes.
        checked, self._checked = self._checked, None
        if checked is not None and not checked.weights.is_there:
            checked = None  # the files have left the disk since, or are others
        if checked is None:
            checked = self._files.check(*self._source, self._stack_name, progress, trusted=True)
        adapter = self._files.compile(checked, progress)
        if not self.is_same(checked):
            raise FailedPrecondition(f"{self.name!r}: {self.repository} is not what it was when it was loaded")
        return adapter

    def free_extras(self) -> None:
        if self._tokenizer is not self._files.base.tokenizer:
            self._tokenizer = None
