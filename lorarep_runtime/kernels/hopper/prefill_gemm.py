"""The prefill GEMM: many rows times an NF4 weight, dequantized tile by tile in registers and never in memory."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping
from functools import cache, lru_cache
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from torch import Tensor

from lorarep_runtime.integers import ceil_div, round_up
from lorarep_runtime.kernels.hopper.launch_config import clusters_at_once
from lorarep_runtime.kernels.hopper.nf4 import CHUNK

if TYPE_CHECKING:
    from lorarep_runtime.kernels.hopper.nvrtc import Kernel

SOURCE = Path(__file__).with_suffix(".cu")
CHUNK_COST = {(64, 16): 460, (128, 8): 380, (128, 16): 690, (256, 8): 590}
"""Nanoseconds that a CTA takes for a chunk, by the rows of x of a cluster and the warps of its CTAs.

They were measured on an H200. Registers limit the product of both. With few rows, looking up takes longest: 16 warps
hide more of each other's look-ups than 8.
"""
CLUSTERS = range(1, 9)
"""CTAs that a cluster may have, each with its own columns."""
START_COST = 4000
"""Nanoseconds of beginning and finishing a CTA."""
SUM_COST, SUM_TILE_COST = 1000, 2
"""Nanoseconds of a cluster's summing, and of that for each row of each tile."""
FETCHING_WARPS = 4
"""Warps of a CTA behind those that multiply."""
MAPS = 4096
"""Tensor maps that are kept. Few different ones recur."""


class _GemmArguments(ctypes.Structure):
    """`GemmArguments` of the source, field by field."""

    _fields_: ClassVar[Any] = [
        *((name, ctypes.c_void_p) for name in ("weights", "scales", "y")),
        *((name, ctypes.c_int) for name in ("rows", "tiles", "chunks", "stride")),
    ]


class _TensorMap(ctypes.Structure):
    _fields_: ClassVar[Any] = [("opaque", ctypes.c_char * 128)]


class PrefillConfig(NamedTuple):
    """The shape of one launch of the prefill GEMM. Each multiprocessor runs one CTA."""

    rows: int
    """Rows of x of a cluster."""
    warps: int
    """Warps of a CTA, each with a tile."""
    cluster: int
    """CTAs of a cluster, which split the columns of the weight."""

    @property
    def shared(self) -> int:
        """Shared memory of a CTA in bytes, as in the source: all but what the device reserves."""
        return (64 << 10) + self._stages * self.rows * CHUNK * 2 - (1 << 10)

    @property
    def _stages(self) -> int:
        return ((228 - 64) << 10) // (self.rows * CHUNK * 2)

    @property
    def is_possible(self) -> bool:
        """Whether a CTA's shared memory, in the place of x, holds the sums that the cluster's CTAs send it."""
        eights = round_up(ceil_div(self.rows // 8, self.cluster), 2)
        return self.cluster == 1 or self.cluster * self.warps * eights * 512 <= self._stages * self.rows * CHUNK * 2

    def clusters(self, rows: int, tiles: int) -> int:
        """Clusters of a launch for so many rows of x and tiles of the weight."""
        return ceil_div(rows, self.rows) * ceil_div(tiles, self.warps)

    def cost(self, rows: int, tiles: int, chunks: int) -> int:
        """Estimated nanoseconds of a launch."""
        waves = ceil_div(self.clusters(rows, tiles), clusters_at_once(self.cluster))
        chunk = CHUNK_COST[self.rows, self.warps] * ceil_div(chunks, self.cluster)
        return waves * (chunk + START_COST + (self.cluster > 1) * (SUM_COST + SUM_TILE_COST * self.rows * self.warps))


CONFIGS = [
    config
    for (rows, warps), cluster in product(CHUNK_COST, CLUSTERS)
    if (config := PrefillConfig(rows, warps, cluster)).is_possible
]


def sources() -> Iterator[tuple[Path, Mapping[str, int]]]:
    """All that is compiled: files and their macros."""
    for (rows, warps), bits in product(CHUNK_COST, (16, 32)):
        yield SOURCE, _defines(rows, warps, bits)


def matmul(tiles: Tensor, scales: Tensor, x: Tensor, y: Tensor) -> None:
    """y = x Wᵀ, with numbers of W rounded to bf16 and sums in fp32.

    Args:
        tiles, scales: W (out, in) as `nf4.arrange` lays it out.
        x: bf16 (rows, in). The stride of its rows is a multiple of 16 bytes.
        y: bf16 or fp32 (rows, out), written. The stride of its rows is a multiple of 16 bytes.
    """
    rows, columns = x.shape
    count = len(tiles)
    launch = _launch_config(rows, count, columns // CHUNK)
    arguments = _GemmArguments(
        weights=tiles.data_ptr(),
        scales=scales.data_ptr(),
        y=y.data_ptr(),
        rows=rows,
        tiles=count,
        chunks=columns // CHUNK,
        stride=y.stride(0),
    )
    _kernel(launch.rows, launch.warps, 8 * y.itemsize)(
        launch.clusters(rows, count) * launch.cluster,
        32 * (launch.warps + FETCHING_WARPS),
        _tensor_map(x.data_ptr(), rows, columns, x.stride(0), launch.rows),
        arguments,
        shared=launch.shared,
        cluster=launch.cluster,
        dependent=True,
    )


def load() -> None:
    """Has the device load all kernels, which stops it for a while."""
    for (rows, warps), bits in product(CHUNK_COST, (16, 32)):
        _kernel(rows, warps, bits)


def _defines(rows: int, warps: int, bits: int) -> Mapping[str, int]:
    return {"ROWS": rows, "WARPS": warps, "OUT": bits}


@cache
def _kernel(rows: int, warps: int, bits: int) -> Kernel:
    from lorarep_runtime.kernels.hopper.nvrtc import Kernel

    return Kernel(SOURCE, "prefill_gemm", _defines(rows, warps, bits))


@cache
def _launch_config(rows: int, tiles: int, chunks: int) -> PrefillConfig:
    """The launch config with the least estimated time."""
    return min(CONFIGS, key=lambda config: config.cost(rows, tiles, chunks))


@lru_cache(MAPS)
def _tensor_map(address: int, rows: int, columns: int, stride: int, block: int) -> _TensorMap:
    """TMA's description of a bf16 matrix in row blocks, with 128-byte swizzle and zeros behind the last row."""
    from cuda.bindings import driver

    from lorarep_runtime.kernels.hopper.nvrtc import checked

    long, short = driver.cuuint64_t, driver.cuuint32_t
    made = checked(
        driver.cuTensorMapEncodeTiled(
            driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            2,
            address,
            [long(columns), long(rows)],
            [long(stride * 2)],
            [short(CHUNK), short(block)],
            [short(1), short(1)],
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )
    return _TensorMap.from_buffer_copy(ctypes.string_at(made.getPtr(), ctypes.sizeof(_TensorMap)))
