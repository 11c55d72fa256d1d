"""How `product.cu` is spread over a Hopper device: in clusters of how many CTAs, and what is where in their memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import torch

from lorarep_runtime.kernels.hopper.nf4 import CHUNK, TILE, dequantize_kernel

HOPPER = 9
"""Compute capability that the source is for: later ones have no wgmma."""
RANK_SEGMENTS = (16, 32, 64)
"""Multiples of what tensor cores multiply with at once."""
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


@dataclass(frozen=True)
class LaunchConfig:
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
    """Ranks of each module whose shrunk is in shared memory at a time; more where a cluster has outputs of fewer."""
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


class Places(NamedTuple):
    """Bytes from the beginning of a CTA's shared memory."""

    table: int
    x: int
    added: int
    entries: int
    sums: int
    end: int


@cache
def places_for(launch: LaunchConfig, tiles: int, columns: int, rows: int, modules: int) -> Places:
    """Shared memory of a CTA."""
    added = 4 * 8 * launch.eights * launch.stride(tiles)
    sums = added * launch.cluster
    sizes = {
        "x": max(2 * 8 * launch.eights * -(-(columns // CHUNK) // launch.cluster) * CHUNK, launch.in_place * sums),
        "added": added,
        "entries": BARRIER_BYTES + -(-rows * modules * (ENTRY_BYTES + 4 * launch.rank_segment) // 16) * 16,
        "sums": 0 if launch.in_place else sums,
    }
    tables = range(TABLE_BYTES, SHARED_BYTES, TABLE_BYTES) if launch.bits == 4 else [0]
    places = min((_places(sizes, at) for at in tables), key=lambda places: places.end)
    return places._replace(sums=places.x) if launch.in_place else places


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


LAUNCH_CONFIGS = {
    4: {
        1: LaunchConfig(4, 1, 2, 4, 12),
        2: LaunchConfig(4, 2, 1, 4, 16, wgmma=True),
        4: LaunchConfig(4, 4, 1, 2, 16, wgmma=True),
    },
    8: {1: LaunchConfig(8, 1, 2, 4, 12), 2: LaunchConfig(8, 2, 2, 4, 12), 4: LaunchConfig(8, 4, 1, 4, 16, wgmma=True)},
    16: {1: LaunchConfig(16, 1, 2, 3, 12), 2: LaunchConfig(16, 2, 2, 2, 12), 4: LaunchConfig(16, 4, 2, 2, 8)},
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
    return dequantize_kernel().clusters_at_once(size, 128, SHARED_BYTES - CTA_BYTES)


@cache
def launch_config_for(bits: int, tiles: int, columns: int, rows: int, modules: int, ranks: int) -> LaunchConfig:
    """The spread for a product, with as many of the rows at a time as x and sums leave shared memory for.

    Raises:
        ValueError: there is none.
    """
    by_eights = LAUNCH_CONFIGS[bits]
    segments = [segment for segment in RANK_SEGMENTS if segment < 2 * ranks] or RANK_SEGMENTS[:1]

    for eights in (eights for eights in sorted(by_eights, reverse=True) if eights == 1 or 4 * eights < rows):
        launches = [
            replace(by_eights[eights], cluster=cluster, rank_segment=segment, in_place=in_place)
            for cluster in range(1, MOST_CLUSTER + 1)
            for segment in segments
            for in_place in (False, True)
        ]
        taken = min(rows, 8 * eights)
        costs = {
            one: one.cost(tiles, columns // CHUNK, ranks, shared)
            for one in launches
            if (shared := places_for(one, tiles, columns, taken, modules).end) <= SHARED_BYTES - CTA_BYTES
            and not (one.in_place and one.rounds(tiles) > 1)
        }
        if costs:
            return min(costs, key=costs.__getitem__)
    raise ValueError(f"no spread for {columns} columns")
