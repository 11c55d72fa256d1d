"""The product of a few rows with weights that all of them share, and with the adapter of each.

A number of a weight takes 4, 8 or 16 bits. NF4 weights lie as `nf4` arranges them and int8 ones as `int8` does;
bf16 is read as it comes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from lorarep_runtime.kernels.eager.dora_norm import norm_products, row_squares
from lorarep_runtime.kernels.entry_table import DecodeRows, ReferenceRows
from lorarep_runtime.kernels.hopper import int8, nf4, prefill_gemm
from lorarep_runtime.kernels.hopper.launch_config import (
    BARRIER_BYTES,
    ENTRY_BYTES,
    LAUNCH_CONFIGS,
    RANK_SEGMENTS,
    LaunchConfig,
    launch_config_for,
    places_for,
)
from lorarep_runtime.kernels.hopper.nf4 import CHUNK, TILE

if TYPE_CHECKING:
    from lorarep_runtime.kernels.hopper.nvrtc import Kernel

SOURCE = Path(__file__).with_suffix(".cu")
MAX_MODULES = 3
"""Of a group: the modules that read the same x."""
DENSE_BYTES = 64 << 20
"""Of an int8 weight that is dequantized to bf16 at a time. Smaller parts keep the device waiting for launches."""


class GemmArguments(ctypes.Structure):
    """`GemmArguments` of `product.cu`."""

    _fields_: ClassVar[Any] = [
        *((name, ctypes.c_void_p) for name in ("weights", "scales", "x", "y")),
        *((name, ctypes.c_void_p) for name in ("base_bias", "shrunk", "positions", "adapters")),
        *((name, ctypes.c_int) for name in ("rows", "columns", "tiles", "parts")),
        *((name, ctypes.c_int) for name in ("ranks", "first", "modules", "all_modules")),
        ("ends", ctypes.c_int * MAX_MODULES),
        *((name, ctypes.c_int) for name in ("add", "cluster_tiles", "rounds", "low_ranks", "stride")),
        *((name, ctypes.c_int) for name in ("table_at", "x_at", "sums_at", "added_at", "entries_at", "in_place")),
    ]


def defines(launch: LaunchConfig) -> Mapping[str, int]:
    """What the source is compiled with."""
    named = {"KIND": launch.bits, "EIGHTS": launch.eights, "TILES": launch.tiles, "DEPTH": launch.depth}
    named |= {"WARPS": launch.warps, "SIDE": launch.side, "WGMMA": int(launch.wgmma)}
    return named | {
        "GROUP_BYTES": ctypes.sizeof(GemmArguments),
        "ENTRY_BYTES": ENTRY_BYTES,
        "BARRIER_BYTES": BARRIER_BYTES,
    }


def compile_products(bits: Iterable[int]) -> None:
    """Compiles the kernels for such weights side by side: each takes seconds."""
    from lorarep_runtime.kernels.hopper.nvrtc import compile_for_device

    bits = set(bits)
    sources = [
        (nf4.SOURCE, {}),
        *((SOURCE, defines(launch)) for kind in bits for launch in LAUNCH_CONFIGS[kind].values()),
    ]
    sources += [*prefill_gemm.sources()] if 4 in bits else []
    sources += [(int8.SOURCE, {})] if 8 in bits else []
    with ThreadPoolExecutor() as pool:
        for _ in pool.map(lambda source: compile_for_device(*source), sources):
            pass


@cache
def _product_kernel(launch: LaunchConfig) -> Kernel:
    from lorarep_runtime.kernels.hopper.nvrtc import Kernel

    return Kernel(SOURCE, "product", defines(launch))


@dataclass(frozen=True)
class PackedWeight:
    """Weights of modules that read the same x, one under the other."""

    bits: int
    weights: Tensor
    """4 bits: uint8 (tiles, chunks, 32, 16); 8: int8 (tiles, chunks, 2, 32, 16); 16: bf16 (out, in)."""
    scales: Tensor | None
    """4 bits: fp32 (tiles, chunks, 8, 2); 8: fp32 (out), 127 times what a row's numbers stand for."""
    sizes: tuple[int, ...]
    """Outputs of each module, multiples of 16."""

    @property
    def _scales(self) -> Tensor:
        assert self.scales is not None
        return self.scales

    @property
    def columns(self) -> int:
        return self.weights.shape[1] * (1 if self.bits == 16 else CHUNK)

    @property
    def nbytes(self) -> int:
        return self.weights.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def rows(self, module: int) -> PackedWeight:
        """One module's part, the same memory."""
        return self._outputs(sum(self.sizes[:module]), sum(self.sizes[: module + 1]))

    def _parts(self) -> Iterator[PackedWeight]:
        """As many outputs after the other as are dequantized at a time; the same memory. Of int8."""
        tiles = sum(self.sizes) // TILE
        count = min(tiles, -(-tiles * TILE * self.columns * 2 // DENSE_BYTES)) if self.bits == 8 else 1
        for i in range(count):
            yield self._outputs(tiles * i // count * TILE, tiles * (i + 1) // count * TILE)

    def _outputs(self, begin: int, end: int) -> PackedWeight:
        rows, tiles = slice(begin, end), slice(begin // TILE, end // TILE)
        scales = None if self.scales is None else self.scales[tiles if self.bits == 4 else rows]
        return PackedWeight(self.bits, self.weights[rows if self.bits == 16 else tiles], scales, (end - begin,))

    def product(
        self,
        x: Tensor,
        y: Tensor,
        shrunk: Tensor,
        rows: DecodeRows,
        first: int,
        *,
        bias: Tensor | None = None,
        add: bool = False,
    ) -> None:
        """y = c ⊙ (W x) + B (A x) + b for every row with its own adapter's c, B and b; added to y where `add`.

        Rows without a position keep their y. Starts while the kernel before ends.

        Args:
            x: bf16 (rows, in).
            y: bf16 (rows, outputs of all modules).
            shrunk: fp32 (rows, parts, modules, ranks), partial sums of A x; ranks are a multiple of four.
            first: number of the first module in entry tables.
            bias: bf16 (outputs), the base's own.
        """
        ranks = shrunk.shape[3]
        columns, tiles = x.shape[1], sum(self.sizes) // TILE
        ends = [*accumulate(self.sizes), *[tiles * TILE] * MAX_MODULES][:MAX_MODULES]
        at = 0
        while at < len(x):
            launch = launch_config_for(self.bits, tiles, columns, len(x) - at, len(self.sizes), ranks)
            count = min(len(x) - at, 8 * launch.eights)
            places = places_for(launch, tiles, columns, count, len(self.sizes))
            group = GemmArguments(
                weights=self.weights.data_ptr(),
                scales=None if self.scales is None else self.scales.data_ptr(),
                x=x[at:].data_ptr(),
                y=y[at:].data_ptr(),
                base_bias=None if bias is None else bias.data_ptr(),
                shrunk=shrunk[at:].data_ptr(),
                positions=rows.positions[at:].data_ptr(),
                adapters=rows.adapters[at:].data_ptr(),
                rows=count,
                columns=columns,
                tiles=tiles,
                parts=shrunk.shape[1],
                ranks=ranks,
                first=first,
                modules=len(self.sizes),
                all_modules=rows.modules,
                ends=(ctypes.c_int * MAX_MODULES)(*ends),
                add=add,
                cluster_tiles=launch.cluster_tiles(tiles),
                rounds=launch.rounds(tiles),
                low_ranks=launch.rank_segment * len(self.sizes),
                stride=launch.stride(tiles),
                table_at=places.table,
                x_at=places.x,
                sums_at=places.sums,
                added_at=places.added,
                entries_at=places.entries,
                in_place=launch.in_place,
            )
            _product_kernel(replace(launch, cluster=1, rank_segment=RANK_SEGMENTS[-1], in_place=False))(
                launch.grid(tiles),
                32 * (launch.warps + launch.side),
                group,
                shared=places.end,
                cluster=launch.cluster,
                dependent=True,
            )
            at += count

    def dense(self, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """The weights (outputs of all modules, in) as bitsandbytes dequantizes them; bf16 ones themselves."""
        if self.scales is None:
            return self.weights.to(dtype)
        if self.bits == 8:
            return int8.dequantize(self.weights, self.scales, dtype)
        if dtype != torch.bfloat16:
            return self.dense().to(dtype)
        out = torch.empty(sum(self.sizes), self.columns, dtype=dtype, device=self.weights.device)
        nf4.dequantize(self.weights, self.scales, out)
        return out

    def matmul(self, x: Tensor, y: Tensor) -> None:
        """y = W x for many rows: bf16 (rows, in) to bf16, of NF4 also fp32, (rows, outputs of all modules)."""
        if self.bits == 4:
            prefill_gemm.matmul(self.weights, self._scales, x, y)
            return
        parts = [*self._parts()]
        for part, to in zip(parts, y.split([part.sizes[0] for part in parts], 1), strict=True):
            torch.mm(x, part.dense().T, out=to)

    def row_squares(self) -> Tensor:
        """As `dora.row_squares`, of the weights of all modules."""
        if self.bits == 4:
            out = torch.empty(sum(self.sizes), dtype=torch.float32, device=self.weights.device)
            nf4.squares(self.weights, self._scales, out)
            return out
        return torch.cat([row_squares(weight) * scales**2 for weight, scales in self._exact_parts()])

    def norm_products(self, a: Tensor) -> Tensor:
        """As `dora.norm_products`, of the weights of all modules. Of int8 and bf16."""
        return torch.cat([norm_products(weight, a) * scales for weight, scales in self._exact_parts()], 1)

    def _exact_parts(self) -> Iterator[tuple[Tensor, Tensor | float]]:
        """Of each part a matrix in bf16, and what each of its rows is to be multiplied with."""
        for part in self._parts():
            if part.scales is None:
                yield part.weights, 1.0
            else:
                yield int8.dequantize(part.weights, None, torch.bfloat16), part.scales * (1 / 127)


def product_reference(
    weight: Tensor,
    x: Tensor,
    y: Tensor,
    shrunk: Tensor,
    rows: ReferenceRows,
    first: int,
    sizes: Sequence[int],
    *,
    bias: Tensor | None = None,
    add: bool = False,
) -> None:
    """The same from a dense weight (outputs, in)."""
    plain = (x.float() @ weight.float().T).to(torch.float32)
    for row, _ in rows.walking():
        start = 0
        for module, size in enumerate(sizes):
            at = slice(start, start := start + size)
            value = plain[row, at]
            if (entry := rows.entry(row, first + module)) is not None:
                value = value if entry.c is None else value * entry.c.float()
                value = value + entry.B.float() @ shrunk[row, :, module, : len(entry.A)].sum(0)
                value = value if entry.bias is None else value + entry.bias.float()
            if bias is not None:
                value = value + bias[at].float()
            y[row, at] = (value + y[row, at].float() if add else value).to(y.dtype)
