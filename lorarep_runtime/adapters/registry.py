"""The adapters that have a name: loaded, leased to requests, and unloaded.

A load is downloaded, checked and compiled concurrently with running requests, then appears under its name. A request
holds a lease on a revision: whatever happens to the name, it finishes on the revision that it was admitted with.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from lorarep_runtime.adapters.files import AdapterFiles
from lorarep_runtime.adapters.lease import Lease
from lorarep_runtime.adapters.maker import AdapterMaker
from lorarep_runtime.adapters.mix import MAX_WEIGHT, Mix, Mixes
from lorarep_runtime.adapters.peft_config import check_name
from lorarep_runtime.adapters.residency import Hold, Residency
from lorarep_runtime.adapters.resident import Tier
from lorarep_runtime.adapters.revision import AdapterInfo, Revision
from lorarep_runtime.config import AdapterLimits
from lorarep_runtime.errors import AlreadyExists, InvalidArgument, NotFound
from lorarep_runtime.hub.snapshot import check_allowed, repository_of
from lorarep_runtime.model.base import Base
from lorarep_runtime.model.stack import Stack
from lorarep_runtime.progress import Progress
from lorarep_runtime.text.tokenizer import Tokenizer

MAX_ADAPTERS_OF_A_REQUEST = 16
MAX_ON_DEMAND = 4096
"""Most names that requests have given to repositories by asking for them. The least recently used go first, and come
back when a request asks for them."""
WAITING_SECONDS = 0.25
"""Time between two reports of a load that waits for another load of its name."""


class AdapterRegistry:
    """Maps names to revisions, and leases these to requests. Thread-safe.

    Args:
        base: the model that the adapters are for.
        stacks: named stacks, "base" among them.
        limits: what adapters may ask for, and how much memory they may take.
        cache_dir: Hub cache; None is huggingface_hub's default.
        maker: makes the adapters; by default one of this process alone.
    """

    def __init__(
        self,
        base: Base,
        stacks: Mapping[str, Stack],
        limits: AdapterLimits,
        cache_dir: Path | None,
        maker: AdapterMaker | None = None,
    ) -> None:
        maker = maker or AdapterMaker(base)
        self.residency = Residency(base.device, limits, maker.copy)
        self._base = base
        self._limits = limits
        self._files = AdapterFiles(base, stacks, limits, cache_dir, self._uses, maker)
        self._changed = self.residency.changed
        self._named: dict[str, Revision] = {}
        self._parameters, self._stacks = 0, Counter[Stack]()
        """Of all that have a name: the numbers in their files, and how many have each stack."""
        self._mixes = Mixes(self.residency, maker)
        self._loading: dict[str, str] = {}
        """Names that are being loaded, and the sources they are loaded from."""
        self._on_demand: set[str] = set()
        """Names that say their own repository and that no operator made."""

    def _uses(self) -> dict[str, int | None]:
        """Last use of each repository, for `DiskBudget`.

        None keeps the files: a load, a pinned adapter or a request may need them. A request computes from memory, but
        an adapter may leave that before a waiting request starts.
        """
        with self._changed:
            named, mixed = list(self._named.values()), self._mixes.held_parts()
            loading = list(self._loading.values())
        uses: dict[str, int | None] = {}
        for item in named:
            used = None if item.pinned or item.leases or item in mixed else item.used
            repository = item.cached_repository
            if uses.get(repository, 0) is not None:
                uses[repository] = used if used is None else max(used, uses.get(repository) or 0)
        return uses | dict.fromkeys(repository_of(source) for source in loading)

    # Loads.

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
        """Loads an adapter into device memory and names it. A revision that has the name already keeps it.

        Args:
            name: by which requests find it.
            source: repository, "organization/name", or a folder in one, "organization/name/checkpoint-430"; if trusted,
                also a folder of this machine.
            revision: branch, tag or commit.
            stack: named stack that the adapter's layer numbers count, for adapters trained on a stacked model; default
                is its own `layer_replication`, else the base's order.
            trusted: whether the operator names it. Neither the allow-list nor the bounds on downloads bind those, and
                their tokenizers may compute anything.
            pinned: whether it never leaves the device. None leaves it as it is, at first False.
            priority: among those that may leave, the lowest leaves first. None leaves it as it is, at first 0.
            replace: whether it may take the name of another revision, whose requests finish on that.
            progress: told of stages "waiting" (for another load of the name), "download" (bytes), "check" and
                "compile" (modules). What it raises ends the load.

        Raises:
            LorarepError: as `AdapterFiles.check` and `compile_adapter`; AlreadyExists if another revision has the
                name; Exhausted if there is no room. What was loaded before stays.
        """
        self.check_allowed(name, source, trusted)
        with self._only_load_of(name, source, progress):
            item = self._checked(name, source, revision, stack, trusted, replace, progress)
            with self.residency.hold(item) as hold:
                hold.load(progress)
                on_demand = not trusted and name in (source, f"{source}@{revision}")
                self._give_name(item, pinned, priority, on_demand=on_demand)
            return item.info()

    def check_allowed(self, name: str, source: str, trusted: bool) -> None:
        """Checks that `load` may be asked for a name and a source, without any request to the Hub.

        Raises:
            InvalidArgument: the name or the repository is malformed.
            PermissionDenied: the allow-list does not permit the repository.
        """
        check_name(name)
        if not trusted:
            check_allowed(source, self._limits.allow_repositories)

    @contextmanager
    def _only_load_of(self, name: str, source: str, progress: Progress | None) -> Iterator[None]:
        """Waits until no other load of the name is running, and keeps others waiting until the end."""
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
        trusted: bool,
        replace: bool,
        progress: Progress | None,
    ) -> Revision:
        """The revision that the source has now: the one that has the name, if they are the same, or a new one."""
        checked = self._files.check(source, revision, stack, progress, trusted=trusted)
        with self._changed:
            present = self._named.get(name)
        if present is not None and present.is_same(checked):
            return present
        if present is not None and not replace:
            raise AlreadyExists(f"{name!r} is {present.repository} at {present.commit}", field="name")
        return Revision(self._files, name, stack, checked, trusted=trusted)

    def _give_name(
        self, item: Revision, pinned: bool | None = None, priority: int | None = None, *, on_demand: bool
    ) -> None:
        """Lets new requests find a revision by its name, and the one that had the name no more."""
        with self._changed:
            before = self._rename(item.name, item)
            self.residency.set_policy(item, pinned=pinned, priority=priority)
            self.residency.publish(item, instead_of=before)
            self._mixes.prune()
            if on_demand and before is None:
                self._on_demand.add(item.name)
                self._drop_idle_names(item)
            elif not on_demand:
                self._on_demand.discard(item.name)

    def _rename(self, name: str, item: Revision | None) -> Revision | None:
        """Gives a name to a revision, or to none. Returns the revision that had it."""
        before = self._named.pop(name, None)
        if before is not None:
            self._parameters -= before.parameters
            self._stacks -= Counter([before.stack])
        if item is not None:
            self._named[name] = item
            self._parameters += item.parameters
            self._stacks[item.stack] += 1
        return before

    def _drop_idle_names(self, latest: Revision) -> None:
        """Unloads the least recently used of too many names that requests have made; those in use stay."""
        if len(self._on_demand) <= MAX_ON_DEMAND:
            return
        named = (self._named[name] for name in self._on_demand)
        idle = [item for item in named if item is not latest and not item.leases and not item.pinned]
        # Some more than have to go, so that not every new name looks at all.
        most = MAX_ON_DEMAND - MAX_ON_DEMAND // 32
        for item in sorted(idle, key=lambda item: (item.priority, item.used))[: len(self._on_demand) - most]:
            self.unload(item.name)

    def set_policy(self, name: str, *, pinned: bool | None = None, priority: int | None = None) -> AdapterInfo:
        """Says how long an adapter stays on the device, as for `load`; None leaves it as it is. Raises NotFound."""
        with self._changed:
            if name not in self._named:
                raise NotFound(f"{name!r} is not loaded", field="adapter")
            self.residency.set_policy(self._named[name], pinned=pinned, priority=priority)
            return self._named[name].info()

    def unload(self, name: str) -> None:
        """Takes the name away; requests that hold the adapter finish on it, then its memory is freed.

        Raises:
            NotFound: no adapter has the name.
        """
        with self._changed:
            item = self._rename(name, None)
            if item is None:
                raise NotFound(f"{name!r} is not loaded", field="adapter")
            self._on_demand.discard(name)
            self.residency.retire(item)
            self._mixes.prune()

    # What there is.

    def get(self, name: str) -> AdapterInfo:
        """The adapter that has the name. Raises NotFound."""
        with self._changed:
            if name not in self._named:
                raise NotFound(f"{name!r} is not loaded", field="adapter")
            return self._named[name].info()

    def __contains__(self, name: str) -> bool:
        """Whether an adapter has the name."""
        with self._changed:
            return name in self._named

    def list(self) -> list[AdapterInfo]:
        """All adapters that have a name, in the order of their names."""
        return [item.info() for item in sorted(self._all_named(), key=lambda item: item.name)]

    def in_memory(self) -> Sequence[AdapterInfo]:
        """Those of them that device or host memory holds."""
        held = [item for item, _ in self.residency.taken()]
        return [item.info() for item in held if isinstance(item, Revision) and item.is_findable]

    def tiers(self) -> Mapping[Tier, int]:
        """How many adapters with a name are in each memory."""
        return Counter(item.tier for item in self._all_named())

    def totals(self) -> tuple[int, Collection[Stack]]:
        """The numbers in the files of all adapters that have a name, and their different stacks."""
        with self._changed:
            return self._parameters, list(self._stacks)

    def _all_named(self) -> Sequence[Revision]:
        """Those that have a name now. Who looks at all of them does so without the lock, for which steps wait."""
        with self._changed:
            return tuple(self._named.values())

    def held_bytes(self) -> dict[str, int]:
        """Device bytes of each adapter. All mixes are under "(mixes)", since callers choose their weights.

        All that requests hold without a name is under "(leaving)".
        """
        held: dict[str, int] = {}
        for item in [item for item, (device, _) in self.residency.taken() if device]:
            name = "(leaving)" if not item.is_findable else "(mixes)" if isinstance(item, Mix) else item.label
            held[name] = held.get(name, 0) + item.size
        return held

    def can_lease_at_once(self, name: str) -> bool:
        """Whether a lease of the name needs neither a download nor a look at the disk."""
        with self._changed:
            item = self._named.get(name)
            return item is not None and item.has_tokenizer

    # Leases.

    def lease(
        self, adapters: Sequence[tuple[str, float]], stack: str | None = None, progress: Progress | None = None
    ) -> Lease:
        """A request's lease, to be released by the caller; the adapter's load begins if there is room.

        Blocks while a repository ("org/name" or "org/name@revision") that the allow-list permits is downloaded.

        Args:
            adapters: names and weights; several are mixed as PEFT mixes several active adapters.
            stack: named stack; default is the adapters' own, or the base's order. With adapters it has to be theirs.
            progress: told of the download, as for `load`.

        Raises:
            LorarepError: NotFound, InvalidArgument, Exhausted if they can never have room, and as `load`.
        """
        names = tuple(name for name, _ in adapters)
        with self._held_parts(adapters, stack, progress) as (walked, parts):
            if not parts:
                return Lease(walked, self._base.tokenizer, self._base.vocab_size)
            tokenizer, infos = parts[0].tokenizer(), tuple(part.info() for part in parts)
            key = tuple((part, weight) for part, (_, weight) in zip(parts, adapters, strict=True))
            contents = tuple((part.content, weight) for part, weight in key)
            hold = self._mixes.hold_combined(key)
            try:
                hold.prefetch()
            except BaseException:
                hold.release()
                raise
            # Mixes have the base's vocabulary.
            vocab_size = parts[0].vocab_size if len(parts) == 1 else self._base.vocab_size
            return Lease(walked, tokenizer, vocab_size, names, infos, contents, hold, parts[0].invocation)

    def tokenizer(self, adapters: Sequence[tuple[str, float]], progress: Progress | None = None) -> Tokenizer:
        """The tokenizer of requests with these adapters. No weights are brought to the device for it.

        Args:
            adapters, progress: as for `lease`. It blocks and raises as that does, but never Exhausted for room.
        """
        with self._held_parts(adapters, None, progress) as (_, parts):
            return parts[0].tokenizer() if parts else self._base.tokenizer

    @contextmanager
    def _held_parts(
        self, adapters: Sequence[tuple[str, float]], stack: str | None, progress: Progress | None
    ) -> Iterator[tuple[Stack, Sequence[Revision]]]:
        """The stack and the revisions of a request, which are held while the context lasts."""
        named = self.check_lease(adapters, stack)
        with ExitStack() as holds:
            parts = [holds.enter_context(self._hold(name, progress)).item for name, _ in adapters]
            walked = named or (parts[0].stack if parts else self._files.stacks["base"])
            for (name, _), part in zip(adapters, parts, strict=True):
                if part.stack != walked:
                    other = "stack" if named else f"adapter {adapters[0][0]!r}"
                    raise InvalidArgument(f"{name!r} is for another stack than the {other}", field="adapters")
            yield walked, parts

    def check_lease(self, adapters: Sequence[tuple[str, float]], stack: str | None = None) -> Stack | None:
        """Refuses what `lease` would refuse whatever the adapters are: nothing is loaded for it.

        Returns:
            The named stack, if one is named.

        Raises:
            InvalidArgument: too many adapters, one of them twice, or a weight that is no number.
            NotFound: there is no such stack.
        """
        self.check_count(len(adapters))
        if len({name for name, _ in adapters}) < len(adapters):
            raise InvalidArgument("one is named twice", field="adapters")
        for name, weight in adapters:
            if not abs(weight) <= MAX_WEIGHT:  # NaN neither
                raise InvalidArgument(
                    f"the weight of {name!r} is {weight}, and not from {-MAX_WEIGHT:g} to {MAX_WEIGHT:g}",
                    field="adapters",
                )
        return None if stack is None else self._files.named_stack(stack)

    @staticmethod
    def check_count(adapters: int) -> None:
        """Refuses more adapters than a request may have, before anything looks at each. Raises InvalidArgument."""
        if adapters > MAX_ADAPTERS_OF_A_REQUEST:
            raise InvalidArgument(f"{adapters} are over the limit of {MAX_ADAPTERS_OF_A_REQUEST}", field="adapters")

    def _hold(self, name: str, progress: Progress | None) -> Hold[Revision]:
        """A hold on the revision that has the name; a repository that has no name yet gets its own."""
        while True:
            if name not in self:
                self._register(name, progress)
            with self._changed:
                if name in self._named:  # else it has been unloaded meanwhile
                    return self.residency.hold(self._named[name])

    def _register(self, name: str, progress: Progress | None) -> None:
        """Names a repository that the allow-list permits by itself, without a load: that is the lease's."""
        if "/" not in name:
            raise NotFound(f"{name!r} is not loaded", field="adapter")
        source, _, revision = name.partition("@")
        self.check_allowed(name, source, False)
        with self._only_load_of(name, source, progress):
            item = self._checked(name, source, revision or None, None, False, False, progress)
            item.wait_for_digest()
            self._give_name(item, on_demand=True)
