"""The portable GEMMs on one GPU, and on Hopper the ones for Hopper, for weights of 4096 outputs and 14336 columns.

    python -m benchmarks.gpu.portable [--rows 1,8,32,64,256] [--kinds nf4,int8,none] [--dtypes bfloat16,float16]
                                      [--configs]

prints, for each kind of weight, microseconds of a step's product with its expand, without adapters, and their ratios to
the floor, the time that a copy needs for the weight's bytes, and to Hopper's kernels. Each result is compared with
bitsandbytes' dequantized weight before it is timed, as launches in one CUDA graph, over more copies of the weight than
the L2 cache holds. `--configs` prints the fastest launch configs of the portable GEMM alone for each number of rows;
`LAUNCH_CONFIGS` and `PROGRAMS` are chosen by that.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import product
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from benchmarks.gpu.decode_gemm import CACHES, LARGEST_ERROR, shared, timed
from benchmarks.gpu.floor import copy_bandwidth
from lorarep_runtime.gpu.adapted_linear import AdaptedLinear, PackedLinear, PortableLinear
from lorarep_runtime.gpu.buffers import LEAST_RANKS
from lorarep_runtime.kernels.entry_table import DecodeRows
from lorarep_runtime.kernels.gemms import HOPPER
from lorarep_runtime.kernels.portable import gemm as portable
from lorarep_runtime.kernels.portable.launch_config import LaunchConfig, launch_of, multiprocessors
from lorarep_runtime.kernels.portable.packed_weight import PortableWeight
from lorarep_runtime.model.packed import BITS, pack, pack_portable

OUTPUTS, COLUMNS = 4096, 14336
CONFIGS = [*product((64, 128), (4, 8), (3, 4, 5))]
"""Outputs of a tile, warps and stages that `--configs` tries."""
PROGRAMS = (2, 4, 8)
"""Programs for each multiprocessor that it tries."""
FASTEST = 4
"""Launch configs that are printed."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=lambda text: [int(n) for n in text.split(",")], default=[1, 8, 32, 64, 256])
    parser.add_argument("--kinds", type=lambda text: text.split(","), default=[*BITS])
    parser.add_argument("--dtypes", type=lambda text: text.split(","), default=["bfloat16", "float16"])
    parser.add_argument("--configs", action="store_true")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("there is no GPU here; benchmarks.gpu.compile_only compiles the kernels without one")
    bandwidth = copy_bandwidth("cuda")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copying moves {bandwidth / 1e12:.2f} TB/s")
    for kind, dtype in product(options.kinds, options.dtypes):
        if options.configs:
            print_fastest(kind, getattr(torch, dtype), options.rows)
        else:
            print_table(kind, getattr(torch, dtype), options.rows, bandwidth)


def print_table(kind: str, dtype: torch.dtype, counts: Sequence[int], bandwidth: float) -> None:
    """Times steps of some numbers of rows with a kind of weight, and compares each with the reference before."""
    hopper = torch.cuda.get_device_capability()[0] == HOPPER and dtype == torch.bfloat16
    weights, dense = weights_of(kind, dtype)
    own = copies(lambda: pack_portable(weights))
    theirs = copies(lambda: pack(weights)) if hopper else []
    floor = own[0].nbytes / bandwidth
    print(f"{kind}, {str(dtype).removeprefix('torch.')}: floor {floor * 1e6:.1f} µs")
    for rows in counts:
        step = Step(rows, dtype)
        line = f"{rows:5} rows, portable {(took := step.seconds(own, PortableLinear, dense)) * 1e6:7.1f} µs"
        line += f"{took / floor:6.2f} x floor"
        if hopper:
            other = step.seconds(theirs, partial(PackedLinear, deterministic=False), dense)
            line += f", Hopper's {other * 1e6:7.1f} µs{other / floor:6.2f} x floor, ratio{took / other:5.2f}"
        print(line, flush=True)


def weights_of(kind: str, dtype: torch.dtype) -> tuple[list, Tensor]:
    """A weight, and its matrix as bitsandbytes dequantizes it."""
    weight = shared(torch.randn(OUTPUTS, COLUMNS, device="cuda").to(dtype), kind)
    return [weight], weight.dequantize(dtype)


def copies(make: Callable[[], Any]) -> list[Any]:
    """So many that a step finds none of them in the L2 cache."""
    found = [make()]
    while len(found) * found[0].nbytes < CACHES * torch.cuda.get_device_properties(0).L2_cache_size:
        found.append(make())
    return found


class Step:
    """The product of a decoding step: some rows without adapters."""

    def __init__(self, rows: int, dtype: torch.dtype) -> None:
        self.x = torch.randn(rows, COLUMNS, device="cuda").to(dtype)
        positions = torch.zeros(rows, dtype=torch.int32, device="cuda")
        self._rows = DecodeRows(positions, torch.zeros(rows, dtype=torch.int64, device="cuda"), 1)
        self._shrunk = torch.zeros(rows, 1, 1, LEAST_RANKS, device="cuda")
        self._y = torch.empty(rows, OUTPUTS, dtype=dtype, device="cuda")

    def seconds(self, packed: Sequence, linear: Callable[..., AdaptedLinear], dense: Tensor) -> float:
        """Seconds of a step whose result has been compared."""
        launches = [partial(self._launch, linear(one)) for one in packed]
        self._y.fill_(torch.nan)
        launches[-1]()
        check(self._y, self.x, dense)
        return timed(launches)

    def _launch(self, linear: AdaptedLinear) -> None:
        linear.decode(self.x, self._y, self._shrunk, self._rows, 0, bias=None, add=False)


def check(y: Tensor, x: Tensor, dense: Tensor) -> None:
    """Ends the benchmark if a product is wrong."""
    wanted = x.float() @ dense.float().T
    error = ((y.float() - wanted).norm(dim=1) / wanted.norm(dim=1)).max()
    if not error < LARGEST_ERROR:
        raise SystemExit(f"{len(x)} rows of {x.dtype}: the result is {error:.4f} off")


def print_fastest(kind: str, dtype: torch.dtype, counts: Sequence[int]) -> None:
    """Times the portable GEMM alone with each launch config, and prints the fastest ones."""
    weights, dense = weights_of(kind, dtype)
    packed = copies(lambda: pack_portable(weights))
    for rows in counts:
        x = torch.randn(rows, COLUMNS, device="cuda").to(dtype)
        found = sorted(timed_configs(BITS[kind], packed, x, dense))[:FASTEST]
        lines = [f"{seconds * 1e6:.1f} µs {tuple(config)} x {programs}" for seconds, programs, config in found]
        print(f"{kind}, {str(dtype).removeprefix('torch.')}, {rows} rows: {'; '.join(lines)}", flush=True)


def timed_configs(
    bits: int, packed: Sequence[PortableWeight], x: Tensor, dense: Tensor
) -> Iterator[tuple[float, int, LaunchConfig]]:
    """Seconds with each config that the device can run, with the programs for each multiprocessor."""
    tiles = [rows for rows in (16, 32, 64, 128) if rows < 2 * len(x) or rows == 16]
    for tile, (outputs, warps, stages) in product(tiles[-2:], CONFIGS):
        config = LaunchConfig(outputs, tile, warps, stages)
        for programs in PROGRAMS:
            launch = partial(launch_of, config, programs * multiprocessors())
            with patch.object(portable, "launch_for", launch), suppress(OutOfResources):
                check(packed[0].gemm(x).sum(0), x, dense)
                yield timed([partial(one.gemm, x) for one in packed]), programs, config


if __name__ == "__main__":
    main()
