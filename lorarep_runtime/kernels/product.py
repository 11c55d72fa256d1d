"""The product of a few rows with weights that all of them share, and with the adapter of each.

A number of a weight takes 4, 8 or 16 bits. bitsandbytes packs an NF4 weight (out, in) row by row, two numbers a byte,
the first in the high half, with an fp32 scale for each 64 (QLoRA, Dettmers et al., 2023); `product.cu` wants the same
bytes and scales in tiles: not one bit of a value changes, and the weight is held once. int8 (LLM.int8(), Dettmers et
al., 2022) and bf16 are read as they lie.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lorarep_runtime.kernels.rows import PlainRows, Rows

if TYPE_CHECKING:
    from lorarep_runtime.kernels.cuda import Kernel

SOURCE = Path(__file__).with_suffix(".cu")
NF4_SOURCE = Path(__file__).with_name("nf4.cu")
HOPPER = 9
"""Compute capability that the source is for: later ones have no wgmma."""
TILE = 16
"""Rows of a weight that a warp works on at once."""
CHUNK = 64
"""Columns that share a scale."""
MAX_MODULES = 3
"""Of a group: the modules that read the same x."""
DENSE_BYTES = 64 << 20
"""Of a weight that is dequantized to bf16 at a time. Smaller parts keep the device waiting for launches."""
RANK_SEGMENTS = (16, 32, 64)
"""Multiples of what tensor cores multiply with at once."""


def arrange(packed: Tensor, scales: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """From bitsandbytes' order to tiles.

    Args:
        packed: uint8, out · in / 2 bytes.
        scales: fp32, out · in / 64.
        shape: (out, in), multiples of 16 and 64.

    Returns:
        uint8 (tiles, chunks, 32 lanes, 16) and fp32 (tiles, chunks, 8, 2): lane 4g + t holds what tensor cores want of
        it, the columns 2t, 2t + 1, 2t + 8 and 2t + 9 of each 16 of a chunk, for the rows g and g + 8 of a tile.
    """
    out, into = shape
    tiles, chunks = out // TILE, into // CHUNK
    bytes_ = packed.view(tiles, 2, 8, chunks, 4, 2, 4).permute(0, 3, 2, 6, 1, 4, 5)
    return (
        bytes_.reshape(tiles, chunks, 32, 16).contiguous(),
        scales.view(tiles, 2, 8, chunks).permute(0, 3, 2, 1).contiguous(),
    )


class Group(ctypes.Structure):
    """`Group` of `product.cu`."""

    _fields_: ClassVar[Any] = [
        *((name, ctypes.c_void_p) for name in ("weights", "scales", "x", "y")),
        *((name, ctypes.c_void_p) for name in ("base_bias", "low", "positions", "adapters")),
        *((name, ctypes.c_int) for name in ("rows", "columns", "tiles", "parts")),
        *((name, ctypes.c_int) for name in ("ranks", "first", "modules", "all_modules")),
        ("ends", ctypes.c_int * MAX_MODULES),
        *((name, ctypes.c_int) for name in ("add", "cluster_tiles", "rounds", "low_ranks", "stride")),
        *((name, ctypes.c_int) for name in ("table_at", "x_at", "sums_at", "added_at", "entries_at", "in_place")),
    ]


@dataclass(frozen=True)
class Spread:
    """How a product is spread over the device, a CTA to a multiprocessor."""

    bits: int
    """Of a number of the weight."""
    eights: int
    """Rows of x, in eights."""
    tiles: int
    """Of a warp."""
    depth: int
    """Chunks of each tile that a warp has on their way."""
    warps: int
    """Of a CTA, that multiply."""
    wgmma: bool = False
    """Whether four warps multiply together; a tile each."""
    cluster: int = 1
    """CTAs that split the columns."""
    rank_segment: int = RANK_SEGMENTS[-1]
    """Ranks of each module whose low is in shared memory at a time; more where a cluster has outputs of fewer."""
    in_place: bool = False
    """Whether the CTAs' sums are where x was; for one round."""

    @property
    def side(self) -> int:
        """Warps besides, which compute what adapters add."""
        return 8 if self.wgmma else 4

    @property
    def unit(self) -> int:
        """Tiles that are multiplied together or not."""
        return 4 if self.wgmma else self.tiles

    def cluster_tiles(self, tiles: int) -> int:
        """Of a cluster, where no more clusters are launched than the device takes at once."""
        return -(-tiles // self.unit // clusters_at_once(self.cluster)) * self.unit

    def rounds(self, tiles: int) -> int:
        """That a cluster takes its tiles in."""
        return -(-self.cluster_tiles(tiles) // (self.warps * self.tiles))

    def round_tiles(self, tiles: int) -> int:
        """Of the first round, which no other has more than."""
        return -(-self.cluster_tiles(tiles) // self.unit // self.rounds(tiles)) * self.unit

    def grid(self, tiles: int) -> int:
        return -(-tiles // self.cluster_tiles(tiles)) * self.cluster

    def stride(self, tiles: int) -> int:
        """Of the rows of sums in shared memory: four times an odd number keeps a warp's in different banks."""
        share = -(-self.round_tiles(tiles) * TILE // self.cluster // 8) * 8
        return share + 4

    def cost(self, tiles: int, chunks: int, ranks: int, shared: int) -> float:
        """Tiles times chunks that a multiprocessor multiplies, and what else takes as long.

        Args:
            shared: bytes of a CTA's shared memory.
        """
        rounds, segments = self.rounds(tiles), -(-ranks // self.rank_segment)
        work = (self.cluster_tiles(tiles) + rounds * STEP_COST) * chunks / self.cluster
        # What is loaded comes through the L1 cache, which has what shared memory leaves.
        under_way = self.warps * self.tiles * self.depth * TILE * CHUNK * self.bits // 8
        if under_way > 2 * (L1_BYTES - min(size for size in CARVEOUTS if size >= shared + CTA_BYTES)):
            work *= STARVED
        return work + rounds * ROUND_COST + segments * SEGMENT_COST + self.in_place * BARRIER_COST

    @property
    def defines(self) -> Mapping[str, int]:
        """What the source is compiled with."""
        named = {"KIND": self.bits, "EIGHTS": self.eights, "TILES": self.tiles, "DEPTH": self.depth}
        named |= {"WARPS": self.warps, "SIDE": self.side, "WGMMA": int(self.wgmma)}
        return named | {"GROUP_BYTES": ctypes.sizeof(Group), "ENTRY_BYTES": ENTRY_BYTES, "BARRIER_BYTES": BARRIER_BYTES}


class Places(NamedTuple):
    """Bytes from the beginning of a CTA's shared memory."""

    table: int
    x: int
    added: int
    entries: int
    sums: int
    end: int


STEP_COST = 14
"""Of a chunk, however many tiles a CTA has, in tiles."""
ROUND_COST = 100
"""Of beginning and finishing tiles, in tiles times chunks."""
SEGMENT_COST = 20
"""Likewise of a segment of ranks."""
BARRIER_COST = 40
"""Likewise of waiting until a cluster is done with x."""
STARVED = 1.2
"""How much longer work takes with less than half of the L1 cache that it has loads for."""


@cache
def places_for(spread: Spread, tiles: int, columns: int, rows: int, modules: int) -> Places:
    """Shared memory of a CTA."""
    added = 4 * 8 * spread.eights * spread.stride(tiles)
    sums = added * spread.cluster
    sizes = {
        "x": max(2 * 8 * spread.eights * -(-(columns // CHUNK) // spread.cluster) * CHUNK, spread.in_place * sums),
        "added": added,
        "entries": BARRIER_BYTES + -(-rows * modules * (ENTRY_BYTES + 4 * spread.rank_segment) // 16) * 16,
        "sums": 0 if spread.in_place else sums,
    }
    tables = range(TABLE_BYTES, SHARED_BYTES, TABLE_BYTES) if spread.bits == 4 else [0]
    places = min((_places(sizes, at) for at in tables), key=lambda places: places.end)
    return places._replace(sums=places.x) if spread.in_place else places


def _places(sizes: Mapping[str, int], table: int) -> Places:
    """With the table at an address, 0 for none; what fits goes before it."""
    before, after = 0, max(0, table - RESERVED_BYTES + TABLE_BYTES) if table else 0
    places = {}
    for name, size in sizes.items():
        if before + size <= table - RESERVED_BYTES:
            places[name], before = before, before + size
        else:
            places[name], after = after, after + size
    return Places(table=max(0, table - RESERVED_BYTES), end=after, **places)


MOST_CLUSTER = 8
"""CTAs of the largest cluster that every device takes."""
SHARED_BYTES = 227 << 10
"""Shared memory of a multiprocessor."""
CTA_BYTES = 1024
"""Of it, what each CTA takes for itself."""
L1_BYTES = 256 << 10
"""Of a multiprocessor, shared memory included."""
CARVEOUTS = [size << 10 for size in (0, 8, 16, 32, 64, 100, 132, 164, 196, 228)]
"""Sizes that shared memory has of it (CUDA C++ Programming Guide, compute capability 9.0)."""
RESERVED_BYTES = 1 << 10
"""At the beginning of shared memory's addresses, for the device itself."""
TABLE_BYTES = 256 * 128
"""Also what its address is a multiple of."""
BARRIER_BYTES = 32
ENTRY_BYTES = 32
SPREADS = {
    4: {1: Spread(4, 1, 2, 4, 12), 2: Spread(4, 2, 1, 4, 16, wgmma=True), 4: Spread(4, 4, 1, 2, 16, wgmma=True)},
    8: {1: Spread(8, 1, 2, 4, 12), 2: Spread(8, 2, 2, 4, 12), 4: Spread(8, 4, 1, 4, 16, wgmma=True)},
    16: {1: Spread(16, 1, 2, 3, 12), 2: Spread(16, 2, 2, 2, 12), 4: Spread(16, 4, 2, 2, 8)},
}
"""By bits and eights of rows, what measurements on an H100 left. More rows take several launches."""

CLUSTERS = (132, 66, 39, 30, 22, 17, 15, 15)
"""Of 1, 2, ... CTAs, how many an H100 takes at once, a CTA to a multiprocessor; where no device can be asked."""


@cache
def clusters_at_once(size: int) -> int:
    """Clusters of `size` CTAs that the device takes at once, a CTA to a multiprocessor.

    Multiprocessors are in groups of different sizes, and a cluster stays in one group.
    """
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != HOPPER:
        return CLUSTERS[size - 1]
    return _dequantize_kernel().clusters_at_once(size, 128, SHARED_BYTES - CTA_BYTES)


def compile_products(bits: Iterable[int]) -> None:
    """Compiles the kernels for such weights side by side: each takes seconds."""
    from lorarep_runtime.kernels.cuda import compile_for_device

    sources = [(SOURCE, spread.defines) for kind in bits for spread in SPREADS[kind].values()]
    with ThreadPoolExecutor() as pool:
        for _ in pool.map(lambda source: compile_for_device(*source), [(NF4_SOURCE, {}), *sources]):
            pass


@cache
def _product_kernel(spread: Spread) -> Kernel:
    from lorarep_runtime.kernels.cuda import Kernel

    return Kernel(SOURCE, "product", spread.defines)


@cache
def _dequantize_kernel() -> Kernel:
    from lorarep_runtime.kernels.cuda import Kernel

    return Kernel(NF4_SOURCE, "nf4_dequantize")


@cache
def spread_for(bits: int, tiles: int, columns: int, rows: int, modules: int, ranks: int) -> Spread:
    """The spread for a product, with as many of the rows at a time as x and sums leave shared memory for.

    Raises:
        ValueError: there is none.
    """
    by_eights = SPREADS[bits]
    segments = [segment for segment in RANK_SEGMENTS if segment < 2 * ranks] or RANK_SEGMENTS[:1]

    for eights in (eights for eights in sorted(by_eights, reverse=True) if eights == 1 or 4 * eights < rows):
        spreads = [
            replace(by_eights[eights], cluster=cluster, rank_segment=segment, in_place=in_place)
            for cluster in range(1, MOST_CLUSTER + 1)
            for segment in segments
            for in_place in (False, True)
        ]
        taken = min(rows, 8 * eights)
        costs = {
            one: one.cost(tiles, columns // CHUNK, ranks, shared)
            for one in spreads
            if (shared := places_for(one, tiles, columns, taken, modules).end) <= SHARED_BYTES - CTA_BYTES
            and not (one.in_place and one.rounds(tiles) > 1)
        }
        if costs:
            return min(costs, key=costs.__getitem__)
    raise ValueError(f"no spread for {columns} columns")


@dataclass(frozen=True)
class SharedGroup:
    """Weights of modules that read the same x, one under the other."""

    bits: int
    weights: Tensor
    """4 bits: uint8 (tiles, chunks, 32, 16); 8: int8 (out, in); 16: bf16 (out, in)."""
    scales: Tensor | None
    """4 bits: fp32 (tiles, chunks, 8, 2); 8: fp32 (out), 127 times what a row's numbers stand for."""
    sizes: tuple[int, ...]
    """Outputs of each module, multiples of 16."""

    @property
    def columns(self) -> int:
        return self.weights.shape[1] * (CHUNK if self.bits == 4 else 1)

    @property
    def nbytes(self) -> int:
        return self.weights.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def rows(self, module: int) -> SharedGroup:
        """One module's part, the same memory."""
        return self._outputs(sum(self.sizes[:module]), sum(self.sizes[: module + 1]))

    def parts(self) -> Iterator[SharedGroup]:
        """As many outputs after the other as are dequantized at a time; the same memory."""
        tiles = sum(self.sizes) // TILE
        count = min(tiles, -(-tiles * TILE * self.columns * 2 // DENSE_BYTES)) if self.scales is not None else 1
        for i in range(count):
            yield self._outputs(tiles * i // count * TILE, tiles * (i + 1) // count * TILE)

    def _outputs(self, begin: int, end: int) -> SharedGroup:
        unit = TILE if self.bits == 4 else 1
        at = slice(begin // unit, end // unit)
        return SharedGroup(
            self.bits, self.weights[at], None if self.scales is None else self.scales[at], (end - begin,)
        )

    def product(
        self,
        x: Tensor,
        y: Tensor,
        low: Tensor,
        rows: Rows,
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
            low: fp32 (rows, parts, modules, ranks), partial sums of A x; ranks are a multiple of four.
            first: number of the first module in entry tables.
            bias: bf16 (outputs), the base's own.
        """
        ranks = low.shape[3]
        columns, tiles = x.shape[1], sum(self.sizes) // TILE
        ends = [*accumulate(self.sizes), *[tiles * TILE] * MAX_MODULES][:MAX_MODULES]
        at = 0
        while at < len(x):
            spread = spread_for(self.bits, tiles, columns, len(x) - at, len(self.sizes), ranks)
            count = min(len(x) - at, 8 * spread.eights)
            places = places_for(spread, tiles, columns, count, len(self.sizes))
            group = Group(
                weights=self.weights.data_ptr(),
                scales=None if self.scales is None else self.scales.data_ptr(),
                x=x[at:].data_ptr(),
                y=y[at:].data_ptr(),
                base_bias=None if bias is None else bias.data_ptr(),
                low=low[at:].data_ptr(),
                positions=rows.positions[at:].data_ptr(),
                adapters=rows.adapters[at:].data_ptr(),
                rows=count,
                columns=columns,
                tiles=tiles,
                parts=low.shape[1],
                ranks=ranks,
                first=first,
                modules=len(self.sizes),
                all_modules=rows.modules,
                ends=(ctypes.c_int * MAX_MODULES)(*ends),
                add=add,
                cluster_tiles=spread.cluster_tiles(tiles),
                rounds=spread.rounds(tiles),
                low_ranks=spread.rank_segment * len(self.sizes),
                stride=spread.stride(tiles),
                table_at=places.table,
                x_at=places.x,
                sums_at=places.sums,
                added_at=places.added,
                entries_at=places.entries,
                in_place=spread.in_place,
            )
            _product_kernel(replace(spread, cluster=1, rank_segment=RANK_SEGMENTS[-1], in_place=False))(
                spread.grid(tiles),
                32 * (spread.warps + spread.side),
                group,
                shared=places.end,
                cluster=spread.cluster,
                dependent=True,
            )
            at += count

    def dense(self, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """The weights (outputs of all modules, in) as bitsandbytes dequantizes them; bf16 ones themselves."""
        if self.scales is None:
            return self.weights.to(dtype)
        out = torch.empty(sum(self.sizes), self.columns, dtype=dtype, device=self.weights.device)
        if self.bits == 8:
            # Scaled in fp32 and rounded once.
            return torch.mul(self.weights, (self.scales * (1 / 127)).unsqueeze(1), out=out)
        if dtype != torch.bfloat16:
            return self.dense().to(dtype)
        dequantize(self.weights, self.scales, out)
        return out

    def matmul(self, x: Tensor) -> Tensor:
        """W x for many rows, by the library, some outputs at once: bf16 (rows, in) to (rows, all modules' outputs)."""
        if self.bits == 16:
            return F.linear(x, self.weights)
        y = torch.empty(len(x), sum(self.sizes), dtype=x.dtype, device=x.device)
        parts = [*self.parts()]
        for part, to in zip(parts, y.split([part.sizes[0] for part in parts], 1), strict=True):
            torch.mm(x, part.dense().T, out=to)
        return y


def product_reference(
    weight: Tensor,
    x: Tensor,
    y: Tensor,
    low: Tensor,
    rows: PlainRows,
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
                value = value + entry.B.float() @ low[row, :, module, : len(entry.A)].sum(0)
                value = value if entry.bias is None else value + entry.bias.float()
            if bias is not None:
                value = value + bias[at].float()
            y[row, at] = (value + y[row, at].float() if add else value).to(y.dtype)


def dequantize(tiles: Tensor, scales: Tensor, out: Tensor) -> None:
    """The weight (out, in) in bf16, as bitsandbytes dequantizes it: code times scale in fp32, rounded once."""
    units = tiles.shape[0] * tiles.shape[1]
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (tiles, scales, out)]
    _dequantize_kernel()(-(-units // 8), 256, *pointers, ctypes.c_int(out.shape[1]), ctypes.c_longlong(units))
