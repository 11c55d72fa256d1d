"""Packed weights for the portable kernels: bitsandbytes' values to the bit, and their products with adapters."""

from __future__ import annotations

from collections.abc import Sequence

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from lorarep_runtime.config import Quantization
from lorarep_runtime.kernels.entry_table import shrink_reference
from lorarep_runtime.kernels.hopper.decode_gemm import decode_gemm_reference
from lorarep_runtime.kernels.portable import packed_weight
from lorarep_runtime.kernels.portable.packed_weight import PortableWeight
from lorarep_runtime.model.packed import PackedPart, norm_products, pack_portable, row_squares
from lorarep_runtime.model.weights import DenseWeight, Int8Weight, NF4Weight, Weight
from tests.support.decode_rows import CAPACITY, DEVICE, POSITIONS, Batch, nan, randn

SIZES = (64, 32, 16)
KINDS = ("nf4", "nf4 twice", "int8", "none")
DTYPES = (torch.bfloat16, torch.float16)


def weights_of(kind: str, sizes: Sequence[int], into: int, dtype: torch.dtype) -> list[Weight]:
    dense = [randn(size, into, dtype=dtype) for size in sizes]
    if kind == "none":
        return [DenseWeight(w) for w in dense]
    if kind == "int8":
        return [Int8Weight(*bnb.functional.int8_vectorwise_quant(w.half())[:2]) for w in dense]
    twice = kind.endswith("twice")
    return [NF4Weight(*bnb.functional.quantize_4bit(w, quant_type="nf4", compress_statistics=twice)) for w in dense]


def packed(kind: str, into: int, dtype: torch.dtype) -> tuple[PortableWeight, Tensor]:
    """A packed weight, and its parts as bitsandbytes dequantizes them."""
    torch.manual_seed(0)
    weights = weights_of(kind, SIZES, into, dtype)
    return pack_portable(weights), torch.cat([weight.dequantize(dtype) for weight in weights])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("into", [64, 384])
def test_dequantized_to_the_bit(kind: str, dtype: torch.dtype, into: int) -> None:
    own, dense = packed(kind, into, dtype)
    if dtype == torch.float16 or DEVICE.type == "cuda" or "nf4" not in kind:
        assert torch.equal(own.dense(dtype), dense)
        assert torch.equal(own.module(1).dense(dtype), dense[64:96])
    else:  # the interpreter rounds to bf16 towards zero
        assert torch.equal(own.dense(torch.float32).bfloat16(), dense)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("add", [False, True])
def test_rows_with_their_adapters(kind: str, dtype: torch.dtype, add: bool) -> None:
    own, dense = packed(kind, 320, dtype)
    batch = Batch({name: (size, 320) for name, size in zip("qkv", SIZES, strict=True)}, dtype)
    x, bias = randn(6, 320, dtype=dtype), randn(sum(SIZES), dtype=dtype)
    y = randn(6, sum(SIZES), dtype=dtype)
    shrunk, before, expected = nan(6, 2, 3, CAPACITY), y.clone(), y.clone()
    shrink_reference(x, shrunk, batch.plain, 0)
    own.decode(x, y, shrunk, batch.rows, 0, bias=bias, add=add)
    decode_gemm_reference(dense, x, expected, shrunk, batch.plain, 0, SIZES, bias=bias, add=add)
    error = (y.float() - expected.float()).norm(dim=1) / expected.float().norm(dim=1)
    assert error.max() < {torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    passed = POSITIONS.index(-1)
    assert torch.equal(y[passed], before[passed])


@pytest.mark.parametrize("kind", KINDS)
def test_many_rows_take_a_weight_block_by_block(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own, dense = packed(kind, 320, torch.float16)
    x, y = randn(40, 320, dtype=torch.float16), nan(40, sum(SIZES), dtype=torch.float16)
    expected = x.float() @ dense.float().T
    own.matmul(x, y)
    assert_close(y.float(), expected, rtol=2e-3, atol=5e-2)
    monkeypatch.setattr(packed_weight, "MOST_ROWS", 17)
    monkeypatch.setattr(packed_weight, "DENSE_BYTES", 320 * 2 * 48)
    y.fill_(torch.nan)
    own.matmul(x, y)
    assert_close(y.float(), expected, rtol=2e-3, atol=5e-2)


@pytest.mark.parametrize("kind", ["nf4", "int8", "none"])
def test_norms_of_what_adapters_make_of_weights(kind: Quantization, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_weight, "DENSE_BYTES", 320 * 2 * 48)
    torch.manual_seed(0)
    weights = weights_of(kind, (64, 64, 16), 320, torch.float16)
    group = pack_portable(weights)
    q, k = (PackedPart(group, i, kind) for i in range(2))
    a = randn(3, 8, 320)
    dense = torch.stack([weights[i].dequantize(torch.float32) for i in (0, 1, 0)])
    squares = torch.stack([row_squares(weight, torch.float16) for weight in (q, k, q)])
    assert_close(squares, dense.square().sum(2), rtol=1e-3, atol=0)  # bitsandbytes rounds to fp16 first
    expected = a @ dense.mT
    found = norm_products([q, k, q], a, torch.float16)
    assert (found - expected).norm() < 3e-3 * expected.norm()
