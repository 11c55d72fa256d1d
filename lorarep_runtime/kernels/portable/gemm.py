"""The portable GEMM: up to 256 rows times a weight that all of them share, on tensor cores by Triton's `tl.dot`.

A number of a weight takes 4 (NF4), 8 (int8) or 16 bits. A tile of the result is (outputs, rows): tensor cores pad rows
to 8 or 16 and outputs not at all, and the weight goes from global memory to their registers by way of shared memory
alone. NF4's codes are multiplied as numbers of x's dtype; each 64 columns' sum is scaled in fp32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorarep_runtime.kernels.decode.shrink import await_previous
from lorarep_runtime.kernels.launch import DirectLaunch
from lorarep_runtime.kernels.portable import nf4
from lorarep_runtime.kernels.portable.launch_config import STEP, launch_for

CODES: tl.constexpr = tl.constexpr(nf4.CODES)
ASM_BF16: tl.constexpr = tl.constexpr(nf4.lookup_asm(torch.bfloat16))
ASM_FP16: tl.constexpr = tl.constexpr(nf4.lookup_asm(torch.float16))
REGISTERS: tl.constexpr = tl.constexpr(",".join(["=r"] * 4 + ["r"]))
INTERPRETED: tl.constexpr = tl.constexpr(triton.knobs.runtime.interpret)
"""Whether Triton's interpreter runs the kernels: it has no PTX, and takes bf16 for integers in products."""


def gemm(
    bits: int, weights: Tensor, scales: Tensor | None, x: Tensor, *, y: Tensor | None = None, pdl: bool = False
) -> Tensor:
    """W x as terms, fp32 (terms, rows, outputs), which are sums over parts of the columns, to be added up in order.

    Args:
        bits: of a number of the weight.
        weights: 4 bits: int16 (tiles, chunks, 16, 32), of `nf4.arrange`; 8: int8 (outputs, in); 16: (outputs, in) of
            x's dtype.
        scales: 4 bits: fp32 (tiles, 2 · chunks, 16); 8: fp32 (outputs), each the value of 127; 16: None.
        x: bf16 or fp16 (rows, in), at most `MOST_ROWS` rows, at any distance.
        y: (rows, outputs), contiguous, of any dtype. Where there is but one term it is written there, and y returned.
        pdl: begin while the previous kernel ends (programmatic dependent launch).
    """
    rows, columns = x.shape
    outputs = weights.shape[0] * (nf4.TILE if bits == 4 else 1)
    launch = launch_for(bits, outputs, columns, rows)
    config, even = launch.config, columns % STEP[bits] == 0
    if y is None or launch.parts > 1:
        to = torch.empty(launch.parts, rows, outputs, dtype=torch.float32, device=x.device)
    else:
        to = y.unsqueeze(0)
    (_launch_nf4 if bits == 4 else _launch_plain)(
        (launch.row_tiles, launch.output_tiles, launch.parts),
        (x.dtype, weights.dtype, to.dtype, config, even, pdl, x.stride(0) % 16 == 0),
        *(weights, scales, x, to, rows, outputs, columns, x.stride(0), launch.steps),
        *(config.outputs, config.rows, STEP[bits], config.stages, even, pdl),
        num_warps=config.warps,
        launch_pdl=pdl,
    )
    return to


def gemm_reference(weight: Tensor, x: Tensor) -> Tensor:
    """W x in torch, fp32 (rows, outputs), from a dense weight (outputs, in)."""
    return x.float() @ weight.float().T


@triton.jit
def _product(w, x, sums):
    """The sums plus w x, for w of x's dtype or int8, which both dtypes hold exactly."""
    if INTERPRETED:
        return tl.dot(w.to(tl.float32), x.to(tl.float32), sums)
    else:
        return tl.dot(w.to(x.dtype), x, sums)


@triton.jit
def _look_up(word, nibble: tl.constexpr, dtype: tl.constexpr):
    """The numbers of one nibble of each word, as the interpreter computes them."""
    code = (word >> 4 * nibble) & 15
    number = tl.zeros(word.shape, tl.float32)
    for i in tl.static_range(16):
        number = tl.where(code == i, CODES[i], number)
    return number.to(dtype)


@triton.jit
def _numbers(word, dtype: tl.constexpr):
    """The numbers of the four nibbles of each word."""
    if INTERPRETED:
        return (
            _look_up(word, 0, dtype),
            _look_up(word, 1, dtype),
            _look_up(word, 2, dtype),
            _look_up(word, 3, dtype),
        )
    elif dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(ASM_BF16, REGISTERS, [word], (tl.bfloat16,) * 4, is_pure=True, pack=2)
    else:
        return tl.inline_asm_elementwise(ASM_FP16, REGISTERS, [word], (tl.float16,) * 4, is_pure=True, pack=2)


@triton.jit
def _store(y, sums, o, r, rows, outputs):
    to = y + (tl.program_id(2) * rows + r)[None, :].to(tl.int64) * outputs + o[:, None]
    tl.store(to, sums.to(y.dtype.element_ty), mask=(o < outputs)[:, None] & (r < rows)[None, :])


@triton.jit(do_not_specialize=["rows", "steps"])
def _nf4(
    words,
    scales,
    x,
    y,
    rows,
    outputs,
    columns,
    stride,
    steps,
    OUTPUTS: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    STAGES: tl.constexpr,
    EVEN: tl.constexpr,
    PDL: tl.constexpr,
):
    await_previous(PDL)
    chunks = tl.cdiv(columns, STEP)
    begin = tl.program_id(2) * steps
    end = tl.minimum(begin + steps, chunks)
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    o = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    k = tl.arange(0, 32)
    there, inside = (o < outputs)[:, None], (r < rows)[None, :]
    tile, own = (o // 16).to(tl.int64), o % 16
    words += (tile * (chunks * 512) + own * 32)[:, None] + k[None, :]
    scales += tile * (chunks * 32) + own
    x += (r * stride)[None, :] + k[:, None]
    sums = tl.zeros((OUTPUTS, ROWS), tl.float32)
    none = tl.zeros((OUTPUTS, ROWS), tl.float32)
    for chunk in tl.range(begin, end, num_stages=STAGES):
        numbers = _numbers(tl.load(words + chunk * 512, mask=there, other=0), x.dtype.element_ty)
        for block in tl.static_range(2):
            scale = tl.load(scales + (chunk * 32 + block * 16), mask=o < outputs, other=0)
            first = chunk * STEP + block * 64
            known = inside if EVEN else (r < tl.where(first < columns, rows, 0))[None, :]
            block_sums = _product(numbers[2 * block], tl.load(x + first, mask=known, other=0), none)
            block_sums = _product(numbers[2 * block + 1], tl.load(x + first + 32, mask=known, other=0), block_sums)
            sums += block_sums * scale[:, None]
    _store(y, sums, o, r, rows, outputs)


@triton.jit(do_not_specialize=["rows", "steps"])
def _plain(
    weights,
    scales,
    x,
    y,
    rows,
    outputs,
    columns,
    stride,
    steps,
    OUTPUTS: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    STAGES: tl.constexpr,
    EVEN: tl.constexpr,
    PDL: tl.constexpr,
):
    await_previous(PDL)
    begin = tl.program_id(2) * steps
    end = tl.minimum(begin + steps, tl.cdiv(columns, STEP))
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    o = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    k = tl.arange(0, STEP)
    there, inside = (o < outputs)[:, None], (r < rows)[None, :]
    weights += o.to(tl.int64)[:, None] * columns + k[None, :]
    x += (r * stride)[None, :] + k[:, None]
    sums = tl.zeros((OUTPUTS, ROWS), tl.float32)
    for step in tl.range(begin, end, num_stages=STAGES):
        first = step * STEP
        left = columns - first
        w = tl.load(weights + first, mask=there if EVEN else there & (k[None, :] < left), other=0)
        x_block = tl.load(x + first, mask=inside if EVEN else inside & (k[:, None] < left), other=0)
        sums = _product(w, x_block, sums)
    if scales is not None:
        scale = tl.load(scales + o, mask=o < outputs, other=0) * (1 / 127)
        sums *= scale[:, None]
    _store(y, sums, o, r, rows, outputs)


_launch_nf4, _launch_plain = DirectLaunch(_nf4), DirectLaunch(_plain)
