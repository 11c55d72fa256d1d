"""The product of many rows with an NF4 weight, which is dequantized by tile on its way to the tensor cores: no memory
holds it in bf16."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping
from functools import cache, lru_cache
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from lorarep_runtime.kernels.hopper.launch_config import clusters_at_once
from lorarep_runtime.kernels.hopper.nf4 import CHUNK

if TYPE_CHECKING:
    from lorarep_runtime.kernels.hopper.nvrtc import Kernel

SOURCE = Path(__file__).with_suffix(".cu")
BLOCKS = (64, 128, 256)
"""Rows of x that a CTA may have."""
SPLITS = (1, 2, 4)
"""CTAs of a cluster, each with its own columns."""
TILES = 8
"""Of a weight, that a CTA has."""
THREADS = 32 * TILES
BLOCK_COST = 192
"""Of making numbers of a weight, in rows of a block."""
START_COST = 3000
"""Of beginning and finishing, in rows of a block times chunks."""
SPLIT_COST = 900
"""Likewise of summing what a cluster has."""
MAPS = 4096
"""Tensors that TMA knows; there are few that come again and again."""


class _Product(ctypes.Structure):
    """`Product` of the source."""

    _fields_: ClassVar[Any] = [
        *((name, ctypes.c_void_p) for name in ("weights", "scales", "y")),
        *((name, ctypes.c_int) for name in ("rows", "tiles", "chunks", "stride")),
    ]


class _TensorMap(ctypes.Structure):
    _fields_: ClassVar[Any] = [("opaque", ctypes.c_char * 128)]


def sources() -> Iterator[tuple[Path, Mapping[str, int]]]:
    """What is compiled: file, defines."""
    for rows in BLOCKS:
        for bits in (16, 32):
            yield SOURCE, _defines(rows, bits)


def matmul(tiles: Tensor, scales: Tensor, x: Tensor, y: Tensor) -> None:
    """y = x Wᵀ, with numbers of W rounded to bf16 and sums in fp32.

    Args:
        tiles, scales: W (out, in) as `nf4.arrange` lays it out.
        x: bf16 (rows, in).
        y: bf16 or fp32 (rows, out).
        Of both, rows may be at any distance that is a multiple of 16 bytes.
    """
    rows, columns = x.shape
    count = len(tiles)
    block, split = _spread(rows, count, columns // CHUNK)
    arguments = _Product(
        weights=tiles.data_ptr(),
        scales=scales.data_ptr(),
        y=y.data_ptr(),
        rows=rows,
        tiles=count,
        chunks=columns // CHUNK,
        stride=y.stride(0),
    )
    _kernel(block, 8 * y.itemsize)(
        _clusters(rows, count, block) * split,
        THREADS,
        _tensor_map(x.data_ptr(), rows, columns, x.stride(0), block),
        arguments,
        shared=_shared(block),
        cluster=split,
        dependent=True,
    )


def load() -> None:
    """Has the device load all kernels, for which it stands still."""
    for block in BLOCKS:
        for bits in (16, 32):
            _kernel(block, bits)


def _defines(block: int, bits: int) -> Mapping[str, int]:
    return {"ROWS": block, "OUT": bits}


@cache
def _kernel(block: int, bits: int) -> Kernel:
    from lorarep_runtime.kernels.hopper.nvrtc import Kernel

    return Kernel(SOURCE, "nf4_matmul", _defines(block, bits))


def _shared(block: int) -> int:
    """Bytes of a CTA: as in the source, all but what the device takes for itself."""
    stages, stage = 64 << 10, block * CHUNK * 2
    return stages + ((228 << 10) - stages) // stage * stage - (1 << 10)


def _clusters(rows: int, tiles: int, block: int) -> int:
    return -(-rows // block) * -(-tiles // TILES)


@cache
def _spread(rows: int, tiles: int, chunks: int) -> tuple[int, int]:
    """Rows of a cluster, and its CTAs, with which the device is done soonest."""

    def cost(launch: tuple[int, int]) -> int:
        block, split = launch
        waves = -(-_clusters(rows, tiles, block) // clusters_at_once(split))
        return waves * (-(-chunks // split) * (block + BLOCK_COST) + START_COST + (split > 1) * SPLIT_COST)

    return min(product(BLOCKS, SPLITS), key=cost)


@lru_cache(MAPS)
def _tensor_map(address: int, rows: int, columns: int, stride: int, block: int) -> _TensorMap:
    """How TMA finds blocks of a bf16 matrix, for 128-byte swizzle; zeros behind its last row."""
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
