"""The ledger: the device memory in use by purpose, counted from the tensors themselves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from lorarep_runtime.adapters.registry import AdapterRegistry
from lorarep_runtime.model.base import Base
from lorarep_runtime.model.kv_cache import PagePool
from lorarep_runtime.model.weights import Weight


@dataclass(frozen=True)
class Ledger:
    """Bytes of device memory by purpose."""

    categories: Mapping[str, int]
    """Bytes of base_weights, quantization_constants, embeddings_and_head, adapters, kv_cache and workspace."""
    adapters: Mapping[str, int]
    """Bytes of each loaded adapter, and of each mix of several; "adapters" is their sum."""
    peft_bytes: int
    """Bytes that PEFT would hold for the same stacks and adapters, without a KV cache.

    PEFT has one model for each stack, and adapters in fp32. Replicas have copies of their own: of the quantization
    constants (NF4), or of the weights as well (int8).
    """

    ranks: Sequence[Mapping[str, int]] = ()
    """Where several ranks share the base: the categories of each one's device, rank 0's first, as above."""

    @property
    def total(self) -> int:
        return sum(self.categories.values())


def take_stock(
    base: Base,
    pool: PagePool,
    adapters: AdapterRegistry,
    steps: Iterable[Tensor] = (),
    others: Sequence[Mapping[str, int]] = (),
) -> Ledger:
    """Counts the device memory that is held now.

    Args:
        steps: the decoder's tensors, which it keeps from one step to the next.
        others: what `categories_of` said on each other rank at the start. Parts of adapters are of one size.
    """
    held = adapters.held_bytes()
    total = sum(held.values())
    categories = categories_of(base, pool, total, steps)
    fixed = sum(categories[name] for name in ("base_weights", "quantization_constants", "embeddings_and_head"))
    return Ledger(
        categories=categories,
        adapters=held,
        peft_bytes=_peft_bytes(base, adapters, fixed),
        ranks=[categories, *({**other, "adapters": total} for other in others)] if others else (),
    )


def categories_of(base: Base, pool: PagePool, adapters: int, steps: Iterable[Tensor] = ()) -> dict[str, int]:
    """Bytes of this process's device memory by their use.

    Args:
        adapters: bytes that those take.
        steps: the decoder's tensors.
    """
    seen: set[int] = set()
    weights = [w for layer in base.weights for w in layer.values()]
    constants = _bytes((t for w in weights for t in w.constants), seen)
    head = base.model.get_output_embeddings()
    vocabulary = [*base.model.get_input_embeddings().parameters(), *head.parameters()]
    embeddings = _bytes(vocabulary, seen)
    matrices = _bytes((t for w in weights for t in w.data), seen)
    # Norms and biases. The layers are the walk's, no longer the model's.
    modules = [base.model, *base.walk.layers]
    rest = _bytes((p for m in modules for p in m.parameters()), seen)
    besides = [*(b for m in modules for b in m.buffers()), *base.squares.values(), *steps]
    workspace = _bytes(besides, seen)
    return {
        "base_weights": matrices + rest,
        "quantization_constants": constants,
        "embeddings_and_head": embeddings,
        "adapters": adapters,
        "kv_cache": _bytes(pool.tensors, seen),
        "workspace": workspace,
    }


def _peft_bytes(base: Base, adapters: AdapterRegistry, base_bytes: int) -> int:
    parameters, stacks = adapters.totals()
    copied = [sum(map(_replica_bytes, weights.values())) for weights in base.weights]
    total = 4 * parameters
    for stack in stacks or [tuple(range(base.layers))]:
        total += base_bytes + sum(copied[layer] for layer in stack) - sum(copied[layer] for layer in set(stack))
    return total


def _replica_bytes(weight: Weight) -> int:
    """Bytes that each replica of a weight has for itself."""
    constants = sum(t.nbytes for t in weight.constants)
    return constants + sum(t.nbytes for t in weight.data) if weight.quantization == "int8" else constants


def _bytes(tensors: Iterable[Tensor], seen: set[int]) -> int:
    """Bytes of the tensors' storages. Storages in `seen` do not count; the others are added to it."""
    total = 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
    return total
