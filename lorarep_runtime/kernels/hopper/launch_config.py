"""Launch configs of the decode GEMM on a Hopper device: clusters of CTAs, and the layout of their shared memory.

A tile is 16 outputs of the weight, a chunk 64 columns. A round is the tiles that a cluster of CTAs takes at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import torch

from lorarep_runtime.integers import ceil_div, round_up
from lorarep_runtime.kernels.gemms import HOPPER
from lorarep_runtime.kernels.hopper.nf4 import CHUNK, TILE, dequantize_kernel

ALIKE_ROWS, ALIKE_RANKS = 32, 64
"""Rows and ranks whose clusters all deterministic launches have."""
RANK_BLOCKS = (16, 32, 64)
"""Choices of the ranks of a module that are in shared memory at a time: multiples of 16, the K of tensor cores."""
MOST_CLUSTER = 8
"""Number of CTAs in the largest portable cluster."""
SHARED_BYTES = 227 << 10
"""Most bytes of shared memory of a CTA (CUDA C++ Programming Guide, compute capability 9.0)."""
CTA_BYTES = 1024
"""Bytes of shared memory that the device reserves for each CTA."""
L1_BYTES = 256 << 10
"""Bytes of the L1 cache and the shared memory of a multiprocessor together."""
CARVEOUTS = [size << 10 for size in (0, 8, 16, 32, 64, 100, 132, 164, 196, 228)]
"""Sizes in bytes that shared memory may have within L1_BYTES (CUDA C++ Programming Guide, compute capability 9.0)."""
RESERVED_BYTES = 1 << 10
"""Bytes at the beginning of shared memory's addresses that the device reserves."""
TABLE_BYTES = 256 * 128
"""Size and alignment in bytes of NF4's table of pairs: 32 lanes' copies of 256 words."""
BARRIER_BYTES = 32
"""Bytes of the barriers and the task counter, which precede the entries in shared memory."""
ENTRY_BYTES = 32
"""Bytes of an `Entry` of `decode_gemm_arguments.cuh`."""

STEP_COST = 14
"""Cost of a chunk that does not depend on a CTA's number of tiles, in tiles."""
ROUND_COST = 100
"""Cost of beginning and finishing a round, in tiles times chunks."""
RANK_BLOCK_COST = 20
"""Cost of the adapters' part of one block of ranks, in tiles times chunks."""
BARRIER_COST = 40
"""Cost of the cluster's barrier before sums replace x, in tiles times chunks."""
STARVED = 1.2
"""Factor of the time of a launch whose pending loads exceed twice the L1 cache."""


@dataclass(frozen=True)
class LaunchConfig:
    """The shape of one launch of the decode GEMM. Each multiprocessor runs one CTA."""

    bits: int
    """Bits of a number of the weight: 4, 8 or 16."""
    eights: int
    """Capacity of a launch in rows of x, divided by 8."""
    tiles: int
    """Tiles that a warp takes in a round."""
    depth: int
    """Chunks of each tile that a warp loads ahead, into registers."""
    warps: int
    """Warps of a CTA that multiply W by x."""
    wgmma: bool = False
    """Whether four warps multiply together by wgmma, one tile each, rather than each warp alone by mma."""
    cluster: int = 1
    """CTAs of a cluster, which split the columns of the weight."""
    rank_block: int = RANK_BLOCKS[-1]
    """Ranks of each module whose shrunk x is in shared memory at a time. Clusters with fewer modules hold more."""
    in_place: bool = False
    """Whether the CTAs' sums replace x in shared memory. Only launches of a single round can do so."""

    @property
    def side(self) -> int:
        """Side warps of a CTA: they compute the adapters' part while the others multiply W by x."""
        return 8 if self.wgmma else 4

    @property
    def unit(self) -> int:
        """Tiles that are multiplied together or not at all: those of a warp, or of four warps with wgmma."""
        return 4 if self.wgmma else self.tiles

    def cluster_tiles(self, tiles: int) -> int:
        """Most tiles of a cluster for a weight of so many tiles, if all clusters run at once."""
        return ceil_div(ceil_div(tiles, self.unit), clusters_at_once(self.cluster)) * self.unit

    def rounds(self, tiles: int) -> int:
        """Rounds in which a cluster takes its share of a weight's tiles."""
        return ceil_div(self.cluster_tiles(tiles), self.warps * self.tiles)

    def round_tiles(self, tiles: int) -> int:
        """Tiles of a cluster's first round, which is the largest, for a weight of so many tiles."""
        return ceil_div(ceil_div(self.cluster_tiles(tiles), self.unit), self.rounds(tiles)) * self.unit

    def grid(self, tiles: int) -> int:
        """Number of CTAs of a launch for a weight of so many tiles."""
        return ceil_div(tiles, self.cluster_tiles(tiles)) * self.cluster

    def stride(self, tiles: int) -> int:
        """Stride in fp32 numbers of the rows of sums in shared memory.

        It is four times an odd number, so that the sums of a warp are in different banks.
        """
        share = round_up(ceil_div(self.round_tiles(tiles) * TILE, self.cluster), 8)
        return share + 4

    def cost(self, tiles: int, chunks: int, ranks: int, shared: int) -> float:
        """Estimated time of a launch; the unit is the time to multiply one chunk of one tile.

        Args:
            tiles, chunks: of the weight.
            ranks: capacity of shrunk x for each module.
            shared: bytes of a CTA's shared memory.
        """
        rounds, rank_blocks = self.rounds(tiles), ceil_div(ranks, self.rank_block)
        work = (self.cluster_tiles(tiles) + rounds * STEP_COST) * chunks / self.cluster
        # Loads pass through the L1 cache, which has the bytes that shared memory leaves.
        pending = self.warps * self.tiles * self.depth * TILE * CHUNK * self.bits // 8
        if pending > 2 * (L1_BYTES - min(size for size in CARVEOUTS if size >= shared + CTA_BYTES)):
            work *= STARVED
        return work + rounds * ROUND_COST + rank_blocks * RANK_BLOCK_COST + self.in_place * BARRIER_COST


class Places(NamedTuple):
    """Offsets in bytes of the regions of a CTA's shared memory; `end` is the size of all of them."""

    table: int
    x: int
    added: int
    entries: int
    sums: int
    end: int


@cache
def places_for(launch: LaunchConfig, tiles: int, columns: int, rows: int, modules: int) -> Places:
    """The smallest layout of a CTA's shared memory for a weight of so many tiles and columns, and rows of x."""
    added = 4 * 8 * launch.eights * launch.stride(tiles)
    sums = added * launch.cluster
    sizes = {
        "x": max(2 * 8 * launch.eights * ceil_div(columns // CHUNK, launch.cluster) * CHUNK, launch.in_place * sums),
        "added": added,
        "entries": BARRIER_BYTES + round_up(rows * modules * (ENTRY_BYTES + 4 * launch.rank_block), 16),
        "sums": 0 if launch.in_place else sums,
    }
    tables = range(TABLE_BYTES, SHARED_BYTES, TABLE_BYTES) if launch.bits == 4 else [0]
    places = min((_places(sizes, at) for at in tables), key=lambda places: places.end)
    return places._replace(sums=places.x) if launch.in_place else places


def _places(sizes: Mapping[str, int], table: int) -> Places:
    """The layout with NF4's table at a shared-memory address, 0 for none. Regions that fit precede the table."""
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
"""The fastest launch configs measured on an H100, by bits and by rows divided by 8. More rows take several launches."""

CLUSTERS = (132, 66, 39, 30, 22, 17, 15, 15)
"""Clusters of 1, 2, ..., 8 CTAs that an H100 runs at once, one CTA to a multiprocessor.

`clusters_at_once` returns these numbers where no Hopper device is present.
"""


@cache
def clusters_at_once(size: int) -> int:
    """Number of clusters of `size` CTAs that the device runs at once, one CTA to a multiprocessor.

    Multiprocessors form groups of different sizes. A cluster stays in one group.
    """
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != HOPPER:
        return CLUSTERS[size - 1]
    return dequantize_kernel().clusters_at_once(size, 128, SHARED_BYTES - CTA_BYTES)


@cache
def launch_config_for(
    bits: int, tiles: int, columns: int, rows: int, modules: int, ranks: int, *, deterministic: bool = False
) -> LaunchConfig:
    """The launch config of the least estimated time, with as many rows of x as fit into shared memory.

    Args:
        bits: of a number of the weight: 4, 8 or 16.
        tiles, columns: of the weight.
        rows: of x.
        modules: packed modules of the weight.
        ranks: capacity of shrunk x for each module.
        deterministic: a row's results are bitwise the same for any number of rows. Only the split of the columns over a
            cluster decides: mma and wgmma round alike.

    Raises:
        ValueError: shared memory has no room for x.
    """
    clusters: Sequence[int] = range(1, MOST_CLUSTER + 1)
    if deterministic:
        clusters = [launch_config_for(bits, tiles, columns, ALIKE_ROWS, modules, ALIKE_RANKS).cluster]
    by_eights = LAUNCH_CONFIGS[bits]
    rank_blocks = [block for block in RANK_BLOCKS if block < 2 * ranks] or RANK_BLOCKS[:1]

    for eights in (eights for eights in sorted(by_eights, reverse=True) if eights == 1 or 4 * eights < rows):
        launches = [
            replace(by_eights[eights], cluster=cluster, rank_block=block, in_place=in_place)
            for cluster in clusters
            for block in rank_blocks
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
    raise ValueError(f"no launch config for {columns} columns")
