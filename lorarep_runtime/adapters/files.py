"""An adapter's files: found or downloaded, checked against the base, and compiled."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from lorarep_runtime.adapters.compile import holds_copy
from lorarep_runtime.adapters.disk import DiskBudget, DiskLoad
from lorarep_runtime.adapters.ends import MAX_FOREIGN_TOKENS, MAX_NEW_TOKENS
from lorarep_runtime.adapters.header import Expected, Header, layout_of, tensor_name
from lorarep_runtime.adapters.look import AdapterLook, fitting_header, naming_bases, other_base
from lorarep_runtime.adapters.maker import AdapterMaker, Source
from lorarep_runtime.adapters.peft_config import AdapterConfig
from lorarep_runtime.adapters.weights_file import WeightsFile
from lorarep_runtime.config import AdapterLimits
from lorarep_runtime.device.gil import give_way
from lorarep_runtime.errors import FailedPrecondition, InvalidArgument, NotFound, shown
from lorarep_runtime.hub.bounds import Bounds
from lorarep_runtime.hub.files import TEMPLATE_FILES, TOKENIZER_FILES, file_digest
from lorarep_runtime.hub.snapshot import Snapshot, fetch, repository_of
from lorarep_runtime.model.base import Base
from lorarep_runtime.model.compiled_adapter import Adapter, Layout, vocabulary_of
from lorarep_runtime.model.stack import Stack
from lorarep_runtime.progress import Progress
from lorarep_runtime.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
TEMPLATE_FILE = "chat_template.jinja"
MAX_CONFIG_BYTES = 1 << 20
TOKENIZER_BYTES, TOKEN_BYTES = 4 << 20, 512
"""Most bytes of a tokenizer's files, and those for each token of the base's vocabulary. Tokenizers of 262,144 tokens
take 40 MiB."""
UNTRUSTED_DEPTH = 4
"""Most positions of a stack that no operator named, as a multiple of the base's layers: others wait for its visits."""
ABSENT_SECONDS, MAX_ABSENT = 10.0, 1024
"""Time for which it is remembered that the Hub does not have a source, and most of these."""


@dataclass(frozen=True)
class CheckedFiles:
    """An adapter's files that fit the base, and their contents but for the weights."""

    snapshot: Snapshot
    weights: WeightsFile
    config: AdapterConfig
    header: Header
    layout: Layout
    stack: Stack
    """The stack that the weights are for."""
    digest: Future[str]
    """SHA-256 of the weights file, computed concurrently with whatever follows.

    DataLoss if it cannot be read, or is written to meanwhile.
    """


class AdapterFiles:
    """Finds, checks and compiles the files of any adapter of one base. Thread-safe.

    Args:
        base: the model that adapters have to fit.
        stacks: named stacks.
        limits: what adapters may ask for, and how much of the disk they may take.
        cache_dir: Hub cache; None is huggingface_hub's default.
        uses: as for `DiskBudget`; without it all repositories are idle.
        maker: compiles them; by default one of this process alone.
    """

    def __init__(
        self,
        base: Base,
        stacks: Mapping[str, Stack],
        limits: AdapterLimits,
        cache_dir: Path | None,
        uses: Callable[[], Mapping[str, int | None]] = dict,
        maker: AdapterMaker | None = None,
    ) -> None:
        self.base = base
        self.maker = maker or AdapterMaker(base)
        self.stacks = stacks
        self.disk = None if limits.disk_bytes is None else DiskBudget(cache_dir, limits.disk_bytes, uses)
        self._limits = limits
        self._max_untrusted = limits.max_untrusted_positions or UNTRUSTED_DEPTH * base.layers
        self._cache_dir = cache_dir
        self._absent = _Absent()
        self._hashing = ThreadPoolExecutor(thread_name_prefix="lorarep-digest")

    def check(
        self, source: str, revision: str | None, stack: str | None, progress: Progress | None, *, trusted: bool
    ) -> CheckedFiles:
        """Downloads an adapter if the cache does not hold it, and reads its config and its weights file's header.

        Args:
            source: repository, or folder.
            revision: branch, tag or commit; None is the default branch.
            stack: named stack, as for `AdapterRegistry.load`.
            progress: told of stages "download" (bytes) and "check".
            trusted: as for `fetch`.

        Raises:
            LorarepError: as `hub.snapshot.fetch`, `AdapterConfig.parse`, `layout_of` and `checked_header`.
        """
        give_way()
        if stack is not None:
            self.named_stack(stack)  # before anything is asked for: a wrong name says nothing about the repository
        snapshot = self.fetch(source, revision, progress, stack=stack, trusted=trusted)
        if progress is not None:
            progress("check", 0, 0)
        weights = WeightsFile.at(snapshot.folder / WEIGHTS_FILE)
        expected = self._expected(snapshot.folder, stack, trusted)
        header, layout = fitting_header(weights.path, expected, self.base.prefix, self.base.repository)
        layout = self._with_own_rows(weights, header, layout)
        config, walked = expected.config, expected.stack
        self._tell(snapshot, config)
        return CheckedFiles(snapshot, weights, config, header, layout, walked, self._hashing.submit(_digest, weights))

    def _with_own_rows(self, weights: WeightsFile, header: Header, layout: Layout) -> Layout:
        """A layout with those rows of whole heads and embeddings that are not in the file as the base has them.

        Raises:
            FailedPrecondition: there are others in the place of the base's, and DoRA's norms would have to be theirs.
        """
        found = dict(layout)
        for (position, path), form in layout.items():
            if position >= 0 or not isinstance(form.rows, range):
                continue
            own, name = self.base.end_weight(position)[: form.tokens], tensor_name(path, "weight")
            same = holds_copy(weights, header, name, own)
            found[position, path] = form._replace(rows=range(len(own) if same else 0, form.tokens))
            if same and form.tokens == self.base.vocab_size:
                del found[position, path]
            elif not same and any(p == position and other.has_c for (p, _), other in layout.items()):
                raise FailedPrecondition(
                    "is another than the base's, over which DoRA's norms are: train with use_dora=False", field=name
                )
        return found

    def _tell(self, snapshot: Snapshot, config: AdapterConfig) -> None:
        """Logs what an adapter's config says about its training that is not as the server has it."""
        if (trained_on := other_base(config, self.base.repository)) is not None:
            log.info(
                "%s was trained on %s, and is served on %s", snapshot.source, shown(trained_on), self.base.repository
            )
        if config.init_lora_weights == "lora_ga":
            log.warning(
                "%s: LoRA-GA changed the base before training. It is served as PEFT loads it, over the base as it is; "
                "unless it was saved with path_initial_model_for_weight_conversion, it misses that change",
                snapshot.source,
            )

    def fetch(
        self,
        source: str,
        revision: str | None,
        progress: Progress | None = None,
        *,
        stack: str | None = None,
        trusted: bool,
    ) -> Snapshot:
        """An adapter's snapshot, which counts towards the disk budget.

        Args:
            source, revision, stack, progress: as for `check`.
            trusted: whether an operator names the source, or its commit has been checked before; otherwise its
                revision and its files' sizes are bounded before they are downloaded.

        Raises:
            LorarepError: as `hub.snapshot.fetch`; NotFound again, without another request to the Hub, for some seconds
                after the Hub said so to anybody but an operator; Exhausted if the disk budget has no room.
        """
        with nullcontext() if self.disk is None else self.disk.staying(repository_of(source)) as load:
            if not trusted:
                self._absent.check(source, revision)
            look = AdapterLook(
                lambda folder: self._expected(folder, stack, trusted), self.base.prefix, self.base.repository
            )
            bounds = None if trusted else self._bounds(load, look)
            try:
                snapshot = fetch(
                    source,
                    revision,
                    kind="adapter",
                    cache_dir=self._cache_dir,
                    progress=progress,
                    bounds=bounds,
                    look=look,
                )
            except NotFound as error:
                if not trusted:  # an operator is told of folders that callers may not name
                    self._absent.add(source, revision, error)
                raise
            if self.disk is not None and load is not None:
                self.disk.added(load, snapshot)
        return snapshot

    def _bounds(self, load: DiskLoad | None, look: AdapterLook) -> Bounds:
        """Most bytes of each file of an adapter that no operator has named."""

        def make_room(size: int) -> None:
            if self.disk is not None and load is not None:
                self.disk.expect(load, size)

        tokenizer = TOKENIZER_BYTES + TOKEN_BYTES * self.base.vocab_size
        return Bounds(MAX_CONFIG_BYTES, tokenizer, look.most_file_bytes, make_room, self._limits.allow_repositories)

    def vocab_size(self, layout: Layout) -> int:
        """Number of tokens of the vocabulary of an adapter with a layout."""
        own = vocabulary_of(layout)
        return self.base.vocab_size if own is None else own

    def compile(self, checked: CheckedFiles, progress: Progress | None) -> Adapter:
        """Compiles checked files onto the base's device. Raises as `compile_adapter`."""
        source = Source(checked.weights, checked.config, checked.header, checked.layout, checked.stack)
        return self.maker.compile(source, progress)

    def tokenizer(self, folder: Path, rows: int, *, trusted: bool) -> Tokenizer:
        """The tokenizer of an adapter's requests.

        It is the adapter's own, if the folder has any file of one; else the base's, with the adapter's chat template if
        the folder has only that.

        Args:
            folder: holds the adapter's files.
            rows: tokens of the adapter's vocabulary.
            trusted: as for `AdapterRegistry.load`.

        Raises:
            FailedPrecondition: as `Tokenizer.adapters_own`; or the template is not UTF-8.
        """
        template = folder / TEMPLATE_FILE
        if any(any(folder.glob(name)) for name in TOKENIZER_FILES if name not in TEMPLATE_FILES):
            return self.base.tokenizer.adapters_own(folder, rows, trusted=trusted)
        if template.exists():
            try:
                text = template.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise FailedPrecondition(f"is not UTF-8: {error}", field=template.name) from error
            return self.base.tokenizer.with_chat_template(text, trusted=trusted)
        return self.base.tokenizer

    def named_stack(self, name: str) -> Stack:
        """The stack of a name. Raises NotFound."""
        if name not in self.stacks:
            raise NotFound(f"{name!r} is none of {sorted(self.stacks)}", field="stack")
        return self.stacks[name]

    def _expected(self, folder: Path, stack: str | None, trusted: bool) -> Expected:
        """What the config in a folder says: itself, the stack that it is for, and the entries of its weights."""
        family = self.base.config.model_type
        config = AdapterConfig.parse(read_config(folder / CONFIG_FILE), self._limits, family)
        self._check_invocation(config.alora_invocation_tokens)
        with naming_bases(config, self.base.repository):
            walked = self._walked(config, stack, trusted=trusted)
            modules, parameters = self.base.layer_modules, self.base.layer_parameters
            layout = layout_of(config, walked, modules, parameters, self.base.prefix, self.base.ends)
            more = MAX_NEW_TOKENS if trusted else MAX_FOREIGN_TOKENS
            return Expected(config, walked, layout, self.base.ends, more)

    def _check_invocation(self, tokens: tuple[int, ...]) -> None:
        """Checks that sequences can have the tokens from which on an aLoRA computes. Raises FailedPrecondition."""
        if not tokens:
            return
        field = "alora_invocation_tokens"
        if not self.base.is_general:
            raise FailedPrecondition("aLoRA is served on a CPU alone, by one process", field=field)
        if max(tokens) >= self.base.vocab_size:
            raise FailedPrecondition(f"{max(tokens)} is none of the base's {self.base.vocab_size} tokens", field=field)

    def _walked(self, config: AdapterConfig, name: str | None, *, trusted: bool) -> Stack:
        """The stack that an adapter is for: its own, or the named one, which may not contradict its config."""
        own = config.stack(self.base.layers)
        if name is None:
            if not trusted and len(own) > self._max_untrusted:
                raise InvalidArgument(
                    f"{len(own)} positions are over the limit of {self._max_untrusted} for an adapter that the "
                    "operator does not name (--adapter, --adapters-file)",
                    field="layer_replication",
                )
            return own
        named = self.named_stack(name)
        if config.layer_replication is not None and own != named:
            raise InvalidArgument(f"{name!r} is not what the adapter's layer_replication says", field="stack")
        return named


class _Absent:
    """Sources that the Hub did not have a moment ago: callers who repeat a name cost no requests. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._until: dict[tuple[str, str | None], tuple[float, NotFound]] = {}

    def add(self, source: str, revision: str | None, error: NotFound) -> None:
        """Remembers the error of a source for `ABSENT_SECONDS`."""
        with self._lock:
            while len(self._until) >= MAX_ABSENT:
                del self._until[next(iter(self._until))]  # the oldest
            self._until.pop((source, revision), None)
            self._until[source, revision] = time.monotonic() + ABSENT_SECONDS, error

    def check(self, source: str, revision: str | None) -> None:
        """Raises NotFound if the source was not there a moment ago."""
        with self._lock:
            until, error = self._until.get((source, revision), (0.0, None))
        if error is not None and time.monotonic() < until:
            raise NotFound(error.message, field=error.field)


def _digest(weights: WeightsFile) -> str:
    with weights.opened() as file:
        return file_digest(file)


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
