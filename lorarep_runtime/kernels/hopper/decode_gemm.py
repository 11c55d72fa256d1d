"""The decode GEMM: few rows times a weight that all of them share, with each row's own adapter in the epilogue.

A number of a weight takes 4, 8 or 16 bits. `nf4.arrange` and `int8.arrange` make the tiles that the kernel reads; bf16
weights stay in torch's order.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from lorarep_runtime.kernels.entry_table import MAX_MODULES, DecodeRows, ReferenceRows
from lorarep_runtime.kernels.hopper.launch_config import (
    BARRIER_BYTES,
    ENTRY_BYTES,
    LAUNCH_CONFIGS,
    RANK_BLOCKS,
    LaunchConfig,
    launch_config_for,
    places_for,
)
from lorarep_runtime.kernels.hopper.nf4 import TILE

if TYPE_CHECKING:
    from lorarep_runtime.kernels.hopper.nvrtc import Kernel

SOURCE = Path(__file__).with_suffix(".cu")


class GemmArguments(ctypes.Structure):
    """`GemmArguments` of `decode_gemm_arguments.cuh`, field by field."""

    _fields_: ClassVar[Any] = [
        *((name, ctypes.c_void_p) for name in ("weights", "scales", "x", "y")),
        *((name, ctypes.c_void_p) for name in ("base_bias", "shrunk", "positions", "adapters")),
        *((name, ctypes.c_int) for name in ("rows", "columns", "tiles", "parts")),
        *((name, ctypes.c_int) for name in ("ranks", "first", "modules", "all_modules")),
        ("ends", ctypes.c_int * MAX_MODULES),
        *((name, ctypes.c_int) for name in ("add", "cluster_tiles", "rounds", "shrunk_ranks", "stride")),
        *((name, ctypes.c_int) for name in ("table_at", "x_at", "sums_at", "added_at", "entries_at", "in_place")),
    ]


def defines(launch: LaunchConfig) -> Mapping[str, int]:
    """The macros that the source is compiled with for a launch config."""
    named = {"KIND": launch.bits, "EIGHTS": launch.eights, "TILES": launch.tiles, "DEPTH": launch.depth}
    named |= {"WARPS": launch.warps, "SIDE": launch.side, "WGMMA": int(launch.wgmma)}
    return named | {
        "ARGUMENT_BYTES": ctypes.sizeof(GemmArguments),
        "ENTRY_BYTES": ENTRY_BYTES,
        "BARRIER_BYTES": BARRIER_BYTES,
    }


def sources(bits: int) -> Iterator[tuple[Path, Mapping[str, int]]]:
    """All that is compiled for weights of so many bits a number: files and their macros."""
    for launch in LAUNCH_CONFIGS[bits].values():
        yield SOURCE, defines(launch)


@cache
def _kernel(launch: LaunchConfig) -> Kernel:
    from lorarep_runtime.kernels.hopper.nvrtc import Kernel

    return Kernel(SOURCE, "decode_gemm", defines(launch))


def decode_gemm(
    bits: int,
    weights: Tensor,
    scales: Tensor | None,
    sizes: Sequence[int],
    x: Tensor,
    y: Tensor,
    shrunk: Tensor,
    rows: DecodeRows,
    first: int,
    *,
    bias: Tensor | None = None,
    add: bool = False,
    deterministic: bool = False,
) -> None:
    """Launches the kernel for `PackedWeight.decode`, with its fields and arguments: several times for many rows."""
    tiles, modules, ranks = sum(sizes) // TILE, len(sizes), shrunk.shape[3]
    at = 0
    while at < len(x):
        left = len(x) - at
        launch = launch_config_for(bits, tiles, x.shape[1], left, modules, ranks, deterministic=deterministic)
        count = min(left, 8 * launch.eights)
        places = places_for(launch, tiles, x.shape[1], count, modules)
        arguments = GemmArguments(
            weights=weights.data_ptr(),
            scales=None if scales is None else scales.data_ptr(),
            x=x[at:].data_ptr(),
            y=y[at:].data_ptr(),
            base_bias=None if bias is None else bias.data_ptr(),
            shrunk=shrunk[at:].data_ptr(),
            positions=rows.positions[at:].data_ptr(),
            adapters=rows.adapters[at:].data_ptr(),
            rows=count,
            columns=x.shape[1],
            tiles=tiles,
            parts=shrunk.shape[1],
            ranks=ranks,
            first=first,
            modules=modules,
            all_modules=rows.modules,
            ends=_ends(sizes),
            add=add,
            cluster_tiles=launch.cluster_tiles(tiles),
            rounds=launch.rounds(tiles),
            shrunk_ranks=launch.rank_block * modules,
            stride=launch.stride(tiles),
            table_at=places.table,
            x_at=places.x,
            sums_at=places.sums,
            added_at=places.added,
            entries_at=places.entries,
            in_place=launch.in_place,
        )
        _kernel(replace(launch, cluster=1, rank_block=RANK_BLOCKS[-1], in_place=False))(
            launch.grid(tiles),
            32 * (launch.warps + launch.side),
            arguments,
            shared=places.end,
            cluster=launch.cluster,
            dependent=True,
        )
        at += count


def _ends(sizes: Sequence[int]) -> ctypes.Array[ctypes.c_int]:
    """Outputs up to and with each module; modules that there are not end where the last one does."""
    ends = [*accumulate(sizes), *[sum(sizes)] * MAX_MODULES][:MAX_MODULES]
    return (ctypes.c_int * MAX_MODULES)(*ends)


def decode_gemm_reference(
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
    """The decode GEMM in torch, from a dense weight.

    Args:
        weight: (outputs of all modules, in).
        rows: of x, y and shrunk, with adapters in host memory.
        sizes: outputs of each module.
        x, y, shrunk, first, bias, add: as for `PackedWeight.decode`.
    """
    plain = (x.float() @ weight.float().T).to(torch.float32)
    for row, _ in rows.active():
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
