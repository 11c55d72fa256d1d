"""Launch configs of the portable GEMM: tiles of outputs and rows, and parts of the columns."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch

from lorarep_runtime.integers import ceil_div
from lorarep_runtime.kernels.portable.nf4 import CHUNK

MOST_ROWS = 256
"""Most rows of a launch. More are faster through a library, which multiplies by the dequantized weight."""
STEP = {4: CHUNK, 8: 128, 16: 64}
"""Columns that a program multiplies at a time, by the bits of a weight's numbers."""
PROGRAMS = 4
"""Programs for each multiprocessor that keep a device busy: columns are split where tiles are fewer."""
LEAST_STEPS = 4
"""Least steps of a program, so that its first loads are few of all."""
MULTIPROCESSORS = 108
"""Of an A100; assumed where there is no GPU."""


class LaunchConfig(NamedTuple):
    """The shape of a program of the portable GEMM."""

    outputs: int
    """Outputs of a tile, a multiple of 16."""
    rows: int
    """Rows of a tile, a multiple of 16."""
    warps: int
    stages: int
    """Steps that are in flight: loaded or multiplied."""


LAUNCH_CONFIGS = {
    4: {16: LaunchConfig(64, 16, 4, 5), 32: LaunchConfig(64, 32, 4, 4), 64: LaunchConfig(128, 64, 8, 4)},
    8: {16: LaunchConfig(64, 16, 4, 5), 32: LaunchConfig(64, 32, 4, 4), 64: LaunchConfig(128, 64, 8, 3)},
    16: {16: LaunchConfig(64, 16, 4, 5), 32: LaunchConfig(64, 32, 4, 4), 64: LaunchConfig(128, 64, 8, 4)},
}
"""By bits and by rows. More rows take several tiles. Each fits the 99 KiB of shared memory of a CTA that the smallest
of the devices have (compute capabilities 8.6, 8.9 and 12.0)."""


class Launch(NamedTuple):
    """A launch for a weight and some rows."""

    config: LaunchConfig
    row_tiles: int
    output_tiles: int
    parts: int
    """Parts of the columns, each of them a program's."""
    steps: int
    """Steps of a part; the last part may have fewer."""


@cache
def launch_for(bits: int, outputs: int, columns: int, rows: int) -> Launch:
    """The launch for a weight (outputs, columns) and rows of x."""
    kinds = LAUNCH_CONFIGS[bits]
    config = kinds[min((kind for kind in kinds if kind >= rows), default=max(kinds))]
    return launch_of(config, PROGRAMS * multiprocessors(), bits, outputs, columns, rows)


def launch_of(config: LaunchConfig, programs: int, bits: int, outputs: int, columns: int, rows: int) -> Launch:
    """The launch of a config with so many programs, if columns have parts enough."""
    row_tiles, output_tiles = ceil_div(rows, config.rows), ceil_div(outputs, config.outputs)
    steps = ceil_div(columns, STEP[bits])
    parts = max(1, min(programs // (row_tiles * output_tiles), steps // LEAST_STEPS))
    steps_of_part = ceil_div(steps, parts)
    return Launch(config, row_tiles, output_tiles, ceil_div(steps, steps_of_part), steps_of_part)


@cache
def multiprocessors() -> int:
    """Multiprocessors of the device."""
    if not torch.cuda.is_available():
        return MULTIPROCESSORS
    return torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count
