"""Mixes: several adapters of one stack, each with a weight, computed with as one adapter."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch

from lorarep_runtime.adapters.residency import Hold, Residency
from lorarep_runtime.adapters.resident import Resident
from lorarep_runtime.adapters.revision import Revision
from lorarep_runtime.device.gil import give_way
from lorarep_runtime.errors import InvalidArgument
from lorarep_runtime.kernels.entry_table import Entry
from lorarep_runtime.model.compiled_adapter import (
    Adapter,
    Form,
    Key,
    adapter_of,
    allocate,
    blocks_of,
    copied_to,
    entries_of,
    is_finite,
)
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
        modules: all linear modules of a layer, in the order of their numbers in entry tables.
        device: where it is computed.
    """

    def __init__(self, parts: MixKey, modules: Sequence[str], device: torch.device) -> None:
        super().__init__(sum(part.size for part, _ in parts))
        self.parts = parts
        self._modules = modules
        self._device = device

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
        return mix_adapters([(self._on_device(part, progress), weight) for part, weight in self.parts], self._modules)

    def _on_device(self, part: Revision, progress: Progress | None) -> Adapter:
        """A part's adapter on the device; where it is not there, a copy for this mix alone."""
        adapter, copy = part.adapter, part.copy
        if adapter is None:
            adapter = part.make(progress) if copy is None else copied_to(copy, self._device)
        return adapter


class Mixes:
    """The mixes that new requests can find. Thread-safe.

    Args:
        residency: keeps the mixes in memory.
        modules, device: as for `Mix`.
    """

    def __init__(self, residency: Residency, modules: Sequence[str], device: torch.device) -> None:
        self._residency = residency
        self._modules = modules
        self._device = device
        self._mixes: dict[MixKey, Mix] = {}

    def hold_combined(self, key: MixKey) -> Hold[Resident]:
        """A hold on the adapter of a key, if it is a single one of weight 1, else on the mix of all its adapters."""
        with self._residency.changed:
            is_single = len(key) == 1 and key[0][1] == 1
            whole = key[0][0] if is_single else self._mixes.get(key) or Mix(key, self._modules, self._device)
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


def mix_adapters(parts: Sequence[tuple[Adapter, float]], modules: Sequence[str]) -> Adapter:
    """Mixes several adapters of one stack into one; each adapter's change to the output is multiplied by its weight.

    With weights of 1 the result equals PEFT's with several active adapters, merged or not: they act one after the
    other, so that DoRA's c scales the output of the adapters before it.

    Args:
        parts: the adapters, in the order in which they act, and their weights.
        modules: all linear modules of a layer, in the order of their numbers in entry tables.

    Raises:
        InvalidArgument: a weight is so large that the result is infinite or NaN.
    """
    sources: dict[Key, list[tuple[Entry, float]]] = defaultdict(list)
    for adapter, share in parts:
        for key, entry in entries_of(adapter.storage, adapter.blocks).items():
            sources[key].append((entry, share))
    layout = {
        key: Form(
            sum(entry.A.shape[0] for entry, _ in found),
            (found[0][0].B.shape[0], found[0][0].A.shape[1]),
            any(entry.c is not None for entry, _ in found),
            any(entry.bias is not None for entry, _ in found),
        )
        for key, found in sources.items()
    }
    first, blocks = parts[0][0], blocks_of(layout, layout)
    storage = allocate(blocks, first.storage.dtype, first.storage.device)
    entries = entries_of(storage, blocks)
    for key, found in sources.items():
        give_way()
        entry = entries[key]
        torch.cat([part.A for part, _ in found], out=entry.A)
        # In fp32, and cast once: c, and the change of each part, scaled by the c of all parts after it.
        after, columns = torch.ones(entry.B.shape[0], device=storage.device), entry.B.shape[1]
        bias = torch.zeros_like(after)
        for part, share in reversed(found):
            entry.B[:, columns - part.B.shape[1] : columns] = part.B.float() * (share * after).unsqueeze(1)
            columns -= part.B.shape[1]
            if part.bias is not None:
                bias += share * after * part.bias.float()
            if part.c is not None:
                after = after * (1 + share * (part.c.float() - 1))
        if entry.c is not None:
            entry.c.copy_(after)
        if entry.bias is not None:
            entry.bias.copy_(bias)
    give_way()
    if not is_finite(storage):
        largest = max((share for _, share in parts), key=abs)
        raise InvalidArgument(f"the weight {largest:g} makes the mix infinite in {storage.dtype}", field="adapters")
    parameters = sum(adapter.parameters for adapter, _ in parts)
    return adapter_of(first.stack, storage, blocks, modules, parameters)
