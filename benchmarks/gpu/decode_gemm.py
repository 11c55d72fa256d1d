"""The decode GEMM alone on one GPU: microseconds, bytes a second, and the distance to the floor.

    python -m benchmarks.gpu.decode_gemm [--quantization nf4] [--rows 1,8,16,32] [--rank 8] [--hidden-size 4096]
        [--intermediate-size 14336]

The shapes are Mistral-7B's packed modules, which read the same x. Each row has a LoRA of its own where the rank is not
0. Each result is compared with bitsandbytes' dequantized weight before the kernel is timed. The timed launches are
chained in one CUDA graph, as in a captured step, over more copies of weights and adapters than the L2 cache holds. The
floor is the time that reading their bytes takes at the bandwidth of a copy.

Without a Hopper GPU there is no kernel: the inputs are made, and the reference alone runs.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import bitsandbytes as bnb
import torch
from torch import Tensor

from benchmarks.gpu.floor import copy_bandwidth
from lorarep_runtime.gpu.buffers import LEAST_RANKS, parts_for
from lorarep_runtime.kernels.entry_table import DecodeRows, Entries, Entry, ReferenceRows, entry_table
from lorarep_runtime.kernels.gemms import HOPPER
from lorarep_runtime.kernels.hopper.decode_gemm import decode_gemm_reference
from lorarep_runtime.kernels.hopper.packed_weight import PackedWeight
from lorarep_runtime.model.packed import BITS, PACKED_MODULES, pack
from lorarep_runtime.model.weights import DenseWeight, Int8Weight, NF4Weight, Weight
from tests.support.decode_rows import one_by_one
from tests.support.models import MISTRAL_7B, projections

POSITIONS = 64
"""Positions of the stack whose step the sums are for."""
LAUNCHES = 200
"""Launches in a graph, at least."""
REPLAYS = 20
CACHES = 4
"""How many times the L2 cache is filled before the same copy is read again."""
LARGEST_ERROR = 6e-3
"""bf16's rounding, relative to the length of a row."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quantization", choices=BITS, default="nf4")
    parser.add_argument("--rows", type=lambda text: [int(n) for n in text.split(",")], default=[1, 8, 16, 32])
    parser.add_argument("--rank", type=int, default=8, help="0 is no adapter.")
    add_shape(parser)
    run(parser.parse_args())


def add_shape(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--hidden-size", type=int, default=MISTRAL_7B["hidden_size"])
    parser.add_argument("--intermediate-size", type=int, default=MISTRAL_7B["intermediate_size"])


def modules_of(options: argparse.Namespace) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of each linear module of a layer that is as wide as the options say."""
    heads = options.hidden_size // MISTRAL_7B["head_dim"]
    shape = dict(hidden_size=options.hidden_size, intermediate_size=options.intermediate_size)
    kv_heads = max(1, heads // 4)
    return projections({**MISTRAL_7B, **shape, "num_attention_heads": heads, "num_key_value_heads": kv_heads})


def run(options: argparse.Namespace) -> None:
    modules = modules_of(options)
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == HOPPER
    device = "cuda" if hopper else "cpu"
    bandwidth = copy_bandwidth(device) if hopper else 0.0
    if hopper:
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copying moves {bandwidth / 1e12:.2f} TB/s")
    print(f"{f'rank {options.rank}':9}" + "".join(f"{f'{rows} rows: µs, GB/s, x floor':>34}" for rows in options.rows))
    sums = dict.fromkeys(options.rows, 0.0)
    for names in PACKED_MODULES:
        line = f"{', '.join(name.partition('.')[2].removesuffix('_proj') for name in names):9}"
        for rows in options.rows:
            case = Case.of([modules[name] for name in names], names, rows, options.rank, device, options.quantization)
            if not hopper:
                case.reference()
                line += f"{'reference alone':>34}"
                continue
            case.check()
            seconds = timed(case.launches())
            sums[rows] += seconds
            floor = case.bytes / bandwidth
            line += f"{seconds * 1e6:19.1f}{case.bytes / seconds / 1e9:8.0f}{seconds / floor:7.2f}"
        print(line, flush=True)
    if hopper:
        total = "".join(f"{POSITIONS * seconds * 1e3:34.2f}" for seconds in sums.values())
        print(f"all four, {POSITIONS} positions, ms\n{'':9}{total}")


def shared(weight: Tensor, kind: str) -> Weight:
    if kind == "nf4":
        return NF4Weight(*bnb.functional.quantize_4bit(weight, quant_type="nf4"))
    if kind == "int8":
        return Int8Weight(*bnb.functional.int8_vectorwise_quant(weight.half())[:2])
    return DenseWeight(weight)


@dataclass(frozen=True)
class Case:
    """One GEMM of packed modules with some rows, on several copies of all that a step does not find in the cache."""

    packed: Sequence[PackedWeight]
    dense: Tensor
    """(out, in), the weight as bitsandbytes dequantizes it."""
    x: Tensor
    shrunk: Tensor
    names: Sequence[str]
    adapters: Sequence[Entries | None]
    """Each row's adapter; the entries of a copy are those at its position."""
    tables: Sequence[Tensor]
    rank: int

    @classmethod
    def of(
        cls, shapes: Sequence[tuple[int, int]], names: Sequence[str], rows: int, rank: int, device: str, kind: str
    ) -> Case:
        generator = torch.Generator(device).manual_seed(0)

        def noise(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, device=device)

        into, sizes = shapes[0][1], tuple(out for out, _ in shapes)
        weights = [shared(noise(*shape).bfloat16(), kind) for shape in shapes]
        first = pack(weights)
        cache = torch.cuda.get_device_properties(device).L2_cache_size if device == "cuda" else 1
        copies = 1 + CACHES * cache // (first.nbytes)
        A = noise(max(rank, 1), into).bfloat16()  # only its length is read here

        def adapter() -> Entries:
            places = [(copy, name, out) for copy in range(copies) for name, out in zip(names, sizes, strict=True)]
            return {(at, name): Entry(A, noise(rank, out).bfloat16().T, None, None) for at, name, out in places}

        adapters = [adapter() if rank else None for _ in range(rows)]
        return cls(
            packed=[pack(weights) for _ in range(copies)],
            dense=torch.cat([weight.dequantize(torch.bfloat16) for weight in weights]),
            x=noise(rows, into).bfloat16(),
            shrunk=noise(rows, parts_for(rows, into), len(names), max(rank, LEAST_RANKS)),
            names=names,
            adapters=adapters,
            tables=[entry_table(one_by_one(a), copies, names).to(device) for a in adapters if a is not None],
            rank=rank,
        )

    @property
    def bytes(self) -> int:
        """Bytes that one GEMM reads and writes."""
        first, rows, out = self.packed[0], len(self.x), len(self.dense)
        weights, adapters = first.nbytes, rows * out * self.rank * self.x.itemsize
        return weights + adapters + self.x.nbytes + rows * out * self.x.itemsize

    def launches(self) -> list[Callable[[], None]]:
        """One launch for each copy."""
        y = torch.empty(len(self.x), len(self.dense), dtype=self.x.dtype, device=self.x.device)
        return [self._launch(copy, y) for copy in range(len(self.packed))]

    def _launch(self, copy: int, y: Tensor) -> Callable[[], None]:
        device, count = self.x.device, len(self.x)
        addresses = [table.data_ptr() for table in self.tables] or [0] * count
        positions = torch.full((count,), copy, dtype=torch.int32, device=device)
        rows = DecodeRows(positions, torch.tensor(addresses, device=device), len(self.names))
        return lambda: self.packed[copy].decode(self.x, y, self.shrunk, rows, 0)

    def reference(self, copy: int = 0) -> Tensor:
        y = torch.zeros(len(self.x), len(self.dense), dtype=self.x.dtype, device=self.x.device)
        rows = ReferenceRows([copy] * len(self.x), self.adapters, self.names)
        decode_gemm_reference(self.dense, self.x, y, self.shrunk, rows, 0, self.packed[0].sizes)
        return y

    def check(self) -> None:
        """Compares the first and the last copy with the reference."""
        for copy in (0, len(self.packed) - 1):
            y, wanted = torch.empty_like(self.reference(copy)), self.reference(copy).float()
            self._launch(copy, y)()
            error = ((y.float() - wanted).norm(dim=1) / wanted.norm(dim=1)).max()
            if not error < LARGEST_ERROR:
                raise SystemExit(f"{self.names[0]}, {len(self.x)} rows: the result is {error:.4f} off")


def timed(launches: Sequence[Callable[[], object]]) -> float:
    """Seconds a launch."""
    rounds = -(-LAUNCHES // len(launches))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in [*launches] * rounds:
            launch()
    seconds = []
    for _ in range(3 + REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(seconds[3:]) / (rounds * len(launches))


if __name__ == "__main__":
    main()
