"""Compiles an adapter's weights file into the one form that kernels read:

    y = c ⊙ (W x) + B (A x) + b

LoRA (Hu et al., 2021) has no c; DoRA (Liu et al., 2024) has c = m / ‖W + s·B·A‖ by row, which is computed once, here.

One module's entries at many positions are mostly alike and at equal distances in the file. Each such run is read,
computed and written as one tensor. That takes few Python operations, for each of which streams wait (Python's GIL).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from operator import sub
from typing import NamedTuple

import torch
from torch import Tensor

from lorarep_runtime.adapters.header import DTYPES, Header, file_path, path_of, tensor_name
from lorarep_runtime.adapters.peft_config import FILE_PREFIX, AdapterConfig
from lorarep_runtime.adapters.weights_file import WeightsFile
from lorarep_runtime.device.gil import give_way, giving_way
from lorarep_runtime.errors import FailedPrecondition
from lorarep_runtime.kernels.entry_table import Entry
from lorarep_runtime.model.compiled_adapter import (
    Adapter,
    Block,
    Layout,
    adapter_of,
    allocate,
    blocks_of,
    file_parameters,
    is_finite,
    whole_matrices,
)
from lorarep_runtime.model.cut import Cut, Part
from lorarep_runtime.model.form import Form
from lorarep_runtime.model.stack import Stack
from lorarep_runtime.progress import Progress

COPY_BYTES = 4 << 20
"""Bytes of rows of a file that are read at a time."""
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


def _read(file: int, places: Sequence[_Place], form: Form) -> list[Tensor]:
    """Reads a run's tensors into host memory: for each kind, in its dtype, (entries, *shape).

    Args:
        file: descriptor of the weights file.
        places: where it holds the entries of the run.
        form: of each entry.

    Raises:
        OSError, EOFError: the file cannot be read, or ends before a tensor does.
    """
    first = places[0]
    shapes = [shape for _, shape in form.tensors]
    sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in zip(shapes, first.dtypes, strict=True)]
    read = [torch.empty(len(places), size, dtype=torch.uint8) for size in sizes]
    arrays = [tensor.numpy() for tensor in read]
    # An entry's tensors mostly lie one after the other: such neighbours take one call.
    neighbours: list[list[int]] = []
    for kind in sorted(range(len(sizes)), key=first.starts.__getitem__):
        last = neighbours[-1][-1] if neighbours else None
        if last is not None and first.starts[last] + sizes[last] == first.starts[kind]:
            neighbours[-1].append(kind)
        else:
            neighbours.append([kind])
    for entry, place in giving_way(enumerate(places)):
        for kinds in neighbours:
            _fill([arrays[kind][entry].data for kind in kinds], file, place.starts[kinds[0]])
    return [
        tensor.view(dtype).view(-1, *shape) for tensor, dtype, shape in zip(read, first.dtypes, shapes, strict=True)
    ]


def _fill(buffers: list[memoryview], file: int, start: int) -> None:
    """Reads a file into buffers, one after the other, from a byte on. Some file systems give less than is asked for.

    Raises:
        OSError, EOFError: the file cannot be read, or ends before the buffers do.
    """
    while buffers:
        count = os.preadv(file, buffers, start)
        if not count:
            raise EOFError("ends before its tensors do")
        start += count
        while buffers and count >= len(buffers[0]):
            count -= len(buffers.pop(0))
        if count:
            buffers[0] = buffers[0][count:]


def _starts(file: int, header: Header) -> Mapping[str, int]:
    """Offset of each tensor's first byte in a file."""
    sizes = [math.prod(info.shape) * DTYPES[info.dtype].itemsize for info in header.values()]
    body = 8 + int.from_bytes(os.pread(file, 8, 0), "little")
    return dict(zip(header, accumulate(sizes, initial=body), strict=False))


NormTerms = Callable[[Sequence[int], str, Tensor], tuple[Tensor, Tensor]]
"""`Base.norm_terms`."""


def load_kernels(
    norm_terms: NormTerms,
    layer_modules: Sequence[Mapping[str, tuple[int, int]]],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Loads the device kernels that compilation uses, before any request runs: the device stands still meanwhile.

    Libraries choose kernels by shape. These are the ones for rank 8, for runs of one entry, of two that share a layer,
    and of the most entries; other ranks may load others later.

    Args:
        norm_terms: `Base.norm_terms`.
        layer_modules: for each layer (out, in) of its linear modules.
        dtype, device: of the activations.
    """
    modules: dict[str, tuple[int, tuple[int, int]]] = {}
    for layer, own in enumerate(layer_modules):
        for module, shape in own.items():
            modules.setdefault(module, (layer, shape))
    for module, (layer, shape) in modules.items():
        form = Form(8, shape, has_c=True, has_bias=False)
        for entries in (1, 2, _most_entries(form)):
            blocks = [Block(module, range(entries), form, 0)]
            read = [torch.zeros(entries, *shape, dtype=torch.bfloat16) for _, shape in form.tensors]
            storage = allocate(blocks, dtype, device)
            _compile_run(form, read, 1.0, blocks[0].entries(storage), partial(norm_terms, [layer] * entries, module))
            is_finite(storage)


def _most_entries(form: Form) -> int:
    """Most entries of a run, for entries of a form."""
    return max(1, MAX_RUN_ELEMENTS // max(map(math.prod, form.pieces)))


@dataclass(frozen=True)
class Sharing:
    """How one of several ranks compiles its part of an adapter. All ranks compile it at the same time."""

    cut: Cut
    add_up: Callable[[Tensor], Tensor]
    """From this rank's term of an fp32 tensor to the sum over the ranks; raises what ends the load on another rank."""


class _Own(NamedTuple):
    """A rank's part of a module, and how norms become whole where it has a part of each of W's rows."""

    part: Part
    add_up: Callable[[Tensor], Tensor] | None
    has_biases: bool


def _own(sharing: Sharing | None, module: str, shape: tuple[int, int]) -> _Own | None:
    if sharing is None:
        return None
    part = sharing.cut.part(module, shape)
    return _Own(part, sharing.add_up if part.is_summed else None, not part.is_summed or sharing.cut.rank == 0)


def _compile_run(
    form: Form,
    read: Sequence[Tensor],
    scale: float,
    to: Entry,
    norm_terms: Callable[[Tensor], tuple[Tensor, Tensor]],
    own: _Own | None = None,
) -> None:
    """Computes the entries of a run in fp32, and writes them in the activations' dtype.

    Args:
        form: of each entry.
        read: the entries' tensors as `_read` returns them.
        scale: factor of B A x.
        to: where to write, zeros on the device; the entries lie along a first dimension.
        norm_terms: `Base.norm_terms` of the layers that the entries are at, as a function of their A.
        own: this rank's part of them; None is all.
    """
    give_way()
    a, b, *rest = whole_matrices(form, [_on_device(tensor, to.A.device) for tensor in read])
    own_a = a
    if own is not None:
        own_a = a[..., own.part.columns]
        b, *rest = (tensor[:, own.part.rows] for tensor in (b, *rest))
    if to.c is not None:
        give_way()
        squares, products = norm_terms(own_a)
        give_way()
        b *= scale
        # (entries, out, rank); ‖W + s·B·A‖² by row is ‖W‖² + 2·W·(s·B·A)ᵀ + ‖s·B·A‖².
        products = products.mT.mul_(2)
        if own is not None and own.add_up is not None:
            squares = own.add_up(squares.add_(products.mul_(b).sum(2)))
            products = torch.zeros_like(b)
        change = products.add_(b @ (a @ a.mT)).mul_(b)
        c = rest.pop().div_(squares.add_(change.sum(2)).sqrt_())
        give_way()
        to.c.copy_(c)
        to.B.copy_(b * c.unsqueeze(2))
    else:
        to.B.copy_(b.mul_(scale))
    to.A.copy_(own_a)
    if to.bias is not None and (own is None or own.has_biases):
        to.bias.copy_(rest[0].mul_(scale))


def _on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor in fp32 on the device, whose values may be changed."""
    there = tensor.to(device)
    give_way()
    return there.float()


def compile_adapter(
    weights: WeightsFile,
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
    sharing: Sharing | None = None,
    progress: Progress | None = None,
) -> Adapter:
    """Reads a checked file, computes each entry in fp32 and casts it.

    Args:
        weights: the adapter's, in the safetensors format.
        config: the adapter's.
        header, layout: as `checked_header` and `layout_of` gave them for this file.
        stack: the layers that the file's layer numbers count.
        prefix: path of the list of layers, such as "model.layers".
        modules: all linear modules of a layer, in the order of their numbers in entry tables.
        norm_terms: `Base.norm_terms`, for DoRA's norms.
        dtype, device: of the activations.
        sharing: where other ranks compile the rest of it.
        progress: told of entries, as stage "compile".

    Raises:
        FailedPrecondition: a tensor holds NaN or infinity, or its values do in `dtype`.
        DataLoss: the file cannot be read, or is written to meanwhile.
        LorarepError: whatever ends the load on another rank.
    """
    give_way()
    held = layout if sharing is None else sharing.cut.layout(layout)
    paths = {key: path_of(prefix, key) for key in layout}
    done = 0
    with weights.opened() as file:
        starts = _starts(file, header)
        places = {
            key: _place(file_path(prefix, key, form), form, config.scaling(paths[key]), header, starts)
            for key, form in giving_way(layout.items())
        }
        blocks = blocks_of(held, sorted(layout, key=lambda key: places[key].starts))
        storage = allocate(blocks, dtype, device)
        for block in blocks:
            if block.form.rows is not None:
                for position, rows in zip(block.positions, block.pieces(storage)[0], strict=True):
                    _read_rows(file, places[position, block.module], block.form, rows)
                done += len(block.positions)
                continue
            whole = block.entries(storage)
            found = [places[position, block.module] for position in block.positions]
            form = layout[block.positions[0], block.module]
            own = _own(sharing, block.module, form.shape)
            for run in _runs(found, _most_entries(form)):
                part = slice(run.start, run.stop)
                layers = [p if p < 0 else stack[p] for p in block.positions[part]]
                to = Entry._make(None if views is None else views[part] for views in whole)
                give_way()
                read, scale = _read(file, found[part], form), found[run.start].scale
                _compile_run(form, read, scale, to, partial(norm_terms, layers, block.module), own)
                done += len(run)
                if progress is not None:
                    progress("compile", done, len(layout))
    give_way()
    if not is_finite(storage):
        entries = ((block, i) for block in blocks for i in range(len(block.positions)))
        bad = next(
            (block.positions[i], block.module)
            for block, i in entries
            if not all(piece[i].isfinite().all() for piece in block.pieces(storage))
        )
        raise FailedPrecondition(f"holds NaN or infinity, or does in {dtype}", field=f"{FILE_PREFIX}{paths[bad]}")
    give_way()
    return adapter_of(stack, storage, blocks, modules, file_parameters(layout))


def holds_copy(weights: WeightsFile, header: Header, name: str, tensor: Tensor) -> bool:
    """Whether the first rows of a tensor of a file are, in the dtype of one in memory, the same.

    Args:
        tensor: (rows, columns); the header says as many columns.

    Raises:
        DataLoss: the file cannot be read, or is written to meanwhile.
    """
    dtype = DTYPES[header[name].dtype]
    with weights.opened() as file:
        start = _starts(file, header)[name]
        return all(torch.equal(read.to(own), own) for own, read in _by_rows(file, start, dtype, tensor))


def _read_rows(file: int, place: _Place, form: Form, to: Tensor) -> None:
    """Reads rows of a head or an embedding; to: (rows, hidden), where they are written."""
    dtype = place.dtypes[0]
    first = form.rows.start if isinstance(form.rows, range) else 0
    start = place.starts[0] + first * to.shape[1] * dtype.itemsize
    for own, read in _by_rows(file, start, dtype, to):
        own.copy_(read)


def _by_rows(file: int, start: int, dtype: torch.dtype, tensor: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of a tensor (rows, columns), some at a time, and as many of a file.

    Args:
        start: offset of the first byte in the file.
        dtype: of the file's tensor.
    """
    width = tensor.shape[1] * dtype.itemsize
    at_once = max(1, COPY_BYTES // width)
    for first in giving_way(range(0, len(tensor), at_once)):
        own = tensor[first : first + at_once]
        read = torch.empty(own.numel() * dtype.itemsize, dtype=torch.uint8)
        _fill([read.numpy().data], file, start + first * width)
        give_way()
        yield own, read.view(dtype).view_as(own)


def _place(path: str, form: Form, scale: float, header: Header, starts: Mapping[str, int]) -> _Place:
    """Where a file has the entry of the module at a path; starts: offset of each tensor of the file."""
    names = [tensor_name(path, kind) for kind, _ in form.tensors]
    dtypes = tuple(DTYPES[header[name].dtype] for name in names)
    return _Place(scale, dtypes, tuple(starts[name] for name in names))
