"""The adapters' part of a group of modules for many rows, side by side with those of the same adapter."""

import pytest
import torch
from torch.testing import assert_close

from lorarep_runtime.kernels.decode.expand import expand_reference
from lorarep_runtime.kernels.entry_table import ReferenceRows, entry_table, shrink_reference
from lorarep_runtime.kernels.prefill.adapt_segments import SegmentTiles, adapt_segments
from tests.support.decode_rows import DEPTH, DEVICE, MULTIPLIED, TOLERANCE, nan, one_by_one, randn, random_adapter

SIZES = (704, 80, 24)  # the first takes two programs
BOUNDS = [(3, 67), (67, 70), (70, 134), (140, 150)]
"""Of tiles; rows between them have no adapter."""
ADAPTERS = [0, 0, 1, 2]
POSITIONS = [1, 1, 0, 2]
ROWS = 160


@pytest.mark.parametrize("dtype", MULTIPLIED)
@pytest.mark.parametrize(("modules", "width"), [(3, 136), (1, 520), (2, 64)])
@pytest.mark.parametrize(("first_row", "end_row"), [(0, ROWS), (50, 144)])
def test_a_group_of_modules(dtype: torch.dtype, modules: int, width: int, first_row: int, end_row: int) -> None:
    torch.manual_seed(0)
    names = ["other", *"qkv"[:modules]]
    sizes = dict(zip(names, (8, *SIZES), strict=False))
    shapes = {name: (size, width) for name, size in sizes.items()}
    adapters = [
        random_adapter((8,), shapes, dtype, missing=set()),
        random_adapter((13, 1, 64), shapes, dtype, missing={(0, "q")}),
        random_adapter((5, 40), shapes, dtype, missing={(2, "v")}),
    ]
    tables = [entry_table(one_by_one(adapter), DEPTH, names).to(DEVICE) for adapter in adapters]
    own = [next((i for i, (start, stop) in enumerate(BOUNDS) if start <= row < stop), None) for row in range(ROWS)]
    plain = ReferenceRows(
        [0 if i is None else POSITIONS[i] for i in own],
        [None if i is None else adapters[ADAPTERS[i]] for i in own],
        names,
    )
    wide, y = randn(ROWS, 2 * width, dtype=dtype), randn(ROWS, sum(SIZES[:modules]), dtype=dtype)
    x = wide[:, width:]
    expected, shrunk = y.clone(), nan(ROWS, 1, modules, 64)
    shrink_reference(x, shrunk, plain, 1)
    expand_reference(expected, shrunk.to(dtype).float(), SIZES[:modules], plain, 1)
    before = y.clone()
    assert (expected[3:134] - before[3:134]).float().norm() > 0.3 * before[3:134].float().norm()

    tiles = SegmentTiles(
        torch.tensor(BOUNDS, dtype=torch.int32, device=DEVICE),
        torch.tensor([tables[i].data_ptr() for i in ADAPTERS], device=DEVICE),
        torch.tensor(POSITIONS, dtype=torch.int32, device=DEVICE),
        ranks=64,
        modules=len(names),
    )
    rows = slice(first_row, end_row)
    adapt_segments(x[rows], y[rows], SIZES[:modules], tiles, 1, first_row)
    assert_close(y[rows], expected[rows], rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    untouched = [row for row in range(ROWS) if own[row] is None or not first_row <= row < end_row]
    assert torch.equal(y[untouched], before[untouched])
