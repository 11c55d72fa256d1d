"""The portable GEMM against bitsandbytes' dequantized weights, for every kind of weight."""

from __future__ import annotations

import re

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from lorarep_runtime.kernels.portable import nf4
from lorarep_runtime.kernels.portable.gemm import gemm, gemm_reference
from lorarep_runtime.kernels.portable.launch_config import launch_for
from tests.support.decode_rows import DEVICE

Words = NDArray[np.uint64]
DTYPES = (torch.bfloat16, torch.float16)
BITS = (4, 8, 16)
SHAPES = [(80, 320), (32, 2176)]
"""Of weights: with a rest of outputs and of columns, and with several parts of columns, the last of them shorter."""


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def packed(bits: int, shape: tuple[int, int], dtype: torch.dtype) -> tuple[tuple[Tensor, Tensor | None], Tensor]:
    """A weight as the kernels read it, and as bitsandbytes dequantizes it, in fp32."""
    weight = noise(*shape).to(dtype)
    if bits == 16:
        return (weight, None), weight.float()
    if bits == 8:
        rows, scales, _ = bnb.functional.int8_vectorwise_quant(weight.half())
        return (rows, scales), bnb.functional.int8_vectorwise_dequant(rows, scales)
    codes, state = bnb.functional.quantize_4bit(weight.float(), quant_type="nf4")
    return nf4.arrange(codes, state.absmax, shape), bnb.functional.dequantize_4bit(codes, state)


@pytest.mark.parametrize("shape", SHAPES)
def test_words_are_bitsandbytes_numbers(shape: tuple[int, int]) -> None:
    (words, scales), dense = packed(4, shape, torch.bfloat16)
    assert torch.equal(nf4.dense_reference(words, scales, shape[1]), dense)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [1, 17, 70])
def test_products(bits: int, dtype: torch.dtype, shape: tuple[int, int], rows: int) -> None:
    (weights, scales), dense = packed(bits, shape, dtype)
    x = noise(rows, shape[1], seed=1).to(dtype)
    parts = gemm(bits, weights, scales, x)
    expected = gemm_reference(dense, x)
    # NF4's codes are rounded to the activations' dtype, as a dequantized weight is.
    tolerance = 1e-4 if bits != 4 else {torch.bfloat16: 3e-3, torch.float16: 4e-4}[dtype]
    error = (parts.sum(0) - expected).norm(dim=1) / expected.norm(dim=1)
    assert error.max() < tolerance
    assert len(parts) == launch_for(bits, *shape, rows).parts
    assert (len(parts) > 1) == (shape[1] > 2000)


@pytest.mark.parametrize("dtype", DTYPES)
def test_instructions_look_up_pairs_of_codes(dtype: torch.dtype) -> None:
    """By the meaning of each instruction in the PTX ISA: the interpreter runs none of them."""
    code = bnb.functional.quantize_4bit(torch.ones(64), quant_type="nf4")[1].code
    bits = code.cpu().to(dtype).view(torch.int16).numpy().astype(np.uint16).astype(np.uint64)
    words = np.random.default_rng(0).integers(1 << 16, size=(2, 4096), dtype=np.uint64)
    registers = run_ptx(nf4.lookup_asm(dtype), {"$4": words[0] | words[1] << np.uint64(16)})
    for n in range(4):
        first, second = bits[words >> np.uint64(4 * n) & np.uint64(15)]
        assert (registers[f"${n}"] == first | second << np.uint64(16)).all()


def run_ptx(text: str, registers: dict[str, Words]) -> dict[str, Words]:
    """The registers of 32 bits after some instructions."""
    for name, to, given in re.findall(r"(\w+)\.[bu]32 (\S+), (.*);", text):
        a, b, *more = (registers[n] if n in registers else np.uint64(int(n, 0)) for n in given.split(", "))
        found = np.zeros_like(registers["$4"])
        if name == "prmt":
            for i in range(4):
                place = more[0] >> np.uint64(4 * i) & np.uint64(15)
                assert (place < 8).all(), "the byte's sign would be spread"
                found |= ((b << np.uint64(32) | a) >> np.uint64(8) * place & np.uint64(255)) << np.uint64(8 * i)
        elif name == "lop3":
            # The table has a bit for each value of the bits of a, b and c, of which a's is the highest.
            for i in (i for i in range(8) if int(more[1]) >> i & 1):
                found |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (more[0] if i & 1 else ~more[0])
        else:
            found |= {"shr": np.right_shift, "shl": np.left_shift, "and": np.bitwise_and}[name](a, b)
        registers[to] = found & np.uint64(0xFFFFFFFF)
    return registers
