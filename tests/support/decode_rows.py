"""Rows of different adapters, ranks and positions, for kernels and for their references."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.testing import assert_close

from lorarep_runtime.kernels.entry_table import DecodeRows, Entries, Entry, ReferenceRows, entry_table, shrink_reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PDL = DEVICE.type == "cuda" and torch.cuda.get_device_capability() >= (9, 0)
DEPTH = 3
POSITIONS = (1, -1, 0, 2, 2, 0)
CAPACITY = 64
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
DTYPES = tuple(TOLERANCE)
MULTIPLIED = [dtype for dtype in DTYPES if DEVICE.type == "cuda" or dtype != torch.bfloat16]
"""Triton's interpreter takes the bits of bf16 for integers in a product."""


def randn(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape) * scale).to(dtype).to(DEVICE)


def nan(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """An output that shows what was not written."""
    return torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)


def random_adapter(
    ranks: Sequence[int], modules: dict[str, tuple[int, int]], dtype: torch.dtype, *, missing: set[tuple[int, str]]
) -> Entries:
    """Entries of an adapter; every other one has a c, every third a bias.

    Args:
        ranks: taken in turn by modules and positions.
        modules: (out, in) of each.
        missing: positions and modules without an entry.
    """
    entries = {}
    for position in range(DEPTH):
        for number, (module, (out, into)) in enumerate(modules.items()):
            if (position, module) in missing:
                continue
            turn = position + number
            rank = ranks[turn % len(ranks)]
            entries[position, module] = Entry(
                randn(rank, into, dtype=dtype, scale=into**-0.5),
                randn(rank, out, dtype=dtype, scale=rank**-0.5).T,
                (1 + randn(out, scale=0.3)).to(dtype) if turn % 2 else None,
                randn(out, dtype=dtype) if turn % 3 == 0 else None,
            )
    return entries


def one_by_one(entries: Entries) -> Iterator[tuple[str, Sequence[int], Entry]]:
    """As `entry_table` takes them."""
    for (position, module), (a, b, c, bias) in entries.items():
        yield (
            module,
            [position],
            Entry(a[None], b[None], None if c is None else c[None], None if bias is None else bias[None]),
        )


class Batch:
    """Six rows: adapters of ranks 8, of mixed ranks, shared by two rows, and none; one row passes through."""

    def __init__(self, modules: dict[str, tuple[int, int]], dtype: torch.dtype) -> None:
        names = list(modules)
        self._adapters = [
            random_adapter((8,), modules, dtype, missing=set()),
            random_adapter((13, 1, 64), modules, dtype, missing={(0, name) for name in names[2:3]}),
            random_adapter((64, 1, 13), modules, dtype, missing={(2, names[0])}),
        ]
        self._tables = [entry_table(one_by_one(a), DEPTH, names).to(DEVICE) for a in self._adapters]
        number = [0, 0, 1, 2, 2, None]
        self.rows = DecodeRows(
            torch.tensor(POSITIONS, dtype=torch.int32, device=DEVICE),
            torch.tensor([0 if i is None else self._tables[i].data_ptr() for i in number], device=DEVICE),
            len(names),
        )
        self.plain = ReferenceRows(POSITIONS, [None if i is None else self._adapters[i] for i in number], names)

    def __len__(self) -> int:
        return len(POSITIONS)


def assert_shrunk(shrunk: Tensor, x: Tensor, batch: Batch, first: int) -> None:
    """That a kernel's shrunk is A x of its own x, to fp32, and that nothing else of it was written."""
    expected = nan(*shrunk.shape)
    shrink_reference(x, expected, batch.plain, first)
    assert_close(shrunk, expected, rtol=2e-5, atol=2e-5, equal_nan=True)
