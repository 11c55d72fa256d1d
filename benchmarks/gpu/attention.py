"""Decode attention alone on one GPU: microseconds for each choice of blocks, and the floor.

    python -m benchmarks.gpu.attention [--rows 32,64,128,256] [--tokens 200,800] [--device cuda]

Heads are Mistral-7B's. Rows have sequences of as many tokens in pages at random places, at more positions than the L2
cache has room for; launches are chained in one CUDA graph. The output of each choice is compared with the first one's.
The floor is what reading keys and values once takes at the bandwidth of a copy. `--device cpu` compares and does not
time, with few rows, in Triton's interpreter.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.testing import assert_close

from benchmarks.gpu.decode import numbers
from benchmarks.gpu.decode_gemm import timed
from benchmarks.gpu.floor import copy_bandwidth
from lorarep_runtime.config import PAGE_TOKENS
from lorarep_runtime.integers import ceil_div
from lorarep_runtime.kernels.attention_config import Attention
from lorarep_runtime.kernels.decode import attention
from lorarep_runtime.kernels.entry_table import DecodeRows
from tests.support.models import MISTRAL_7B

HEADS, KV_HEADS, DIM = (MISTRAL_7B[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim"))
POSITIONS = 6
CHOICES = [*attention.BLOCKS.values(), (16, 1, False), (16, 1, True), (32, 1, True), (64, 4, False)]
"""Tokens of a block, warps, and whether blocks are loaded ahead."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=numbers, default=[32, 64, 128, 256])
    parser.add_argument("--tokens", type=numbers, default=[200, 800])
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    on_gpu = options.device == "cuda"
    bandwidth = copy_bandwidth(options.device) if on_gpu else 1.0
    for rows in options.rows if on_gpu else [2]:
        for tokens in options.tokens if on_gpu else [20]:
            floor = rows * tokens * 2 * KV_HEADS * DIM * 2 / bandwidth
            title = f"{rows} rows of {tokens} tokens"
            print(title + (f", floor {floor * 1e6:.1f} µs" if on_gpu else ""))
            run(rows, tokens, options.device)


def run(rows: int, tokens: int, device: str) -> None:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    pages = ceil_div(tokens, PAGE_TOKENS)
    numbered = torch.randperm(rows * POSITIONS * pages, device=device).to(torch.int32)

    def noise(*size: int) -> Tensor:
        return torch.randn(size, device=device, dtype=dtype)

    keys, values = (noise(len(numbered), PAGE_TOKENS, KV_HEADS, DIM) for _ in range(2))
    cache = attention.Cache(
        keys,
        values,
        numbered.view(rows, POSITIONS, pages),
        torch.arange(rows, device=device, dtype=torch.int32),
        torch.full((rows,), tokens, device=device, dtype=torch.int32),
    )
    given = noise(rows, (HEADS + 2 * KV_HEADS) * DIM), noise(rows, DIM), noise(rows, DIM), cache
    first = None
    for choice in CHOICES:
        attention.BLOCKS = {0: choice}
        launches, out = launches_over(given, rows, device)
        launches[0]()
        first = out.clone() if first is None else first
        assert_close(out, first, rtol=2e-2, atol=2e-2)
        took = f"{timed(launches) * 1e6:8.1f} µs" if device == "cuda" else "as the first"
        print(f"  {choice}: {took}", flush=True)


def launches_over(
    given: tuple[Tensor, Tensor, Tensor, attention.Cache], rows: int, device: str
) -> tuple[Sequence[Callable[[], None]], Tensor]:
    """A launch for each position, and what all of them write."""
    layer = Attention(HEADS, KV_HEADS, DIM, DIM**-0.5)
    out = torch.empty(rows, HEADS * DIM, device=device, dtype=given[0].dtype)
    shrunk = torch.zeros(rows, KV_HEADS, 1, 8, device=device)
    none = torch.zeros(rows, device=device, dtype=torch.int64)
    at = (DecodeRows(torch.full((rows,), p, device=device, dtype=torch.int32), none, 7) for p in range(POSITIONS))
    pdl = device == "cuda"
    return [partial(attention.attend_whole, layer, *given, out, shrunk, one, 3, pdl=pdl) for one in at], out


if __name__ == "__main__":
    main()
