"""Compiles an adapter's weights file into the one form that kernels read:

    y = c ⊙ (W x) + B (A x) + b

LoRA (Hu et al., 2021) has no c; DoRA (Liu et al., 2024) has c = m / ‖W + s·B·A‖ by row, which is computed once, here.

One module's entries at many positions are mostly alike and at equal distances in the file. Each such run is read,
computed and written as one tensor. That takes few Python operations, for each of which streams wait (Python's GIL).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate, pairwise
from operator import sub
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lorarep_runtime.adapters.header import DTYPES, FILE_PREFIX, Header, tensor_name
from lorarep_runtime.adapters.peft_config import AdapterConfig
from lorarep_runtime.device.gil import give_way, giving_way
from lorarep_runtime.errors import DataLoss, FailedPrecondition
from lorarep_runtime.kernels.entry_table import Entry
from lorarep_runtime.model.compiled_adapter import (
    Adapter,
    Block,
    Form,
    Layout,
    adapter_of,
    allocate,
    blocks_of,
    entries_of,
    file_parameters,
    is_finite,
)
from lorarep_runtime.model.stack import Stack
from lorarep_runtime.progress import Progress

MAX_RUN_ELEMENTS = 5 << 17
"""Most elements of a run's largest tensor, so that computing with it takes little memory."""


class _Place(NamedTuple):
    """Where a file has the tensors of one entry, in the order of `Form.tensors`."""

    scale: float
    """Factor of B A x."""
    dtypes: tuple[torch.dtype, ...]
    starts: tuple[int, ...]
    """Offset of each tensor's first byte in the file."""


def _runs(places: Sequence[_Place], most: int) -> Iterator[range]:
    """Runs of entries that are alike and at equal distances in the file.

    Args:
        places: of a block's entries.
        most: most entries of a run.
    """
    distances = [tuple(map(sub, b.starts, a.starts)) for a, b in pairwise(places)]
    begin = 0
    for end, distance in enumerate(distances, 1):
        alike = places[end][:2] == places[begin][:2] and distance == distances[begin] and min(distance) > 0
        if not alike or end - begin == most:
            yield range(begin, end)
            begin = end
    yield range(begin, len(places))


def _read(data: Tensor, places: Sequence[_Place], kind: int, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Reads one kind of a run's tensors from the file's bytes: fp32 (entries, *shape), on the device."""
    dtype, start = places[0].dtypes[kind], places[0].starts[kind]
    size = math.prod(shape) * dtype.itemsize
    distance = places[1].starts[kind] - start if len(places) > 1 else size
    read = torch.empty(len(places), size, dtype=torch.uint8, device=device)
    read.copy_(data.as_strided(read.shape, (distance, 1), start))
    give_way()
    return read.view(dtype).view(-1, *shape).float()


def _mapped(file: Path, header: Header) -> tuple[Tensor, Mapping[str, int]]:
    """The bytes of a checked file, mapped into memory, and the offset of each tensor's first byte."""
    sizes = [math.prod(info.shape) * DTYPES[info.dtype].itemsize for info in header.values()]
    try:
        with file.open("rb") as opened:
            body = 8 + int.from_bytes(opened.read(8), "little")
        if file.stat().st_size != body + sum(sizes):
            raise DataLoss("is not what it was when it was checked", field=file.name)
        data = torch.from_file(str(file), shared=False, size=body + sum(sizes), dtype=torch.uint8)
    except (OSError, RuntimeError) as error:
        raise DataLoss(str(error), field=file.name) from error
    return data, dict(zip(header, accumulate(sizes, initial=body), strict=False))


NormTerms = Callable[[Sequence[int], str, Tensor], tuple[Tensor, Tensor]]
"""`Base.norm_terms`."""


def load_kernels(
    norm_terms: NormTerms, shapes: Mapping[str, tuple[int, int]], dtype: torch.dtype, device: torch.device
) -> None:
    """Loads the device kernels that compilation uses, before any request runs: the device stands still meanwhile.

    Libraries choose kernels by shape. These are the ones for rank 8, for runs of one entry, of two that share a layer,
    and of the most entries; other ranks may load others later.

    Args:
        norm_terms: `Base.norm_terms`.
        shapes: (out, in) of each linear module of a layer.
        dtype, device: of the activations.
    """
    for module, shape in shapes.items():
        form = Form(8, shape, has_c=True, has_bias=False)
        sizes = [math.prod(shape) * torch.bfloat16.itemsize for _, shape in form.tensors]
        *starts, entry_bytes = accumulate(sizes, initial=0)
        for entries in (1, 2, _most_entries(form)):
            blocks = [Block(module, range(entries), form, 0)]
            at = [tuple(start + entry_bytes * i for start in starts) for i in range(entries)]
            places = [_Place(1.0, (torch.bfloat16,) * len(sizes), starts) for starts in at]
            data = torch.zeros(entries * entry_bytes, dtype=torch.uint8)
            storage = allocate(blocks, dtype, device)
            _compile_run(data, places, form, blocks[0].entries(storage), partial(norm_terms, [0] * entries, module))
            is_finite(storage)


def _most_entries(form: Form) -> int:
    """Most entries of a run, for entries of a form."""
    return max(1, MAX_RUN_ELEMENTS // max(math.prod(shape) for _, shape in form.tensors))


def _compile_run(
    data: Tensor,
    places: Sequence[_Place],
    form: Form,
    to: Entry,
    norm_terms: Callable[[Tensor], tuple[Tensor, Tensor]],
) -> None:
    """Reads the entries of a run, computes them in fp32, and writes them in the activations' dtype.

    Args:
        data: the file's bytes.
        places: where these hold the entries.
        form: of each entry.
        to: where to write; the entries lie along a first dimension.
        norm_terms: `Base.norm_terms` of the layers that the entries are at, as a function of their A.
    """
    give_way()
    a, b, *rest = (_read(data, places, i, shape, to.A.device) for i, (_, shape) in enumerate(form.tensors))
    scale = places[0].scale
    if to.c is not None:
        give_way()
        squares, products = norm_terms(a)
        give_way()
        b *= scale
        # (entries, out, rank); ‖W + s·B·A‖² by row is ‖W‖² + 2·W·(s·B·A)ᵀ + ‖s·B·A‖².
        change = products.mT.mul_(2).add_(b @ (a @ a.mT)).mul_(b)
        c = rest.pop().div_(squares.add_(change.sum(2)).sqrt_())
        give_way()
        to.c.copy_(c)
        to.B.copy_(b * c.unsqueeze(2))
    else:
        to.B.copy_(b.mul_(scale))
    to.A.copy_(a)
    if to.bias is not None:
        to.bias.copy_(rest[0].mul_(scale))


def compile_adapter(
    file: Path,
    config: AdapterConfig,
    header: Header,
    layout: Layout,
    stack: Stack,
    *,
    prefix: str,
    modules: Sequence[str],
    norm_terms: NormTerms,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress | None = None,
) -> Adapter:
    """Reads a checked file, computes each entry in fp32 and casts it.

    Args:
        file: the adapter's weights, in the safetensors format.
        config: the adapter's.
        header, layout: as `checked_header` and `layout_of` gave them for this file.
        stack: the layers that the file's layer numbers count.
        prefix: path of the list of layers, such as "model.layers".
        modules: all linear modules of a layer, in the order of their numbers in entry tables.
        norm_terms: `Base.norm_terms`, for DoRA's norms.
        dtype, device: of the activations.
        progress: told of entries, as stage "compile".

    Raises:
        FailedPrecondition: a tensor holds NaN or infinity, or its values do in `dtype`.
        DataLoss: the file cannot be read.
    """
    give_way()
    data, starts = _mapped(file, header)
    paths = {key: f"{prefix}.{key[0]}.{key[1]}" for key in layout}
    places = {key: _place(paths[key], form, config, header, starts) for key, form in giving_way(layout.items())}
    blocks = blocks_of(layout, sorted(layout, key=lambda key: places[key].starts))
    storage = allocate(blocks, dtype, device)
    done = 0
    for block in blocks:
        whole = block.entries(storage)
        found = [places[position, block.module] for position in block.positions]
        for run in _runs(found, _most_entries(block.form)):
            part = slice(run.start, run.stop)
            layers = [stack[position] for position in block.positions[part]]
            to = Entry._make(None if views is None else views[part] for views in whole)
            _compile_run(data, found[part], block.form, to, partial(norm_terms, layers, block.module))
            done += len(run)
            if progress is not None:
                progress("compile", done, len(layout))
    give_way()
    if not is_finite(storage):
        entries = entries_of(storage, blocks)
        bad = next(key for key in layout if not all(t.isfinite().all() for t in entries[key] if t is not None))
        raise FailedPrecondition(f"holds NaN or infinity, or does in {dtype}", field=f"{FILE_PREFIX}{paths[bad]}")
    give_way()
    return adapter_of(stack, storage, blocks, modules, file_parameters(layout))


def _place(path: str, form: Form, config: AdapterConfig, header: Header, starts: Mapping[str, int]) -> _Place:
    """Where a file has the entry of the module at a path; starts: offset of each tensor of the file."""
    names = [tensor_name(path, kind) for kind, _ in form.tensors]
    dtypes = tuple(DTYPES[header[name].dtype] for name in names)
    return _Place(config.scaling(path), dtypes, tuple(starts[name] for name in names))
