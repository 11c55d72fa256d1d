"""The prefill GEMM of many rows with NF4 weights on one GPU, and a library's with the same weights in bf16.

    python -m benchmarks.gpu.prefill_gemm [--rows 64,128,256,512,1024,2048] [--hidden-size 4096]
        [--intermediate-size 14336] [--configs]

prints microseconds, TFLOP/s, the library's microseconds, and the microseconds that dequantizing for the library takes.
The shapes are Mistral-7B's packed modules, which read the same x. Each result is compared with bitsandbytes'
dequantized weight before the kernel is timed, as launches in one CUDA graph, over more copies of the weight than the L2
cache holds. `--configs` prints, for each of them, the four fastest launch configs with what they take and what was
estimated: `CHUNK_COST` is fitted to that. Without a Hopper GPU there is no kernel: the inputs alone are made.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu.decode_gemm import CACHES, LARGEST_ERROR, add_shape, modules_of, shared, timed
from lorarep_runtime.kernels.gemms import HOPPER
from lorarep_runtime.kernels.hopper import prefill_gemm
from lorarep_runtime.kernels.hopper.nf4 import CHUNK, TILE
from lorarep_runtime.kernels.hopper.packed_weight import PackedWeight
from lorarep_runtime.kernels.hopper.prefill_gemm import CONFIGS, PrefillConfig
from lorarep_runtime.model.packed import PACKED_MODULES, pack

FASTEST = 4
"""Launch configs that are printed."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rows", type=lambda text: [int(n) for n in text.split(",")], default=[64, 128, 256, 512, 1024, 2048]
    )
    add_shape(parser)
    parser.add_argument("--configs", action="store_true", help="Times every launch config, of up to 256 rows.")
    run(parser.parse_args())


def run(options: argparse.Namespace) -> None:
    counts, modules = options.rows, modules_of(options)
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == HOPPER
    device = "cuda" if hopper else "cpu"
    print(f"{'µs, TFLOP/s, library, dequantizing':36}" + "".join(f"{f'{rows} rows':>30}" for rows in counts))
    for names in PACKED_MODULES:
        weights = [shared(torch.randn(modules[name], device=device).bfloat16(), "nf4") for name in names]
        packed, dense = [pack(weights)], torch.cat([weight.dequantize(torch.bfloat16) for weight in weights])
        while hopper and len(packed) * packed[0].nbytes < CACHES * torch.cuda.get_device_properties(0).L2_cache_size:
            packed.append(pack(weights))
        title = ", ".join(name.partition(".")[2].removesuffix("_proj") for name in names)
        line = f"{title:36}"
        for rows in counts if hopper else []:
            x = torch.randn(rows, dense.shape[1], device=device).bfloat16()
            theirs = torch.empty(rows, len(dense), dtype=x.dtype, device=device)
            ours = checked(packed, dense, x)
            library = timed([partial(torch.mm, x, dense.T, out=theirs)])
            dequantizing = timed([packed[0].dense])
            line += f"{ours * 1e6:10.1f}{2 * dense.numel() * rows / ours / 1e12:6.0f}"
            line += f"{library * 1e6:7.0f}{dequantizing * 1e6:7.0f}"
            if options.configs and rows <= max(config.rows for config in CONFIGS):
                print_fastest(f"{title}, {rows} rows", packed, dense, x)
        print(line, flush=True)


def checked(packed: list[PackedWeight], dense: Tensor, x: Tensor) -> float:
    """Seconds of a launch whose result has been compared with the dequantized weight's."""
    y = torch.full((len(x), len(dense)), torch.nan, dtype=x.dtype, device=x.device)
    packed[0].matmul(x, y)
    wanted = x.float() @ dense.float().T
    error = ((y.float() - wanted).norm(dim=1) / wanted.norm(dim=1)).max()
    if not error < LARGEST_ERROR:
        raise SystemExit(f"{len(dense)} outputs, {len(x)} rows: the result is {error:.4f} off")
    return timed([partial(one.matmul, x, y) for one in packed])


def print_fastest(title: str, packed: list[PackedWeight], dense: Tensor, x: Tensor) -> None:
    """Times every launch config for x, and prints the fastest ones."""
    found = []
    for config in (config for config in CONFIGS if config.rows < 2 * len(x)):
        with chosen(config):
            estimate = config.cost(len(x), len(dense) // TILE, dense.shape[1] // CHUNK)
            found.append((checked(packed, dense, x) * 1e6, estimate / 1e3, tuple(config)))
    fastest = (f"{config} {took:.1f} ({estimate:.1f})" for took, estimate, config in sorted(found)[:FASTEST])
    print(f"  {title}: (rows, warps, cluster) µs (estimated): {', '.join(fastest)}", flush=True)


@contextmanager
def chosen(config: PrefillConfig) -> Iterator[None]:
    """Has all launches use a launch config while the context lasts."""
    real, prefill_gemm._launch_config = prefill_gemm._launch_config, lambda *sizes: config  # type: ignore[assignment]
    try:
        yield
    finally:
        prefill_gemm._launch_config = real


if __name__ == "__main__":
    main()
