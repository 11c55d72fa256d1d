"""Gated activations of rows, and shrunk of the module that reads them."""

import pytest
import torch
from torch.testing import assert_close
from transformers.activations import ACT2FN

from lorarep_runtime.kernels.decode.activation import gate_rows, gate_shrink, gate_shrink_reference
from tests.support.decode_rows import CAPACITY, DTYPES, PDL, POSITIONS, TOLERANCE, Batch, assert_shrunk, nan, randn


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "parts"), [(320, 2), (88, 1)])
def test_gate(dtype: torch.dtype, width: int, parts: int) -> None:
    torch.manual_seed(0)
    batch = Batch({"up": (8, 16), "down": (16, width)}, dtype)
    gate_up = randn(len(batch), 2 * width, dtype=dtype, scale=2)
    x, shrunk = nan(len(batch), width, dtype=dtype), nan(len(batch), parts, 1, CAPACITY)
    x_reference, low_reference = x.clone(), shrunk.clone()
    gate_shrink(gate_up, x, shrunk, batch.rows, 1, pdl=PDL)
    gate_shrink_reference(gate_up, x_reference, low_reference, batch.plain, 1)
    tolerance = TOLERANCE[dtype]
    assert_close(x, x_reference, rtol=tolerance, atol=tolerance / 10, equal_nan=True)
    assert_shrunk(shrunk, x, batch, 1)

    walking = [row for row, position in enumerate(POSITIONS) if position >= 0]
    gate, up = gate_up[walking].chunk(2, dim=1)
    theirs = ACT2FN["silu"](gate) * up
    assert_close(x[walking], theirs, rtol=tolerance, atol=tolerance / 10)
    up_before = up.clone()
    assert torch.equal(gate_rows(gate_up)[walking], x[walking])
    assert torch.equal(gate_up[walking, width:], up_before)
