"""The arithmetic of a mix: several adapters of one stack, each with a weight, made one adapter."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from lorarep_runtime.device.gil import give_way
from lorarep_runtime.errors import FailedPrecondition, InvalidArgument
from lorarep_runtime.kernels.entry_table import Entry
from lorarep_runtime.model.compiled_adapter import (
    Adapter,
    Key,
    adapter_of,
    allocate,
    blocks_of,
    entries_of,
    is_finite,
)
from lorarep_runtime.model.form import Form


def mix_adapters(parts: Sequence[tuple[Adapter, float]], modules: Sequence[str]) -> Adapter:
    """Mixes several adapters of one stack into one; each adapter's change to the output is multiplied by its weight.

    With weights of 1 the result equals PEFT's with several active adapters, merged or not: they act one after the
    other, so that DoRA's c scales the output of the adapters before it.

    Args:
        parts: the adapters, in the order in which they act, and their weights.
        modules: all linear modules of a layer, in the order of their numbers in entry tables.

    Raises:
        FailedPrecondition: one has rows of the head or the embedding in place of the base's.
        InvalidArgument: a weight is so large that the result is infinite or NaN.
    """
    if any(block.form.rows is not None for adapter, _ in parts for block in adapter.blocks):
        raise FailedPrecondition("one has a head or an embedding of its own, which are not mixed", field="adapters")
    sources: dict[Key, list[tuple[Entry, float]]] = defaultdict(list)
    experts: dict[Key, int] = {}
    for adapter, share in parts:
        for key, entry in entries_of(adapter.storage, adapter.blocks).items():
            sources[key].append((entry, share))
        for block in adapter.blocks:
            experts.update(((position, block.module), block.form.experts) for position in block.positions)
    layout = {
        key: Form(
            sum(entry.A.shape[0] for entry, _ in found) // max(1, experts[key]),
            (found[0][0].B.shape[0], found[0][0].A.shape[1]),
            any(entry.c is not None for entry, _ in found),
            any(entry.bias is not None for entry, _ in found),
            experts=experts[key],
        )
        for key, found in sources.items()
    }
    first, blocks = parts[0][0], blocks_of(layout, layout)
    storage = allocate(blocks, first.storage.dtype, first.storage.device)
    entries = entries_of(storage, blocks)
    for key, found in sources.items():
        give_way()
        entry = entries[key]
        if experts[key]:
            _mix_experts(entry, found, experts[key])
            continue
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


def _mix_experts(entry: Entry, found: Sequence[tuple[Entry, float]], experts: int) -> None:
    """Writes an entry of experts: for each of them, the ranks of all parts."""

    def together(matrices: Sequence[Tensor]) -> Tensor:
        return torch.cat([matrix.unflatten(0, (experts, -1)) for matrix in matrices], 1).flatten(0, 1)

    entry.A.copy_(together([part.A for part, _ in found]))
    entry.B.T.copy_(together([part.B.T.float() * share for part, share in found]))
