"""The adapters' part of a group of modules: shrunk from a kernel, outputs side by side."""

import pytest
import torch
from torch.testing import assert_close

from lorarep_runtime.kernels.decode.expand import expand, expand_reference
from lorarep_runtime.kernels.entry_table import shrink_reference
from tests.support.decode_rows import CAPACITY, DTYPES, PDL, POSITIONS, TOLERANCE, Batch, nan, randn

SIZES = (600, 80, 24)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("count", [0, 3])
def test_a_group_of_modules(dtype: torch.dtype, biased: bool, added: bool, count: int) -> None:
    torch.manual_seed(0)
    modules = {"o": (8, 8), **{name: (size, 96) for name, size in zip("qkv", SIZES, strict=True)}}
    batch = Batch(modules, dtype)
    x, y = randn(6, 96, dtype=dtype), randn(6, sum(SIZES), dtype=dtype)
    shrunk = nan(6, 3, 3, CAPACITY)
    shrink_reference(x, shrunk, batch.plain, 1)
    bias = randn(sum(SIZES), dtype=dtype) if biased else None
    residual = randn(*y.shape, dtype=dtype) if added else None
    y_reference, residual_reference = y.clone(), residual.clone() if residual is not None else None
    terms = randn(count, *y.shape) if count else None
    before = (y if residual is None else residual).clone()

    expand(y, shrunk, SIZES, batch.rows, 1, bias=bias, residual=residual, terms=terms, pdl=PDL)
    expand_reference(y_reference, shrunk, SIZES, batch.plain, 1, bias=bias, residual=residual_reference, terms=terms)
    tolerance = dict(rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert_close(y, y_reference, **tolerance)
    if residual is not None:
        assert_close(residual, residual_reference, **tolerance)
    passed = POSITIONS.index(-1)
    assert_close((y if residual is None else residual)[passed], before[passed], rtol=0, atol=0)


def test_as_a_merged_weight_computes() -> None:
    """Against the product with the weight that the adapter would leave: c ⊙ W + B A."""
    torch.manual_seed(0)
    batch = Batch({"down": (40, 96)}, torch.float32)
    weight, bias, x, residual = randn(40, 96), randn(40), randn(6, 96), randn(6, 40)
    shrunk = nan(6, 2, 1, CAPACITY)
    shrink_reference(x, shrunk, batch.plain, 0)
    expected = residual.clone()
    for row, _ in batch.plain.active():
        entry = batch.plain.entry(row, 0)
        merged, own = weight, bias
        if entry is not None:
            merged = (weight if entry.c is None else entry.c[:, None] * weight) + entry.B @ entry.A
            own = bias if entry.bias is None else bias + entry.bias
        expected[row] += torch.nn.functional.linear(x[row], merged, own)
    expand(x @ weight.T, shrunk, [40], batch.rows, 0, bias=bias, residual=residual, pdl=PDL)
    assert_close(residual, expected, rtol=2e-5, atol=5e-5)
