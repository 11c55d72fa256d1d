"""A revision of an adapter: its repository at a commit, checked against the base, compiled whenever it is wanted."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from lorarep_runtime.adapters.compile import compile_adapter
from lorarep_runtime.adapters.disk import DiskBudget
from lorarep_runtime.adapters.header import Header, check, read_header
from lorarep_runtime.adapters.peft_config import MATCHING_SECONDS, AdapterConfig
from lorarep_runtime.adapters.residency import Resident
from lorarep_runtime.config import AdapterLimits
from lorarep_runtime.device.gil import give_way
from lorarep_runtime.errors import DataLoss, FailedPrecondition, InvalidArgument, NotFound
from lorarep_runtime.hub.files import LOCAL, file_digest
from lorarep_runtime.hub.snapshot import Snapshot, fetch
from lorarep_runtime.model.base import Base
from lorarep_runtime.model.compiled_adapter import Adapter, Layout, file_parameters, storage_bytes
from lorarep_runtime.model.stack import Stack
from lorarep_runtime.progress import Progress
from lorarep_runtime.text.tokenizer import Tokenizer, fits

log = logging.getLogger(__name__)

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
TEMPLATE_FILE = "chat_template.jinja"
MAX_CONFIG_BYTES = 1 << 20


@dataclass(frozen=True)
class Checked:
    """An adapter's files that fit the base, and what they say."""

    snapshot: Snapshot
    spec: AdapterConfig
    header: Header
    layout: Layout
    stack: Stack
    digest: Future[str]
    """SHA-256 of the weights file; computed beside whatever follows."""


class AdapterFiles:
    """Finds adapters' files, checks and compiles them; knows the base, not who wants what."""

    def __init__(self, base: Base, stacks: Mapping[str, Stack], limits: AdapterLimits, cache_dir: Path | None) -> None:
        self.base = base
        self.stacks = stacks
        self._limits = limits
        self._cache_dir = cache_dir
        self.disk: DiskBudget | None = None
        self._hashing = ThreadPoolExecutor(thread_name_prefix="lorarep-digest")

    def check(self, source: str, revision: str | None, stack: str | None, progress: Progress | None) -> Checked:
        """Downloads an adapter where it has to be, and reads its config and its file's header.

        Args:
            stack: as for `AdapterRegistry.load`.

        Raises:
            LorarepError: as `hub.fetch`, `adapters.spec` and `adapters.header`.
        """
        give_way()
        snapshot = self.fetch(source, revision, progress)
        if progress is not None:
            progress("check", 0, 0)
        weights = snapshot.folder / WEIGHTS_FILE
        spec = AdapterConfig.parse(read_config(snapshot.folder / CONFIG_FILE), self._limits)
        walked = self._walked(spec, stack)
        header = read_header(weights)
        layout = check(spec, header, walked, self.base.modules, self.base.prefix)
        return Checked(snapshot, spec, header, layout, walked, self._hashing.submit(_digest_of, weights))

    def fetch(self, source: str, revision: str | None, progress: Progress | None = None) -> Snapshot:
        """As `hub.fetch`."""
        with nullcontext() if self.disk is None else self.disk.staying(source):
            snapshot = fetch(source, revision, kind="adapter", cache_dir=self._cache_dir, progress=progress)
            if self.disk is not None:
                self.disk.added(snapshot)
        return snapshot

    def compile(self, checked: Checked, progress: Progress | None) -> Adapter:
        """As `compile_adapter`."""
        return compile_adapter(
            checked.snapshot.folder / WEIGHTS_FILE,
            replace(checked.spec, deadline=time.monotonic() + MATCHING_SECONDS),  # it may have waited for its turn
            checked.header,
            checked.layout,
            checked.stack,
            prefix=self.base.prefix,
            modules=tuple(self.base.modules),
            norm_terms=self.base.norm_terms,
            dtype=self.base.dtype,
            device=self.base.device,
            progress=progress,
        )

    def tokenizer(self, folder: Path) -> Tokenizer:
        """The adapter's own tokenizer where it has one that fits the base's vocabulary; or the base's with its own
        chat template, if that is all it has."""
        template = folder / TEMPLATE_FILE
        if (folder / "tokenizer_config.json").exists():
            own = Tokenizer(folder)
            if fits(own, self.base.vocab_size):
                return own
            log.warning("the tokenizer in %s does not fit the base's vocabulary: the base's own is used", folder)
        elif template.exists():
            return self.base.tokenizer.with_chat_template(template.read_text(encoding="utf-8", errors="replace"))
        return self.base.tokenizer

    def named_stack(self, name: str) -> Stack:
        """Raises NotFound."""
        if name not in self.stacks:
            raise NotFound(f"{name!r} is none of {sorted(self.stacks)}", field="stack")
        return self.stacks[name]

    def _walked(self, spec: AdapterConfig, name: str | None) -> Stack:
        own = spec.stack(self.base.layers)
        if name is None:
            return own
        named = self.named_stack(name)
        if spec.layer_replication is not None and own != named:
            raise InvalidArgument(f"{name!r} is not what the adapter's layer_replication says", field="stack")
        return named


class Revision(Resident):
    """What a name stands for. It is the same for as long as the server runs, wherever its weights are."""

    def __init__(self, files: AdapterFiles, name: str, stack_name: str | None, checked: Checked) -> None:
        super().__init__(storage_bytes(checked.layout, files.base.dtype))
        self.name = name
        self.repository, self.commit = checked.snapshot.repository, checked.snapshot.commit
        self.stack = checked.stack
        self.kind = "dora" if checked.spec.use_dora else "lora"
        self.rank = max(form.rank for form in checked.layout.values())
        self.parameters = file_parameters(checked.layout)
        self._files = files
        self._stack_name = stack_name
        self._checked: Checked | None = checked
        self._digest = checked.digest
        self._tokenizer: Tokenizer | None = files.tokenizer(checked.snapshot.folder)

    def wait_for_digest(self) -> None:
        """Before it gets a name. Raises DataLoss where the file cannot be read."""
        self._digest.result()

    @property
    def digest(self) -> str:
        """SHA-256 of the weights file, in hexadecimal."""
        return self._digest.result()

    def is_same(self, checked: Checked) -> bool:
        """Whether files are those of this revision."""
        snapshot = checked.snapshot
        ours = (self.repository, self.commit, self.stack)
        return ours == (snapshot.repository, snapshot.commit, checked.stack) and self.digest == checked.digest.result()

    @property
    def has_tokenizer(self) -> bool:
        """Whether `tokenizer` gives it without a look at the disk."""
        return self._tokenizer is not None

    def tokenizer(self) -> Tokenizer:
        """Its requests' tokenizer; raises as `hub.fetch`."""
        tokenizer = self._tokenizer
        if tokenizer is None:
            tokenizer = self._tokenizer = self._files.tokenizer(self._files.fetch(*self._source).folder)
        return tokenizer

    @property
    def _source(self) -> tuple[str, str | None]:
        return self.repository, None if self.commit == LOCAL else self.commit

    def make(self, progress: Progress | None) -> Adapter:
        checked, self._checked = self._checked, None  # thousands of layouts would be gigabytes
        if checked is not None and not (checked.snapshot.folder / WEIGHTS_FILE).exists():
            checked = None  # it has left the disk meanwhile
        if checked is None:
            checked = self._files.check(*self._source, self._stack_name, progress)
        adapter = self._files.compile(checked, progress)
        if not self.is_same(checked):
            raise FailedPrecondition(f"{self.name!r}: {self.repository} is not what it was when it was loaded")
        return adapter

    def cool(self) -> None:
        if self._tokenizer is not self._files.base.tokenizer:
            self._tokenizer = None


def _digest_of(file: Path) -> str:
    try:
        return file_digest(file)
    except OSError as error:
        raise DataLoss(str(error), field=file.name) from error


def read_config(file: Path) -> Mapping[str, object]:
    """The JSON object of an `adapter_config.json`. Raises InvalidArgument where it is none."""
    if file.stat().st_size > MAX_CONFIG_BYTES:
        raise InvalidArgument(f"over {MAX_CONFIG_BYTES} bytes", field=CONFIG_FILE)
    try:
        config = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"not JSON: {error}", field=CONFIG_FILE) from error
    if not isinstance(config, dict):
        raise InvalidArgument("not a JSON object", field=CONFIG_FILE)
    return config
