"""The adapters that have a name, and who computes with them.

A load is downloaded, checked and compiled beside running requests, then appears under its name. Requests hold a lease
on a revision: whatever happens to the name, they finish on what they were admitted with.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from lorarep_runtime.adapters.compile import mix
from lorarep_runtime.adapters.disk import DiskBudget
from lorarep_runtime.adapters.peft_config import check_name
from lorarep_runtime.adapters.residency import Claim, Residency, Resident
from lorarep_runtime.adapters.revision import AdapterFiles, Revision
from lorarep_runtime.config import AdapterLimits
from lorarep_runtime.errors import AlreadyExists, Cancelled, Exhausted, InvalidArgument, NotFound
from lorarep_runtime.hub.snapshot import check_allowed
from lorarep_runtime.model.base import Base
from lorarep_runtime.model.compiled_adapter import Adapter, moved
from lorarep_runtime.model.stack import Stack
from lorarep_runtime.progress import Progress
from lorarep_runtime.text.tokenizer import Tokenizer

MAX_ADAPTERS_OF_A_REQUEST = 16
MAX_IDLE_MIXES = 16
WAITING_SECONDS = 0.25
"""Between two looks at whether somebody still wants a load that waits for another of its name."""

Tier = Literal["device", "host", "disk"]


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
    tier: Tier
    """The fastest memory that it is in. Wherever it is, the next request for it gets this revision."""
    bytes: int
    """On the device."""
    references: int
    """Requests that hold it."""
    pinned: bool
    """Never leaves the device."""
    priority: int
    """The lowest leaves first."""


MixKey = tuple[tuple[Revision, float], ...]
"""The adapters of a mix and their weights."""


class Mix(Resident):
    """Several adapters with weights as one."""

    def __init__(self, parts: MixKey, modules: tuple[str, ...], device: torch.device) -> None:
        super().__init__(sum(part.size for part, _ in parts))
        self.parts = parts
        self._modules = modules
        self._device = device

    @property
    def label(self) -> str:
        return " + ".join(f"{weight:g}·{part.name}" for part, weight in self.parts)

    @property
    def scratch(self) -> int:
        return sum(part.size for part, _ in self.parts if part.adapter is None)

    def make(self, progress: Progress | None) -> Adapter:
        return mix([(self._on_device(part, progress), weight) for part, weight in self.parts], self._modules)

    def _on_device(self, part: Revision, progress: Progress | None) -> Adapter:
        adapter, copy = part.adapter, part.copy
        if adapter is None:
            adapter = part.make(progress) if copy is None else moved(copy, self._device)
        return adapter


class Lease:
    """A request's hold on what it computes with. From when it has had its turn, that is on the device."""

    def __init__(
        self,
        stack: Stack,
        tokenizer: Tokenizer,
        names: tuple[str, ...] = (),
        adapters: tuple[AdapterInfo, ...] = (),
        held: tuple[Residency, Resident] | None = None,
    ) -> None:
        """Takes over a hold on `held`; None is the bare stack."""
        self.stack = stack
        self.tokenizer = tokenizer
        self.names = names
        """Of the adapters, as requested."""
        self.adapters = adapters
        """The revisions behind the names, in the same order."""
        self._held = held
        self._has_turn = False
        self.has_claim = False
        """Whether device memory is taken for its adapter, be it on its way."""
        self._fetch: Future[None] | None = None
        self._given_back = 0
        """`Residency.given_back` when its adapter was last sent for."""

    @property
    def adapter(self) -> Adapter | None:
        """None is the bare stack. Only for one that has had its turn."""
        if self._held is None:
            return None
        assert self._has_turn
        return self._held[1].adapter

    def claim(self) -> Claim:
        """Has the adapter brought to the device, and kept there from when it is.

        Raises:
            LorarepError: it cannot be brought.
        """
        if self._held is None or self._has_turn:
            return Claim.READY
        residency, item = self._held
        fetch, self._fetch = self._fetch, None
        if fetch is not None and fetch.done() and not isinstance(fetch.exception(), Cancelled):  # that was another's
            was_short, as_then = isinstance(fetch.exception(), Exhausted), self._given_back == residency.given_back
            if was_short and as_then and residency.in_use:  # what others compute with leaves room when they end
                self._fetch, self.has_claim = fetch, False
                return Claim.NO_MEMORY
            if not was_short or as_then:
                fetch.result()
        with residency.changed:
            claim = residency.claim(item)
            self._fetch = item.fetch
            self._given_back = residency.given_back
        self._has_turn = claim is Claim.READY
        self.has_claim = claim is not Claim.NO_MEMORY
        return claim

    def wait(self) -> None:
        """Blocks until it has had its turn; raises as `claim`, and Exhausted where there is no room for now."""
        while (claim := self.claim()) is not Claim.READY:
            if claim is Claim.NO_MEMORY:
                raise Exhausted(f"adapter memory: all of it is in use, none is left for {self.names}", retry_after=1.0)
            if self._fetch is not None:
                wait([self._fetch])

    def release(self) -> None:
        """Gives it back; once."""
        if self._held is None:
            return
        residency, item = self._held
        with residency.changed:
            if self._has_turn:
                residency.leave(item)
            elif self.has_claim:
                item.is_promised = False
            residency.let_go(item)


class AdapterRegistry:
    """Thread-safe."""

    def __init__(self, base: Base, stacks: Mapping[str, Stack], limits: AdapterLimits, cache_dir: Path | None) -> None:
        self._base = base
        self._limits = limits
        self._files = AdapterFiles(base, stacks, limits, cache_dir)
        self.residency = Residency(base.device, limits)
        self._changed = self.residency.changed
        self._named: dict[str, Revision] = {}
        self._mixes: dict[MixKey, Mix] = {}
        self._loading: dict[str, str] = {}
        """Names, and from where."""
        if limits.disk_bytes is not None:
            self._files.disk = DiskBudget(cache_dir, limits.disk_bytes, self._uses)

    def _uses(self) -> dict[str, int | None]:
        """As `DiskBudget` asks for it. What runs from memory does not need its files; what waits for a turn does."""
        with self._changed:
            uses: dict[str, int | None] = {}
            mixed = {part for mix in self._mixes.values() if mix.leases for part, _ in mix.parts}
            for item in self._named.values():
                used = None if item.pinned or item.leases or item in mixed else item.used
                if uses.get(item.repository, 0) is not None:
                    uses[item.repository] = used if used is None else max(used, uses.get(item.repository) or 0)
            return uses | dict.fromkeys(self._loading.values())

    def load(
        self,
        name: str,
        source: str,
        revision: str | None = None,
        *,
        stack: str | None = None,
        trusted: bool = False,
        pinned: bool | None = None,
        priority: int | None = None,
        replace: bool = False,
        progress: Progress | None = None,
    ) -> AdapterInfo:
        """Loads an adapter into device memory and gives it a name. If the name is that very revision's already, it only
        sees to it that it is there.

        Args:
            source: repository, or, if trusted, also a folder.
            revision: branch, tag or commit.
            stack: named stack that the adapter's layer numbers count, for adapters trained on a stacked model; default
                is its own `layer_replication`, else the base's order.
            trusted: whether the operator asks, whom the allow-list does not bind.
            pinned: whether it never leaves the device. None leaves it as it is, at first False.
            priority: among those that may leave, the lowest leaves first. None leaves it as it is, at first 0.
            replace: whether it may take the name of another revision, whose requests finish on that.
            progress: told of stages "waiting" (for another load of the name), "download" (bytes), "check" and
                "compile" (modules). What it raises ends the load.

        Raises:
            LorarepError: as `hub.fetch`, `adapters.spec`, `adapters.header` and `adapters.weights`; AlreadyExists if
                the name is another revision's; Exhausted if there is no room. What was loaded before stays.
        """
        self.check_allowed(name, source, trusted)
        with self._alone(name, source, progress):
            item = self._checked(name, source, revision, stack, replace, progress)
            try:
                while not self._settled(item, pinned, priority):
                    self._bring(item, progress)
            finally:
                self.residency.let_go(item)
            return self._info(item)

    def _settled(self, item: Revision, pinned: bool | None, priority: int | None) -> bool:
        """Names what is on the device, and only then says how long it stays there."""
        with self._changed:
            is_here = item.adapter is not None and not item.is_leaving
            if is_here:
                item.pinned = item.pinned if pinned is None else pinned
                item.priority = item.priority if priority is None else priority
                self._give_name(item)
            return is_here

    def check_allowed(self, name: str, source: str, trusted: bool) -> None:
        """Whether `load` may be asked for that; asks nobody.

        Raises:
            InvalidArgument: the name or the repository is none.
            PermissionDenied: the allow-list does not permit the repository.
        """
        check_name(name)
        if not trusted:
            check_allowed(source, self._limits.allow_repositories)

    @contextmanager
    def _alone(self, name: str, source: str, progress: Progress | None) -> Iterator[None]:
        """One load of a name at a time."""
        with self._changed:
            while not self._changed.wait_for(lambda: name not in self._loading, WAITING_SECONDS):
                if progress is not None:
                    progress("waiting", 0, 0)
            self._loading[name] = source
        try:
            yield
        finally:
            with self._changed:
                del self._loading[name]
                self._changed.notify_all()

    def _checked(
        self,
        name: str,
        source: str,
        revision: str | None,
        stack: str | None,
        replace: bool,
        progress: Progress | None,
    ) -> Revision:
        """The revision, held; the name's own if it is that already."""
        checked = self._files.check(source, revision, stack, progress)
        with self._changed:
            present = self._named.get(name)
        if present is not None and present.is_same(checked):
            item = present
        elif present is None or replace:
            item = Revision(self._files, name, stack, checked)
        else:
            raise AlreadyExists(f"{name!r} is {present.repository} at {present.commit}", field="name")
        self.residency.hold(item)
        return item

    def _bring(self, item: Revision, progress: Progress | None) -> None:
        while item.adapter is None or item.is_leaving:
            with self._changed:
                self._changed.wait_for(lambda: not item.is_leaving)
            fetch = self.residency.prefetch(item, progress)
            if fetch is not None:
                fetch.result()
            elif item.adapter is None:
                raise Exhausted(
                    f"adapter memory: {item.size} bytes wanted, {self._limits.device_bytes} taken by adapters in use",
                    retry_after=1.0,
                )

    def _give_name(self, item: Revision) -> None:
        with self._changed:
            before = self._named.get(item.name)
            self._named[item.name] = item
            self.residency.name(item, True)
            if before is not None and before is not item:
                self._take_name(before)

    def _take_name(self, item: Revision) -> None:
        self.residency.name(item, False)
        for key in [key for key in self._mixes if any(part is item for part, _ in key)]:
            self.residency.name(self._mixes.pop(key), False)

    def unload(self, name: str) -> None:
        """Takes the name away; requests that hold the adapter finish on it, then its memory is freed.

        Raises:
            NotFound: no adapter has the name.
        """
        with self._changed:
            item = self._named.pop(name, None)
            if item is None:
                raise NotFound(f"{name!r} is not loaded", field="adapter")
            self._take_name(item)

    def get(self, name: str) -> AdapterInfo:
        """Raises NotFound."""
        with self._changed:
            if name not in self._named:
                raise NotFound(f"{name!r} is not loaded", field="adapter")
            return self._info(self._named[name])

    def __contains__(self, name: str) -> bool:
        """Whether an adapter has the name."""
        with self._changed:
            return name in self._named

    def list(self) -> list[AdapterInfo]:
        """All that have a name, in its order."""
        with self._changed:
            return [self._info(self._named[name]) for name in sorted(self._named)]

    def held_bytes(self) -> dict[str, int]:
        """Device bytes of each adapter and mix; what requests hold of adapters without a name is under "(leaving)"."""
        held: dict[str, int] = {}
        with self._changed:
            for item in self.residency.here():
                if not item.has_name:
                    name = "(leaving)"
                else:
                    name = item.name if isinstance(item, Revision) else item.label if isinstance(item, Mix) else ""
                held[name] = held.get(name, 0) + item.size
        return held

    def is_at_hand(self, name: str) -> bool:
        """Whether a lease of it has nothing to wait for."""
        with self._changed:
            item = self._named.get(name)
            return item is not None and item.has_tokenizer

    def lease(
        self, adapters: Sequence[tuple[str, float]], stack: str | None = None, progress: Progress | None = None
    ) -> Lease:
        """What a request computes with, held until released; its way to the device begins if there is room. Blocks
        while a repository ("org/name" or "org/name@revision") that the allow-list permits has to be downloaded.

        Args:
            adapters: names and weights; several are mixed as PEFT mixes several active adapters.
            stack: named stack; default is the adapters' own, or the base's order. With adapters it has to be theirs.
            progress: of what has to be downloaded, as for `load`.

        Raises:
            NotFound, InvalidArgument, Exhausted if they can never have room, and what `load` raises.
        """
        names = tuple(name for name, _ in adapters)
        if len(adapters) > MAX_ADAPTERS_OF_A_REQUEST or len(set(names)) < len(names):
            raise InvalidArgument(f"at most {MAX_ADAPTERS_OF_A_REQUEST}, each once", field="adapters")
        for name, weight in adapters:
            if not math.isfinite(weight):
                raise InvalidArgument(f"the weight of {name!r} is {weight}", field="adapters")
        named = None if stack is None else self._files.named_stack(stack)
        if not adapters:
            return Lease(named or self._files.stacks["base"], self._base.tokenizer)
        parts: list[Revision] = []
        try:
            for name in names:
                parts.append(self._hold(name, progress))
            walked = named or parts[0].stack
            for name, part in zip(names, parts, strict=True):
                if part.stack != walked:
                    other = "stack" if named else f"adapter {names[0]!r}"
                    raise InvalidArgument(f"{name!r} is for another stack than the {other}", field="adapters")
            tokenizer, infos = parts[0].tokenizer(), tuple(map(self._info, parts))
            key = tuple((part, weight) for part, (_, weight) in zip(parts, adapters, strict=True))
            whole = self._whole(key)
            try:
                self.residency.prefetch(whole)
            except BaseException:
                self.residency.let_go(whole)
                raise
            return Lease(walked, tokenizer, names, infos, (self.residency, whole))
        finally:
            for part in parts:
                self.residency.let_go(part)

    def _hold(self, name: str, progress: Progress | None) -> Revision:
        while True:
            with self._changed:
                item = self._named.get(name)
                if item is not None:
                    self.residency.hold(item)
                    return item
            if "/" not in name:
                raise NotFound(f"{name!r} is not loaded", field="adapter")
            self._register(name, progress)

    def _register(self, name: str, progress: Progress | None) -> None:
        """Gives a repository that the allow-list permits its own name; it comes to the device with its turn."""
        source, _, revision = name.partition("@")
        self.check_allowed(name, source, False)
        with self._alone(name, source, progress):
            item = self._checked(name, source, revision or None, None, False, progress)
            try:
                item.wait_for_digest()
                self._give_name(item)
            finally:
                self.residency.let_go(item)

    def _whole(self, key: MixKey) -> Resident:
        """What to compute with for adapters and weights, held."""
        with self._changed:
            if len(key) == 1 and key[0][1] == 1:
                self.residency.hold(key[0][0])
                return key[0][0]
            mixed = self._mixes.get(key) or Mix(key, tuple(self._base.modules), self._base.device)
            self.residency.hold(mixed)
            if all(self._named.get(part.name) is part for part, _ in key):  # else a part has lost its name meanwhile
                self._mixes[key] = mixed
                self.residency.name(mixed, True)
                self._drop_idle_mixes()
            return mixed

    def _drop_idle_mixes(self) -> None:
        """Keeps the latest; callers choose weights at will, and each choice is another mix."""
        idle = sorted((mixed for mixed in self._mixes.values() if not mixed.leases), key=lambda mixed: mixed.used)
        for mixed in idle[:-MAX_IDLE_MIXES]:
            self.residency.name(self._mixes.pop(mixed.parts), False)

    @staticmethod
    def _info(item: Revision) -> AdapterInfo:
        return AdapterInfo(
            name=item.name,
            repository=item.repository,
            commit=item.commit,
            digest=item.digest,
            stack=item.stack,
            kind=item.kind,
            rank=item.rank,
            parameters=item.parameters,
            tier="device" if item.adapter is not None else "host" if item.copy is not None else "disk",
            bytes=item.size if item.adapter is not None else 0,
            references=item.leases,
            pinned=item.pinned,
            priority=item.priority,
        )
