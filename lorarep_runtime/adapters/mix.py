"""Mixes: several adapters of one stack, each with a weight, computed with as one adapter."""

from __future__ import annotations

from collections.abc import Sequence

from lorarep_runtime.adapters.maker import AdapterMaker
from lorarep_runtime.adapters.residency import Hold, Residency
from lorarep_runtime.adapters.resident import Resident
from lorarep_runtime.adapters.revision import Revision
from lorarep_runtime.errors import FailedPrecondition
from lorarep_runtime.model.compiled_adapter import Adapter
from lorarep_runtime.progress import Progress

MAX_IDLE_MIXES = 16
"""Mixes that are kept although no request holds them."""

MAX_WEIGHT = 1e4
"""Largest absolute weight of an adapter in a mix."""

MixKey = tuple[tuple[Revision, float], ...]
"""The adapters of a mix and their weights."""


class Mix(Resident):
    """Several adapters with weights, which a request computes with as one.

    Args:
        parts: the adapters, in the order in which they act, and their weights.
        maker: mixes them.
    """

    def __init__(self, parts: MixKey, maker: AdapterMaker) -> None:
        super().__init__(sum(part.size for part, _ in parts))
        self.parts = parts
        self._maker = maker

    @property
    def label(self) -> str:
        return " + ".join(f"{weight:g}·{part.name}" for part, weight in self.parts)

    @property
    def is_findable(self) -> bool:
        """Whether new requests can find it: no longer than each of its parts."""
        return self.is_published and all(part.is_findable for part, _ in self.parts)

    @property
    def sources(self) -> Sequence[Resident]:
        return [part for part, _ in self.parts]

    def make(self, progress: Progress | None) -> Adapter:
        return self._maker.mix([(self._on_device(part, progress), weight) for part, weight in self.parts])

    def _on_device(self, part: Revision, progress: Progress | None) -> Adapter:
        """A part's adapter on the device; where it is not there, a copy for this mix alone."""
        adapter, copy = part.adapter, part.copy
        if adapter is None:
            adapter = part.make(progress) if copy is None else self._maker.copy(copy, self._maker.base.device)
        return adapter


class Mixes:
    """The mixes that new requests can find. Thread-safe.

    Args:
        residency: keeps the mixes in memory.
        maker: makes them.
    """

    def __init__(self, residency: Residency, maker: AdapterMaker) -> None:
        self._residency = residency
        self._maker = maker
        self._mixes: dict[MixKey, Mix] = {}

    def hold_combined(self, key: MixKey) -> Hold[Resident]:
        """A hold on the adapter of a key, if it is a single one of weight 1, else on the mix of all its adapters.

        Raises:
            FailedPrecondition: one of several has another vocabulary than the base, or is an aLoRA.
        """
        is_single = len(key) == 1 and key[0][1] == 1
        if not is_single and any(part.vocab_size != self._maker.base.vocab_size for part, _ in key):
            raise FailedPrecondition("one has a vocabulary of its own, which is not mixed", field="adapters")
        if not is_single and any(part.invocation for part, _ in key):
            raise FailedPrecondition("one is an aLoRA, which is not mixed", field="adapters")
        with self._residency.changed:
            whole = key[0][0] if is_single else self._mixes.get(key) or Mix(key, self._maker)
            hold: Hold[Resident] = self._residency.hold(whole)
            # A part may have lost its name since it was held: then no other request can ask for this mix.
            if isinstance(whole, Mix) and all(part.is_findable for part, _ in key):
                self._mixes[key] = whole
                self._residency.publish(whole)
                self._drop_idle()
            return hold

    def prune(self) -> None:
        """Drops the mixes of which a part has lost its name. Requests that hold one finish on it."""
        with self._residency.changed:
            for mix in [mix for mix in self._mixes.values() if not mix.is_findable]:
                # Else it could be found again, if a load that found the part before gives it its name back.
                self._residency.retire(self._mixes.pop(mix.parts))

    def _drop_idle(self) -> None:
        """Keeps the latest idle mixes only: callers choose weights at will, and each choice is another mix."""
        idle = sorted((mix for mix in self._mixes.values() if not mix.leases), key=lambda mix: mix.used)
        for mix in idle[:-MAX_IDLE_MIXES]:
            self._residency.retire(self._mixes.pop(mix.parts))

    def held_parts(self) -> set[Revision]:
        """The revisions that are part of a mix which requests hold."""
        with self._residency.changed:
            return {part for mix in self._mixes.values() if mix.leases for part, _ in mix.parts}
