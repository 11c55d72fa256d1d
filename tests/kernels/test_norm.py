"""Norms of rows, and shrunk of the modules that read them."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lorarep_runtime.kernels.decode.norm import norm_shrink, norm_shrink_reference
from tests.support.decode_rows import (
    CAPACITY,
    DEVICE,
    DTYPES,
    PDL,
    POSITIONS,
    TOLERANCE,
    Batch,
    assert_shrunk,
    nan,
    randn,
)

EPS = 1e-5


def norm(
    batch: Batch, width: int, dtype: torch.dtype, *, parts: int, first: int, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs kernel and reference, compares them, and returns h, weight and x."""
    h, weight = randn(len(batch), width, dtype=dtype, scale=3), randn(width, dtype=dtype)
    x, shrunk = nan(len(batch), width, dtype=dtype), nan(len(batch), parts, count, CAPACITY)
    x_reference, low_reference = x.clone(), shrunk.clone()
    norm_shrink(h, weight, EPS, x, shrunk, batch.rows, first, pdl=PDL)
    norm_shrink_reference(h, weight, EPS, x_reference, low_reference, batch.plain, first)
    assert_close(x, x_reference, rtol=TOLERANCE[dtype], atol=0, equal_nan=True)
    assert_shrunk(shrunk, x, batch, first)
    return h, weight, x


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("width", "parts", "first", "count"),
    [(256, 2, 1, 3), (200, 2, 0, 2), (72, 3, 3, 1)],  # the last has a part without columns
)
def test_a_group_of_modules(dtype: torch.dtype, width: int, parts: int, first: int, count: int) -> None:
    torch.manual_seed(0)
    batch = Batch(dict.fromkeys(("o", "q", "k", "v"), (8, width)), dtype)
    norm(batch, width, dtype, parts=parts, first=first, count=count)


@pytest.mark.parametrize("dtype", DTYPES)
def test_as_transformers_norms(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    batch = Batch({"q": (8, 96)}, dtype)
    h, weight, x = norm(batch, 96, dtype, parts=1, first=0, count=1)
    theirs = LlamaRMSNorm(96, eps=EPS).to(dtype).to(DEVICE)
    theirs.weight.data = weight
    walking = [row for row, position in enumerate(POSITIONS) if position >= 0]
    assert_close(x[walking], theirs(h[walking]), rtol=TOLERANCE[dtype], atol=0)
