"""The prefill GEMM: many rows times an NF4 weight, dequantized tile by tile in registers and never in memory."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping
from functools import cache, lru_cache
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from lorarep_runtime.integers import ceil_div
from lorarep_runtime.kernels.hopper.launch_config import clusters_at_once
from lorarep_runtime.kernels.hopper.nf4 import CHUNK

if TYPE_CHECKING:
    from lorarep_runtime.kernels.hopper.nvrtc import Kernel

SOURCE = Path(__file__).with_suffix(".cu")
ROW_BLOCKS = (64, 128, 256)
"""Rows of x that a cluster may have."""
CLUSTERS = (1, 2, 4)
"""CTAs that a cluster may have, each with its own columns."""
TILES = 8
"""Tiles of a weight that a cluster has: one for each warp."""
THREADS = 32 * TILES
TILE_COST = 192
"""Cost of dequantizing a chunk of each tile, in rows of x."""
START_COST = 3000
"""Cost of beginning and finishing, in rows of x times chunks."""
SUM_COST = 900
"""Cost of a cluster's summing, in rows of x times chunks."""
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


def sources() -> Iterator[tuple[Path, Mapping[str, int]]]:
    """All that is compiled: files and their macros."""
    for block in ROW_BLOCKS:
        for bits in (16, 32):
            yield SOURCE, _defines(block, bits)


def matmul(tiles: Tensor, scales: Tensor, x: Tensor, y: Tensor) -> None:
    """y = x Wᵀ, with numbers of W rounded to bf16 and sums in fp32.

    Args:
        tiles, scales: W (out, in) as `nf4.arrange` lays it out.
        x: bf16 (rows, in). The stride of its rows is a multiple of 16 bytes.
        y: bf16 or fp32 (rows, out), written. The stride of its rows is a multiple of 16 bytes.
    """
    rows, columns = x.shape
    count = len(tiles)
    block, cluster = _launch_config(rows, count, columns // CHUNK)
    arguments = _GemmArguments(
        weights=tiles.data_ptr(),
        scales=scales.data_ptr(),
        y=y.data_ptr(),
        rows=rows,
        tiles=count,
        chunks=columns // CHUNK,
        stride=y.stride(0),
    )
    _kernel(block, 8 * y.itemsize)(
        _clusters(rows, count, block) * cluster,
        THREADS,
        _tensor_map(x.data_ptr(), rows, columns, x.stride(0), block),
        arguments,
        shared=_shared(block),
        cluster=cluster,
        dependent=True,
    )


def load() -> None:
    """Has the device load all kernels, which stops it for a while."""
    for block in ROW_BLOCKS:
        for bits in (16, 32):
            _kernel(block, bits)


def _defines(block: int, bits: int) -> Mapping[str, int]:
    return {"ROWS": block, "OUT": bits}


@cache
def _kernel(block: int, bits: int) -> Kernel:
    from lorarep_runtime.kernels.hopper.nvrtc import Kernel

    return Kernel(SOURCE, "prefill_gemm", _defines(block, bits))


def _shared(block: int) -> int:
    """Shared memory of a CTA in bytes, as in the source: all but what the device reserves."""
    stages, stage = 64 << 10, block * CHUNK * 2
    return stages + ((228 << 10) - stages) // stage * stage - (1 << 10)


def _clusters(rows: int, tiles: int, block: int) -> int:
    return ceil_div(rows, block) * ceil_div(tiles, TILES)


@cache
def _launch_config(rows: int, tiles: int, chunks: int) -> tuple[int, int]:
    """The rows and the CTAs of a cluster with the least estimated time."""

    def cost(launch: tuple[int, int]) -> int:
        block, cluster = launch
        waves = ceil_div(_clusters(rows, tiles, block), clusters_at_once(cluster))
        return waves * (ceil_div(chunks, cluster) * (block + TILE_COST) + START_COST + (cluster > 1) * SUM_COST)

    return min(product(ROW_BLOCKS, CLUSTERS), key=cost)


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
