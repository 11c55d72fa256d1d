"""The prefill GEMM of many rows with NF4 weights on one GPU, and a library's with the same weights in bf16.

    python -m benchmarks.gpu.prefill_gemm [--rows 64,128,256,512,1024,2048]

prints microseconds, TFLOP/s, the library's microseconds, and the microseconds that dequantizing for the library takes.
The shapes are Mistral-7B's packed modules, which read the same x. Each result is compared with bitsandbytes'
dequantized weight before the kernel is timed, as launches in one CUDA graph. Without a Hopper GPU there is no kernel:
the inputs alone are made.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch

from benchmarks.gpu.decode_gemm import LARGEST_ERROR, shared, timed
from lorarep_runtime.kernels.hopper.launch_config import HOPPER
from lorarep_runtime.model.packed import PACKED_MODULES, pack
from tests.support.models import MISTRAL_7B, projections


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rows", type=lambda text: [int(n) for n in text.split(",")], default=[64, 128, 256, 512, 1024, 2048]
    )
    run(parser.parse_args().rows)


def run(counts: list[int]) -> None:
    modules = projections(MISTRAL_7B)
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == HOPPER
    device = "cuda" if hopper else "cpu"
    print(f"{'µs, TFLOP/s, library, dequantizing':36}" + "".join(f"{f'{rows} rows':>30}" for rows in counts))
    for names in PACKED_MODULES:
        weights = [shared(torch.randn(modules[name], device=device).bfloat16(), "nf4") for name in names]
        packed, dense = pack(weights), torch.cat([weight.dequantize(torch.bfloat16) for weight in weights])
        line = f"{', '.join(name.partition('.')[2].removesuffix('_proj') for name in names):36}"
        for rows in counts if hopper else []:
            x = torch.randn(rows, dense.shape[1], device=device).bfloat16()
            y, theirs = (torch.empty(rows, len(dense), dtype=x.dtype, device=device) for _ in range(2))
            packed.matmul(x, y)
            wanted = x.float() @ dense.float().T
            error = ((y.float() - wanted).norm(dim=1) / wanted.norm(dim=1)).max()
            if not error < LARGEST_ERROR:
                raise SystemExit(f"{names[0]}, {rows} rows: the result is {error:.4f} off")
            ours = timed([partial(packed.matmul, x, y)])
            library = timed([partial(torch.mm, x, dense.T, out=theirs)])
            dequantizing = timed([packed.dense])
            line += f"{ours * 1e6:10.1f}{2 * dense.numel() * rows / ours / 1e12:6.0f}"
            line += f"{library * 1e6:7.0f}{dequantizing * 1e6:7.0f}"
        print(line, flush=True)


if __name__ == "__main__":
    main()
