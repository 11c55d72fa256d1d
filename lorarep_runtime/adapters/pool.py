"""The adapters that are loaded, and who computes with them.

A load is downloaded, checked and compiled by its caller's thread beside running requests, then appears under its name.
Requests hold a lease on a revision: whatever happens to the name, they finish on what they were admitted with.
"""

from __future__ import annotations

import json
import logging
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from lorarep_runtime.adapters.spec import AdapterSpec, check_name
from lorarep_runtime.adapters.weights import Adapter, check, compile_adapter, mix, read_header, storage_bytes
from lorarep_runtime.base import Base
from lorarep_runtime.config import AdapterLimits
from lorarep_runtime.errors import AlreadyExists, Exhausted, InvalidArgument, NotFound
from lorarep_runtime.failpoints import failpoint
from lorarep_runtime.hub import LOCAL, Progress, check_allowed, fetch, file_digest
from lorarep_runtime.stack import Stack
from lorarep_runtime.text import Tokenizer, fits

log = logging.getLogger(__name__)

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
TEMPLATE_FILE = "chat_template.jinja"
MAX_CONFIG_BYTES = 1 << 20
MAX_ADAPTERS_OF_A_REQUEST = 16
MAX_IDLE_MIXES = 16


@dataclass(frozen=True)
class AdapterInfo:
    """What callers are told of an adapter. Repository, commit, digest and stack are its revision."""

    name: str
    repository: str
    commit: str
    digest: str
    """SHA-256 of the weights file."""
    stack: Stack
    kind: str
    """"lora" or "dora"."""
    rank: int
    """Largest of its modules."""
    parameters: int
    bytes: int
    """On the device."""
    references: int
    """Requests that hold it."""
    tier: str = "device"
    """"device", "host" or "disk": the next request for it brings the same revision back to the device."""
    pinned: bool = False
    """Whether it never leaves the device for others."""
    priority: int = 0
    """Of those that may leave, the lowest goes first."""


@dataclass(eq=False)
class _Loaded:
    """An adapter or a mix in device memory."""

    adapter: Adapter
    tokenizer: Tokenizer
    info: AdapterInfo | None
    """None for a mix."""
    references: int = 0
    used: int = 0
    """Tick of the last lease: the least goes first."""

    @property
    def may_leave(self) -> bool:
        return not self.references and not (self.info and self.info.pinned)


MixKey = tuple[tuple[_Loaded, float], ...]
"""The adapters of a mix and their weights."""


@dataclass(frozen=True, eq=False)
class Lease:
    """A request's hold on what it computes with."""

    stack: Stack
    adapter: Adapter | None
    """None is the bare stack."""
    tokenizer: Tokenizer
    names: tuple[str, ...] = ()
    """Of the adapters, as requested."""
    adapters: tuple[AdapterInfo, ...] = ()
    """The revisions behind the names, in the same order."""
    _release: Callable[[], None] = lambda: None

    def release(self) -> None:
        """Gives it back; once."""
        self._release()


class AdapterPool:
    """Thread-safe."""

    def __init__(self, base: Base, stacks: Mapping[str, Stack], limits: AdapterLimits, cache_dir: Path | None) -> None:
        self._base = base
        self._stacks = stacks
        self._limits = limits
        self._cache_dir = cache_dir
        self._changed = threading.Condition(threading.RLock())
        self._named: dict[str, _Loaded] = {}
        self._evicted: dict[str, AdapterInfo] = {}
        self._mixes: dict[MixKey, _Loaded] = {}
        self._mixing: set[MixKey] = set()
        self._leaving: set[_Loaded] = set()
        """Without a name by now, still held by requests."""
        self._loading: set[str] = set()
        self._reserved = 0
        """Bytes of what is being compiled."""
        self._tick = 0
        self._hashing = ThreadPoolExecutor(thread_name_prefix="lorarep-digest")
        self._stream = torch.cuda.Stream(base.device) if base.device.type == "cuda" else None
        self.evictions = 0

    def load(
        self,
        name: str,
        source: str,
        revision: str | None = None,
        *,
        stack: str | None = None,
        trusted: bool = False,
        pinned: bool = False,
        priority: int = 0,
        replace: bool = False,
        progress: Progress | None = None,
    ) -> AdapterInfo:
        """Loads an adapter and gives it a name. If the name is that very revision's already, it only has another
        `pinned` and `priority` from then on.

        Args:
            source: repository, or, if trusted, also a folder.
            revision: branch, tag or commit.
            stack: named stack that the adapter's layer numbers count, for adapters trained on a stacked model; default
                is its own `layer_replication`, else the base's order.
            trusted: whether the operator asks, whom the allow-list does not bind.
            pinned: whether it never leaves the device for others.
            priority: of those that may leave, the lowest goes first.
            replace: whether another revision that has the name loses it, once the new one is loaded.
            progress: told of stages "download" (bytes), "check" and "compile" (modules). What it raises ends the load.

        Raises:
            LorarepError: as `hub.fetch`, `adapters.spec` and `adapters.weights`; AlreadyExists if the name is another
                revision's and is not replaced; Exhausted if there is no room. What was loaded before stays.
        """
        check_name(name)
        if not trusted:
            check_allowed(source, self._limits.allow_repositories)
        with self._changed:
            self._changed.wait_for(lambda: name not in self._loading)
            self._loading.add(name)
        try:
            return self._load(name, source, revision, stack, pinned, priority, replace, progress)
        finally:
            with self._changed:
                self._loading.discard(name)
                self._changed.notify_all()

    def _load(
        self,
        name: str,
        source: str,
        revision: str | None,
        stack: str | None,
        pinned: bool,
        priority: int,
        replaces: bool,
        progress: Progress | None,
    ) -> AdapterInfo:
        snapshot = fetch(source, revision, kind="adapter", cache_dir=self._cache_dir, progress=progress)
        if progress is not None:
            progress("check", 0, 0)
        weights = snapshot.folder / WEIGHTS_FILE
        spec = AdapterSpec.parse(read_config(snapshot.folder / CONFIG_FILE), self._limits)
        walked = self._walked(spec, stack)
        header = read_header(weights)
        layout = check(spec, header, walked, self._base.modules, self._base.prefix)
        digest = self._hashing.submit(file_digest, weights)  # takes as long as the rest
        with self._changed:
            present = self._named.get(name)
            before = present.info if present else self._evicted.get(name)
        if before is not None:
            ours = (snapshot.repository, snapshot.commit, digest.result(), walked)
            if ours == (before.repository, before.commit, before.digest, before.stack):
                if present is not None:
                    with self._changed:
                        present.info = replace(before, pinned=pinned, priority=priority)
                        return self._info(present)
            elif not replaces:
                raise AlreadyExists(f"name: {name!r} is {before.repository} at {before.commit}")
        size = storage_bytes(layout, self._base.dtype)
        compiled = partial(
            compile_adapter,
            weights,
            spec,
            layout,
            walked,
            modules=tuple(self._base.modules),
            weight=self._base.weight,
            dtype=self._base.dtype,
            device=self._base.device,
            progress=progress,
        )
        adapter = self._in_room(size, compiled)
        info = AdapterInfo(
            name=name,
            repository=snapshot.repository,
            commit=snapshot.commit,
            digest=digest.result(),
            stack=walked,
            kind=adapter.kind,
            rank=adapter.rank,
            parameters=adapter.parameters,
            bytes=adapter.nbytes,
            references=0,
            pinned=pinned,
            priority=priority,
        )
        loaded = _Loaded(adapter, self._tokenizer(snapshot.folder), info)
        with self._changed:
            self._evicted.pop(name, None)
            if (replaced := self._named.get(name)) is not None:
                self._drop(replaced)
            self._named[name] = loaded
            self._touch(loaded)
            return self._info(loaded)

    def _walked(self, spec: AdapterSpec, name: str | None) -> Stack:
        own = spec.stack(self._base.layers)
        if name is None:
            return own
        named = self._named_stack(name)
        if spec.layer_replication is not None and own != named:
            raise InvalidArgument(f"stack: {name!r} is not what the adapter's layer_replication says")
        return named

    def _named_stack(self, name: str) -> Stack:
        if name not in self._stacks:
            raise NotFound(f"stack: {name!r} is none of {sorted(self._stacks)}")
        return self._stacks[name]

    def _tokenizer(self, folder: Path) -> Tokenizer:
        """The adapter's own tokenizer where it has one that fits the base's vocabulary; or the base's with its own
        chat template, if that is all it has."""
        template = folder / TEMPLATE_FILE
        if (folder / "tokenizer_config.json").exists():
            own = Tokenizer(folder)
            if fits(own, self._base.vocab_size):
                return own
            log.warning("the tokenizer in %s does not fit the base's vocabulary: the base's own is used", folder)
        elif template.exists():
            return self._base.tokenizer.with_chat_template(template.read_text(encoding="utf-8", errors="replace"))
        return self._base.tokenizer

    def _in_room(self, size: int, make: Callable[[], Adapter]) -> Adapter:
        """What `make` makes of `size` bytes of device memory; idle adapters leave, the least recently used first."""
        self._reserve(size)
        try:
            while True:
                try:
                    failpoint("adapter")
                    with self._beside_steps():
                        return make()
                except RuntimeError as error:
                    # Others than us may hold the device's memory: that it is short shows when it is taken.
                    if not _is_out_of_memory(error):
                        raise
                    with self._changed:
                        if not self._evict():
                            raise Exhausted(
                                f"device memory: no room for an adapter of {size} bytes", retry_after=1.0
                            ) from error
        finally:
            with self._changed:
                self._reserved -= size

    def _reserve(self, size: int) -> None:
        limit = self._limits.memory_bytes
        with self._changed:
            if limit is not None:
                in_use = self._reserved + sum(x.adapter.nbytes for x in self._all() if not x.may_leave)
                if in_use + size > limit:  # nobody leaves for what would have no room all the same
                    raise Exhausted(
                        f"adapter memory: {size} bytes wanted, {in_use} of {limit} held by adapters in use",
                        retry_after=1.0,
                    )
                while self._held() + size > limit:
                    self._evict()
            self._reserved += size

    @contextmanager
    def _beside_steps(self) -> Iterator[None]:
        """On a GPU, work within goes on beside the steps under way instead of among them, and is done at the end.

        On one stream for all, as libraries keep tens of megabytes for each that they have worked on.
        """
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            yield
        self._stream.synchronize()

    def _held(self) -> int:
        return self._reserved + sum(x.adapter.nbytes for x in self._all())

    def _all(self) -> list[_Loaded]:
        return [*self._named.values(), *self._mixes.values(), *self._leaving]

    def _evict(self) -> bool:
        """Frees the idle adapter or mix that has been idle longest; False if all are in use."""
        idle = [x for x in self._all() if x.may_leave]
        if not idle:
            return False
        leaving = min(idle, key=lambda x: (x.info.priority if x.info else 0, x.used))
        if leaving.info is not None:
            name = leaving.info.name
            del self._named[name]
            self._evicted[name] = replace(leaving.info, tier="disk", bytes=0)
        self._forget_mixes(leaving)
        self.evictions += 1
        return True

    def _forget_mixes(self, leaving: _Loaded) -> None:
        """Takes a mix, or the mixes of an adapter, out of what new requests find."""
        for key, mixed in list(self._mixes.items()):
            if mixed is leaving or any(part is leaving for part, _ in key):
                del self._mixes[key]
                if mixed.references:
                    self._leaving.add(mixed)

    def unload(self, name: str) -> None:
        """Takes the name away; requests that hold the adapter finish on it, then its memory is freed.

        Raises:
            NotFound: no adapter has the name.
        """
        with self._changed:
            if self._evicted.pop(name, None) is not None:
                return
            loaded = self._named.pop(name, None)
            if loaded is None:
                raise NotFound(f"adapter: {name!r} is not loaded")
            self._drop(loaded)

    def _drop(self, loaded: _Loaded) -> None:
        """What has lost its name stays for the requests that hold it."""
        if loaded.references:
            self._leaving.add(loaded)
        self._forget_mixes(loaded)

    def get(self, name: str) -> AdapterInfo:
        """Raises NotFound."""
        with self._changed:
            if name in self._named:
                return self._info(self._named[name])
            if name in self._evicted:
                return self._evicted[name]
        raise NotFound(f"adapter: {name!r} is not loaded")

    def list(self) -> list[AdapterInfo]:
        """All that have a name, in its order."""
        with self._changed:
            return [self.get(name) for name in sorted({*self._named, *self._evicted})]

    def held_bytes(self) -> dict[str, int]:
        """Device bytes of each adapter and mix; what requests hold of adapters without a name is under "(leaving)"."""
        with self._changed:
            held = {name: x.adapter.nbytes for name, x in self._named.items()}
            for key, mixed in self._mixes.items():
                parts = " + ".join(f"{weight:g}·{part.info.name}" for part, weight in key if part.info)
                held[parts] = mixed.adapter.nbytes
            if self._leaving:
                held["(leaving)"] = sum(x.adapter.nbytes for x in self._leaving)
            return held

    def lease(
        self, adapters: Sequence[tuple[str, float]], stack: str | None = None, progress: Progress | None = None
    ) -> Lease:
        """What a request computes with, held until released. Blocks while an adapter has to be loaded first: one that
        was evicted, or a repository ("org/name" or "org/name@revision") that the allow-list permits.

        Args:
            adapters: names and weights; several are mixed as PEFT mixes several active adapters.
            stack: named stack; default is the adapters' own, or the base's order. With adapters it has to be theirs.
            progress: of what has to be loaded, as for `load`.

        Raises:
            NotFound, InvalidArgument, and what `load` raises.
        """
        names = tuple(name for name, _ in adapters)
        if len(adapters) > MAX_ADAPTERS_OF_A_REQUEST or len(set(names)) < len(names):
            raise InvalidArgument(f"adapters: at most {MAX_ADAPTERS_OF_A_REQUEST}, each once")
        for name, weight in adapters:
            if not math.isfinite(weight):
                raise InvalidArgument(f"adapters: the weight of {name!r} is {weight}")
        named = None if stack is None else self._named_stack(stack)
        if not adapters:
            return Lease(named or self._stacks["base"], None, self._base.tokenizer)
        parts: list[_Loaded] = []
        try:
            for name in names:
                parts.append(self._hold(name, progress))
            walked = parts[0].adapter.stack
            for name, part in zip(names, parts, strict=True):
                if part.adapter.stack != (named or walked):
                    other = "stack" if named else f"adapter {names[0]!r}"
                    raise InvalidArgument(f"adapters: {name!r} is for another stack than the {other}")
            key = tuple((part, weight) for part, (_, weight) in zip(parts, adapters, strict=True))
            whole = parts[0] if len(key) == 1 and key[0][1] == 1 else self._hold_mix(key)
        except BaseException:
            self._give_back(parts)
            raise
        if whole is not parts[0]:
            self._give_back(parts)
        infos = tuple(part.info for part in parts if part.info is not None)
        return Lease(walked, whole.adapter, whole.tokenizer, names, infos, lambda: self._give_back([whole]))

    def _hold(self, name: str, progress: Progress | None) -> _Loaded:
        while True:
            with self._changed:
                loaded = self._named.get(name)
                if loaded is not None:
                    loaded.references += 1
                    self._touch(loaded)
                    return loaded
                evicted = self._evicted.get(name)
            if evicted is not None:
                commit = None if evicted.commit == LOCAL else evicted.commit
                self.load(
                    name,
                    evicted.repository,
                    commit,
                    stack=self._name_of(evicted),
                    trusted=True,
                    pinned=evicted.pinned,
                    priority=evicted.priority,
                    progress=progress,
                )
            elif "/" in name:
                repository, _, revision = name.partition("@")
                self.load(name, repository, revision or None, progress=progress)
            else:
                raise NotFound(f"adapter: {name!r} is not loaded")

    def _name_of(self, info: AdapterInfo) -> str | None:
        return next((name for name, stack in self._stacks.items() if stack == info.stack), None)

    def _hold_mix(self, key: MixKey) -> _Loaded:
        with self._changed:
            self._changed.wait_for(lambda: key not in self._mixing)
            mixed = self._mixes.get(key)
            if mixed is not None:
                mixed.references += 1
                self._touch(mixed)
                return mixed
            self._mixing.add(key)
        try:
            # Without the lock: steps need it to give back what finished requests held.
            size = sum(part.adapter.nbytes for part, _ in key)
            parts = [(part.adapter, weight) for part, weight in key]
            adapter = self._in_room(size, lambda: mix(parts, tuple(self._base.modules)))
            mixed = _Loaded(adapter, key[0][0].tokenizer, None, references=1)
            with self._changed:
                self._touch(mixed)
                if all(part.info and self._named.get(part.info.name) is part for part, _ in key):
                    self._mixes[key] = mixed
                    self._drop_idle_mixes()
                else:  # a part has lost its name meanwhile
                    self._leaving.add(mixed)
                return mixed
        finally:
            with self._changed:
                self._mixing.discard(key)
                self._changed.notify_all()

    def _drop_idle_mixes(self) -> None:
        """Keeps the latest; callers choose weights at will, and each choice is another mix."""
        idle = sorted((mixed for mixed in self._mixes.values() if not mixed.references), key=lambda mixed: mixed.used)
        for mixed in idle[:-MAX_IDLE_MIXES]:
            self._forget_mixes(mixed)

    def _touch(self, loaded: _Loaded) -> None:
        self._tick += 1
        loaded.used = self._tick

    def _give_back(self, held: Sequence[_Loaded]) -> None:
        with self._changed:
            for loaded in held:
                loaded.references -= 1
                if not loaded.references:
                    self._leaving.discard(loaded)

    @staticmethod
    def _info(loaded: _Loaded) -> AdapterInfo:
        assert loaded.info is not None
        return replace(loaded.info, references=loaded.references)


def _is_out_of_memory(error: Exception) -> bool:
    """PyTorch has no class of its own for the CPU's memory."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def read_config(file: Path) -> Mapping[str, object]:
    """The JSON object of an `adapter_config.json`. Raises InvalidArgument where it is none."""
    if file.stat().st_size > MAX_CONFIG_BYTES:
        raise InvalidArgument(f"{CONFIG_FILE}: over {MAX_CONFIG_BYTES} bytes")
    try:
        config = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"{CONFIG_FILE}: not JSON: {error}") from error
    if not isinstance(config, dict):
        raise InvalidArgument(f"{CONFIG_FILE}: not a JSON object")
    return config
