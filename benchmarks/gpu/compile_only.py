"""Compiles all Triton kernels for GPUs that are not here, and compares what they take with what each GPU has.

    python -m benchmarks.gpu.compile_only [--capabilities 80,86,89,90,100,120] [--dtypes bfloat16,float16]
                                          [--rows 1,64,128] [--only portable]

needs no GPU: ptxas comes with Triton. The kernels are launched by lorarep's own functions, with tensors without memory,
in the shapes of Mistral-7B; Triton compiles them and launches nothing. Printed are registers and bytes of stack, where
they are spilled, of a thread, and bytes of shared memory of a CTA. The command fails where a kernel takes more shared
memory or registers than a CTA may have.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from lorarep_runtime.gpu.buffers import parts_for
from lorarep_runtime.kernels.attention_config import Attention
from lorarep_runtime.kernels.decode.activation import gate_rows, gate_shrink
from lorarep_runtime.kernels.decode.attention import Cache, attend, attend_whole
from lorarep_runtime.kernels.decode.combine import Partials, combine_shrink
from lorarep_runtime.kernels.decode.expand import expand
from lorarep_runtime.kernels.decode.norm import norm_shrink
from lorarep_runtime.kernels.decode.store import store
from lorarep_runtime.kernels.entry_table import DecodeRows
from lorarep_runtime.kernels.launch import DirectLaunch
from lorarep_runtime.kernels.portable import nf4
from lorarep_runtime.kernels.portable.dequantize import dequantize_nf4
from lorarep_runtime.kernels.portable.gemm import gemm
from lorarep_runtime.kernels.portable.launch_config import LAUNCH_CONFIGS
from lorarep_runtime.kernels.prefill.adapt_segments import SegmentTiles, adapt_segments
from lorarep_runtime.kernels.prefill.rotate_store import rotate_store
from tests.support.models import MISTRAL_7B

SHARED_BYTES = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
"""Most bytes of shared memory of a CTA, by compute capability (CUDA C++ Programming Guide)."""
REGISTERS = 64 << 10
"""Registers of a multiprocessor, and of the largest CTA, of all of them."""
HIDDEN, INNER = MISTRAL_7B["hidden_size"], MISTRAL_7B["intermediate_size"]
HEADS, KV_HEADS, DIM = 32, 8, 128
QKV = (HEADS * DIM, KV_HEADS * DIM, KV_HEADS * DIM)
MODULES, RANKS, PAGES, SPLITS = 7, 8, 64, 16


class Taken(NamedTuple):
    """Registers and bytes of stack of a thread, where they are spilled; threads and bytes of shared memory of a CTA."""

    name: str
    registers: int
    stack: int
    threads: int
    shared: int


def fits(taken: Taken, capability: int) -> bool:
    """Whether a CTA of a kernel may be launched on GPUs of a compute capability."""
    return taken.shared <= SHARED_BYTES[capability] and taken.registers * taken.threads <= REGISTERS


class Target:
    """Stands for Triton's driver of a GPU that is not here. Its device number is its compute capability."""

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_current_device(self) -> int:
        return self._capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._capability, 32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capabilities", type=_numbers, default=[*SHARED_BYTES])
    parser.add_argument("--dtypes", type=lambda text: text.split(","), default=["bfloat16", "float16"])
    parser.add_argument("--rows", type=_numbers, default=[1, 64, 128], help="Of decoding steps.")
    parser.add_argument("--only", default="", help="Part of the names of the kernels that are compiled.")
    options = parser.parse_args()
    over = []
    for capability in options.capabilities:
        print(f"compute capability {capability / 10}, {SHARED_BYTES[capability]:,} bytes of shared memory", flush=True)
        for dtype in options.dtypes:
            for taken in compiled(capability, getattr(torch, dtype), options.rows, options.only):
                fitting = fits(taken, capability)
                line = f"  {taken.name:44}{dtype:10}{taken.registers:4} registers{taken.stack:5} of stack"
                print(f"{line}{taken.shared:9,} bytes{'' if fitting else '  DOES NOT FIT'}", flush=True)
                over += [] if fitting else [taken.name]
    if over:
        raise SystemExit(f"{len(over)} kernels do not fit")


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def compiled(capability: int, dtype: torch.dtype, rows: Sequence[int], only: str = "") -> Iterator[Taken]:
    """What each kernel takes, compiled for a compute capability.

    Args:
        dtype: of the activations.
        rows: of decoding steps.
        only: part of the names of the kernels that are compiled.
    """
    pdl = capability >= 90
    launches = [*_portable(dtype, pdl), *(launch for n in rows for launch in _decode(dtype, n, pdl)), *_prefill(dtype)]
    for name, launch in launches:
        if only in name:
            with _compiling(capability) as kernels:
                launch()
            for kernel in kernels:
                yield _taken(f"{name}: {kernel.metadata.name.lstrip('_')}", kernel)


@contextmanager
def _compiling(capability: int) -> Iterator[list[Any]]:
    """Has launches compile for a GPU that is not here, and gathers the compiled kernels. Triton keeps its stand-in."""
    kernels: list[Any] = []
    run, direct = JITFunction.run, DirectLaunch.__call__

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        kernels.append(run(self, *args, grid=grid, warmup=True, **options))

    def launch(self: Any, grid: Any, kind: Any, *args: Any, **options: Any) -> None:
        self._kernel[grid](*args, **options)

    driver.set_active(Target(capability))
    JITFunction.run, DirectLaunch.__call__ = compile_only, launch  # type: ignore[method-assign]
    try:
        yield kernels
    finally:
        JITFunction.run, DirectLaunch.__call__ = run, direct  # type: ignore[method-assign]


def _taken(name: str, kernel: Any) -> Taken:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    # Lines of a function: its name, and then its resources, such as REG:40 STACK:0 SHARED:0.
    resources = dict(part.split(":") for part in text.split("Function ")[-1].split() if part.count(":") == 1)
    threads = 32 * kernel.metadata.num_warps
    return Taken(name, int(resources["REG"]), int(resources["STACK"]), threads, kernel.metadata.shared)


Launches = Iterator[tuple[str, Callable[[], object]]]


def _tensor(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _portable(dtype: torch.dtype, pdl: bool) -> Launches:
    words, scales = nf4.sizes((HIDDEN, INNER))
    rest, rest_scales = nf4.sizes((HIDDEN, INNER + 64))
    given = {
        4: (words, scales),
        8: (_tensor(HIDDEN, INNER, dtype=torch.int8), _tensor(HIDDEN, dtype=torch.float32)),
        16: (_tensor(HIDDEN, INNER, dtype=dtype), None),
    }
    for bits, (weights, own) in given.items():
        for rows in LAUNCH_CONFIGS[bits]:
            x = _tensor(rows, INNER, dtype=dtype)
            yield f"portable, {bits} bits, {rows} rows", lambda b=bits, w=weights, s=own, x=x: gemm(b, w, s, x, pdl=pdl)
    x = _tensor(16, INNER + 64, dtype=dtype)
    yield "portable, 4 bits, a rest of columns", lambda: gemm(4, rest, rest_scales, x, pdl=pdl)
    yield "portable, dequantized", lambda: dequantize_nf4(words, scales, INNER, dtype)


def _decode(dtype: torch.dtype, n: int, pdl: bool) -> Launches:
    rows = DecodeRows(_tensor(n, dtype=torch.int32), _tensor(n, dtype=torch.int64), MODULES)
    attention = Attention(HEADS, KV_HEADS, DIM, DIM**-0.5)
    h, out, gated = (_tensor(n, width, dtype=dtype) for width in (HIDDEN, HEADS * DIM, INNER))
    weight, gate_up, qkv = (_tensor(*shape, dtype=dtype) for shape in ((HIDDEN,), (n, 2 * INNER), (n, sum(QKV))))
    turned = _tensor(n, DIM, dtype=dtype)
    pages = _tensor(PAGES, 16, KV_HEADS, DIM, dtype=dtype)
    cache = Cache(pages, pages, *(_tensor(*s, dtype=torch.int32) for s in ((n, 64, PAGES), (n,), (n,))))
    partials = Partials.empty(n, HEADS, SPLITS, DIM, torch.device("meta"))

    def shrunk(width: int, modules: int, parts: int = 0) -> Tensor:
        return _tensor(n, parts or parts_for(n, width), modules, RANKS, dtype=torch.float32)

    q, o = shrunk(HIDDEN, 3), shrunk(HEADS * DIM, 1)
    given = attention, qkv, turned, turned, cache
    yield f"{n} rows", lambda: norm_shrink(h, weight, 1e-5, h, q, rows, 0, pdl=pdl)
    yield f"{n} rows", lambda: store(*given, rows, pdl=pdl)
    yield f"{n} rows, split", lambda: attend(*given, partials, rows, pdl=pdl)
    yield f"{n} rows, whole", lambda: attend_whole(*given, out, shrunk(0, 1, KV_HEADS), rows, 3, pdl=pdl)
    yield f"{n} rows", lambda: combine_shrink(partials, out, o, rows, 3, pdl=pdl)
    yield f"{n} rows", lambda: gate_shrink(gate_up, gated, shrunk(INNER, 1), rows, 6, pdl=pdl)
    terms = _tensor(4, n, sum(QKV), dtype=torch.float32)
    yield f"{n} rows, of terms", lambda: expand(qkv, q, QKV, rows, 0, terms=terms, pdl=pdl)
    yield f"{n} rows, added", lambda: expand(h, o, [HIDDEN], rows, 3, residual=h)


def _prefill(dtype: torch.dtype) -> Launches:
    n = 512
    x, qkv, turned = (_tensor(n, width, dtype=dtype) for width in (HIDDEN, sum(QKV), DIM))
    integers = _tensor(8, 2, dtype=torch.int32), _tensor(8, dtype=torch.int64), _tensor(8, dtype=torch.int32)
    tiles = SegmentTiles(*integers, RANKS, MODULES)
    pages, slots = _tensor(PAGES, 16, KV_HEADS, DIM, dtype=dtype), _tensor(n, dtype=torch.int64)
    attention = Attention(HEADS, KV_HEADS, DIM, DIM**-0.5)
    yield "prompts", lambda: adapt_segments(x, qkv, QKV, tiles, 0)
    yield "prompts", lambda: rotate_store(attention, qkv, turned, turned, pages, pages, slots)
    yield "prompts", lambda: gate_rows(_tensor(n, 2 * INNER, dtype=dtype))


if __name__ == "__main__":
    main()
