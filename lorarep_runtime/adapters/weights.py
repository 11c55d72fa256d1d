"""An adapter's file, checked against its config by its header alone, and compiled into the one form that kernels know:

    y = c ⊙ (W x) + B (A x) + b

LoRA (Hu et al., 2021) has no c; DoRA (Liu et al., 2024) has c = m / ‖W + s·B·A‖ by row, taken once, here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lorarep_runtime.adapters.spec import AdapterSpec
from lorarep_runtime.errors import DataLoss, FailedPrecondition
from lorarep_runtime.hub import Progress
from lorarep_runtime.kernels.rows import Entry, entry_table
from lorarep_runtime.stack import Stack

FILE_PREFIX = "base_model.model."
"""What PEFT puts before a module's path."""
DTYPES = ("F64", "F32", "F16", "BF16")
ALIGNMENT = 64
"""Elements; every matrix begins at a multiple, so that a kernel can load it in whole cache lines."""

Key = tuple[int, str]
"""Position, and path of a linear module inside its layer, such as "self_attn.q_proj"."""


class TensorInfo(NamedTuple):
    """What a safetensors header says of a tensor."""

    dtype: str
    shape: tuple[int, ...]


class Part(NamedTuple):
    """What a file holds for one module at one position."""

    path: str
    """Of the module in the stacked model, as the file's names have it."""
    rank: int
    shape: tuple[int, int]
    """(out, in)"""
    has_c: bool
    has_bias: bool


Layout = Mapping[Key, Part]
"""All that an adapter consists of."""


@dataclass(frozen=True, eq=False)
class Adapter:
    """A compiled adapter on the device, or a mix of several: one entry for each targeted module at each position."""

    stack: Stack
    modules: tuple[str, ...]
    """All linear modules of a layer, in the order of their numbers in entry tables."""
    entries: Mapping[Key, Entry]
    storage: Tensor
    """(elements), the memory of all entries."""
    table: Tensor | None
    """The entry table of `kernels.rows`, on an accelerator."""
    kind: str
    """"dora" where an entry has a c, else "lora"."""
    rank: int
    """Largest of its entries."""
    parameters: int
    """Numbers in its file."""

    @property
    def nbytes(self) -> int:
        return self.storage.nbytes + (0 if self.table is None else self.table.nbytes)


def read_header(file: Path) -> Mapping[str, TensorInfo]:
    """The tensors of a safetensors file, by name; reads its header alone.

    https://huggingface.co/docs/safetensors: the library checks the header and that it covers the file exactly.

    Raises:
        DataLoss: the file is corrupt or truncated.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            header = {}
            for name in opened.keys():  # noqa: SIM118 (it has no __iter__)
                piece = opened.get_slice(name)
                header[name] = TensorInfo(piece.get_dtype(), tuple(piece.get_shape()))
            return header
    except (SafetensorError, OSError, ValueError) as error:
        raise DataLoss(f"{file.name}: {error}") from error


def check(
    spec: AdapterSpec,
    header: Mapping[str, TensorInfo],
    stack: Stack,
    modules: Mapping[str, tuple[int, int]],
    prefix: str,
) -> Layout:
    """Compares what the config promises with what the file holds.

    Args:
        stack: that the file's layer numbers count.
        modules: (out, in) of the linear modules of every layer.
        prefix: path of the list of layers, such as "model.layers".

    Raises:
        FailedPrecondition: naming a tensor that is missing, surplus, of another shape or of a dtype that is no float.
        InvalidArgument: a pattern of the config cannot be matched.
    """
    layout: dict[Key, Part] = {}
    expected: dict[str, tuple[int, ...]] = {}
    for position in range(len(stack)):
        for module, (out, into) in modules.items():
            path = f"{prefix}.{position}.{module}"
            if spec.targets(path):
                part = Part(path, spec.rank(path), (out, into), spec.use_dora, spec.lora_bias)
                layout[position, module] = part
                expected |= {
                    _name(path, kind): shape
                    for kind, shape, present in (
                        ("lora_A.weight", (part.rank, into), True),
                        ("lora_B.weight", (out, part.rank), True),
                        ("lora_B.bias", (out,), part.has_bias),
                        ("lora_magnitude_vector", (out,), part.has_c),
                    )
                    if present
                }
    if surplus := sorted(header.keys() - expected.keys()):
        raise FailedPrecondition(f"{surplus[0]}: is in the file, and nothing in the config speaks of it")
    if not layout:
        raise FailedPrecondition("target_modules: match no linear layer of the decoder")
    for name, shape in expected.items():
        if name not in header:
            raise FailedPrecondition(f"{name}: is missing in the file")
        if header[name].shape != shape:
            raise FailedPrecondition(f"{name}: has the shape {header[name].shape}, the config says {shape}")
        if header[name].dtype not in DTYPES:
            raise FailedPrecondition(f"{name}: is of type {header[name].dtype}; {', '.join(DTYPES)} are supported")
    return layout


def _name(path: str, kind: str) -> str:
    return f"{FILE_PREFIX}{path}.{kind}"


def _pieces(part: Part) -> Iterator[tuple[int, ...]]:
    """Shapes of what an entry holds in memory: A, Bᵀ, c, bias."""
    out, into = part.shape
    yield part.rank, into
    yield part.rank, out
    for present in (part.has_c, part.has_bias):
        if present:
            yield (out,)


def _padded(shape: Sequence[int]) -> int:
    elements = torch.Size(shape).numel()
    return -(-elements // ALIGNMENT) * ALIGNMENT


def storage_bytes(layout: Layout, dtype: torch.dtype) -> int:
    """Bytes that a compiled adapter takes on the device."""
    return dtype.itemsize * sum(_padded(shape) for part in layout.values() for shape in _pieces(part))


def file_parameters(layout: Layout) -> int:
    """Numbers in the file."""
    return sum(torch.Size(shape).numel() for part in layout.values() for shape in _pieces(part))


def _allocate(layout: Layout, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, dict[Key, Entry]]:
    """Zeros for a layout, and the entries that are views of them."""
    storage = torch.zeros(storage_bytes(layout, dtype) // dtype.itemsize, dtype=dtype, device=device)
    entries, at = {}, 0
    for key, part in layout.items():
        views = []
        for shape in _pieces(part):
            views.append(storage[at : at + torch.Size(shape).numel()].view(shape))
            at += _padded(shape)
        a, b, *rest = views
        entries[key] = Entry(a, b.T, rest.pop(0) if part.has_c else None, rest.pop(0) if part.has_bias else None)
    return storage, entries


def compile_adapter(
    file: Path,
    spec: AdapterSpec,
    layout: Layout,
    stack: Stack,
    *,
    modules: Sequence[str],
    weight: Callable[[int, str], Tensor],
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress | None = None,
) -> Adapter:
    """Reads a checked file and computes each entry in fp32, then casts it.

    Args:
        layout: as `check` gave it for this file.
        modules: all linear modules of a layer, in the order of their numbers in entry tables.
        weight: gives the fp32 weight (out, in) of (layer, module), for DoRA's norm.
        dtype, device: of the activations.
        progress: told of entries, as stage "compile".

    Raises:
        FailedPrecondition: a tensor holds NaN or infinity, or does in `dtype`.
        DataLoss: the file cannot be read.
    """
    storage, entries = _allocate(layout, dtype, device)
    # Positions that share a weight, side by side: it is dequantized once.
    groups: dict[tuple[int, str], list[int]] = defaultdict(list)
    for position, module in layout:
        groups[stack[position], module].append(position)
    done = 0
    try:
        with safe_open(file, framework="pt") as opened:

            def read(path: str, kind: str) -> Tensor:
                tensor: Tensor = opened.get_tensor(_name(path, kind))
                return tensor.to(device, torch.float32)

            for (layer, module), positions in groups.items():
                base = weight(layer, module) if spec.use_dora else None
                for position in positions:
                    part, entry = layout[position, module], entries[position, module]
                    scale = spec.scaling(part.path)
                    a, b = read(part.path, "lora_A.weight"), read(part.path, "lora_B.weight")
                    if entry.c is not None and base is not None:
                        norm = torch.linalg.vector_norm(torch.addmm(base, b, a, alpha=scale), dim=1)
                        c = read(part.path, "lora_magnitude_vector") / norm
                        entry.c.copy_(c)
                        b *= c.unsqueeze(1)
                    entry.A.copy_(a)
                    entry.B.copy_(b * scale)
                    if entry.bias is not None:
                        entry.bias.copy_(read(part.path, "lora_B.bias") * scale)
                    done += 1
                    if progress is not None:
                        progress("compile", done, len(layout))
    except (SafetensorError, OSError) as error:
        raise DataLoss(f"{file.name}: {error}") from error
    if not storage.isfinite().all():
        bad = next(key for key, entry in entries.items() if not all(t.isfinite().all() for t in entry if t is not None))
        raise FailedPrecondition(f"{FILE_PREFIX}{layout[bad].path}: holds NaN or infinity, or does in {dtype}")
    return _adapter(stack, layout, storage, entries, modules, file_parameters(layout))


def _adapter(
    stack: Stack,
    layout: Layout,
    storage: Tensor,
    entries: Mapping[Key, Entry],
    modules: Sequence[str],
    parameters: int,
) -> Adapter:
    kind = "dora" if any(part.has_c for part in layout.values()) else "lora"
    table = entry_table(entries, len(stack), modules).to(storage.device) if storage.is_cuda else None
    rank = max(part.rank for part in layout.values())
    return Adapter(stack, tuple(modules), entries, storage, table, kind, rank, parameters)


def moved(adapter: Adapter, device: torch.device) -> Adapter:
    """A copy of an adapter in another memory; the host's is pinned where the copy comes from an accelerator."""
    source = adapter.storage
    pinned = device.type == "cpu" and source.is_cuda
    storage = torch.empty(source.shape, dtype=source.dtype, device=device, pin_memory=pinned)
    storage.copy_(source, non_blocking=True)

    def there(view: Tensor) -> Tensor:
        return storage.as_strided(view.shape, view.stride(), view.storage_offset())

    entries = {
        key: Entry(there(a), there(b), None if c is None else there(c), None if bias is None else there(bias))
        for key, (a, b, c, bias) in adapter.entries.items()
    }
    table = entry_table(entries, len(adapter.stack), adapter.modules).to(device) if storage.is_cuda else None
    return replace(adapter, storage=storage, entries=entries, table=table)


def mix(parts: Sequence[tuple[Adapter, float]], modules: Sequence[str]) -> Adapter:
    """Several adapters of one stack as one, each adapter's change to the output times its weight.

    With weights of 1 this is what PEFT computes with several active adapters, and what it merges them to: they act one
    after the other, so that DoRA's c scales the output as the adapters before it leave it.
    """
    sources: dict[Key, list[tuple[Entry, float]]] = defaultdict(list)
    for adapter, share in parts:
        for key, entry in adapter.entries.items():
            sources[key].append((entry, share))
    layout = {
        key: Part(
            "",
            sum(entry.A.shape[0] for entry, _ in found),
            (found[0][0].B.shape[0], found[0][0].A.shape[1]),
            any(entry.c is not None for entry, _ in found),
            any(entry.bias is not None for entry, _ in found),
        )
        for key, found in sources.items()
    }
    first = parts[0][0]
    storage, entries = _allocate(layout, first.storage.dtype, first.storage.device)
    for key, found in sources.items():
        entry = entries[key]
        torch.cat([part.A for part, _ in found], out=entry.A)
        # In fp32, and cast once: c, and what each part adds, scaled by the c of all parts after it.
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
    parameters = sum(adapter.parameters for adapter, _ in parts)
    return _adapter(first.stack, layout, storage, entries, modules, parameters)
