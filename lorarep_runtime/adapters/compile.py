"""An adapter's file, compiled into the one form that kernels know:

    y = c ⊙ (W x) + B (A x) + b

LoRA (Hu et al., 2021) has no c; DoRA (Liu et al., 2024) has c = m / ‖W + s·B·A‖ by row, taken once, here.

A module's entries at many positions are mostly alike and at equal distances in the file. So each such run is read,
computed and written as one tensor: loads go on beside streams, which wait for the interpreter.
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
    Key,
    Layout,
    adapter_of,
    allocate,
    blocks_of,
    entries_of,
    file_parameters,
)
from lorarep_runtime.model.stack import Stack
from lorarep_runtime.progress import Progress

MOST_ELEMENTS = 5 << 17
"""Of a tensor of a run, so that computing with it takes little memory."""


class _Place(NamedTuple):
    """Where a file has an entry's tensors, each as `Form.tensors` lists them."""

    scale: float
    dtypes: tuple[torch.dtype, ...]
    starts: tuple[int, ...]
    """Bytes."""


def _runs(places: Sequence[_Place], most: int) -> Iterator[range]:
    """Parts of a block that are alike and at equal distances in the file, of so many entries at most."""
    steps = [tuple(map(sub, b.starts, a.starts)) for a, b in pairwise(places)]
    begin = 0
    for end, step in enumerate(steps, 1):
        alike = places[end][:2] == places[begin][:2] and step == steps[begin] and min(step) > 0
        if not alike or end - begin == most:
            yield range(begin, end)
            begin = end
    yield range(begin, len(places))


def _read(data: Tensor, places: Sequence[_Place], kind: int, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """fp32 (entries, *shape), one kind of a run's tensors. data: the file's bytes."""
    dtype, start = places[0].dtypes[kind], places[0].starts[kind]
    size = math.prod(shape) * dtype.itemsize
    step = places[1].starts[kind] - start if len(places) > 1 else size
    there = torch.empty(len(places), size, dtype=torch.uint8, device=device)
    there.copy_(data.as_strided(there.shape, (step, 1), start))
    give_way()
    return there.view(dtype).view(-1, *shape).float()


def _mapped(file: Path, header: Header) -> tuple[Tensor, Mapping[str, int]]:
    """The bytes of a checked file, and where each tensor begins."""
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
    """Has the kernels that compile adapters loaded, for which the device stands still: before others stream.

    A library's are those for a rank of 8, of runs of one entry, of two that share a layer and of the most; others may
    take others.

    Args:
        shapes: (out, in) of each linear module of a layer.
        dtype: of the activations.
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
            _is_finite(storage)


def _most_entries(form: Form) -> int:
    """Of a run."""
    return max(1, MOST_ELEMENTS // max(math.prod(shape) for _, shape in form.tensors))


def _is_finite(storage: Tensor) -> bool:
    return all(extreme.isfinite() for extreme in storage.aminmax())  # NaN is both


def _compile_run(
    data: Tensor,
    places: Sequence[_Place],
    form: Form,
    to: Entry,
    norm_terms: Callable[[Tensor], tuple[Tensor, Tensor]],
) -> None:
    """Reads the entries of a run, computes them in fp32 and writes them, cast.

    Args:
        data: the file's bytes.
        to: all of them, along a first dimension.
        norm_terms: of the layers that they are at, from their A.
    """
    give_way()
    a, b, *rest = (_read(data, places, i, shape, to.A.device) for i, (_, shape) in enumerate(form.tensors))
    scale = places[0].scale
    if to.c is not None:
        give_way()
        squares, products = norm_terms(a)
        give_way()
        b *= scale
        # (n, out, ranks), by rows of B: dora.py
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
    spec: AdapterConfig,
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
    """Reads a checked file and computes each entry in fp32, then casts it.

    Args:
        header, layout: as `read_header` and `check` gave them for this file.
        prefix: as for `check`.
        modules: all linear modules of a layer, in the order of their numbers in entry tables.
        norm_terms: for DoRA's norms.
        dtype, device: of the activations.
        progress: told of entries, as stage "compile".

    Raises:
        FailedPrecondition: a tensor holds NaN or infinity, or does in `dtype`.
        DataLoss: the file cannot be read.
    """
    give_way()
    data, starts = _mapped(file, header)

    def path(key: Key) -> str:
        return f"{prefix}.{key[0]}.{key[1]}"

    def place(key: Key) -> _Place:
        names = [tensor_name(path(key), kind) for kind, _ in layout[key].tensors]
        dtypes = tuple(DTYPES[header[name].dtype] for name in names)
        return _Place(spec.scaling(path(key)), dtypes, tuple(starts[name] for name in names))

    places = {key: place(key) for key in giving_way(layout)}
    blocks = blocks_of(layout, sorted(layout, key=lambda key: places[key].starts))
    storage = allocate(blocks, dtype, device)
    done = 0

    def tell(entries: int) -> None:
        nonlocal done
        done += entries
        if progress is not None:
            progress("compile", done, len(layout))

    for block in blocks:
        whole = block.entries(storage)
        found = [places[position, block.module] for position in block.positions]
        for run in _runs(found, _most_entries(block.form)):
            here = slice(run.start, run.stop)
            layers = [stack[position] for position in block.positions[here]]
            to = Entry._make(None if views is None else views[here] for views in whole)
            _compile_run(data, found[here], block.form, to, partial(norm_terms, layers, block.module))
            tell(len(run))
    give_way()
    if not _is_finite(storage):
        entries = entries_of(storage, blocks)
        bad = next(key for key in layout if not all(t.isfinite().all() for t in entries[key] if t is not None))
        raise FailedPrecondition(f"holds NaN or infinity, or does in {dtype}", field=f"{FILE_PREFIX}{path(bad)}")
    give_way()
    return adapter_of(stack, storage, blocks, modules, file_parameters(layout))
