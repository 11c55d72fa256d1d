"""The fields of `entry_table`'s entries for Triton kernels, which may use no constants but `tl.constexpr`."""

from __future__ import annotations

import triton.language as tl

from lorarep_runtime.kernels import entry_table

ENTRY_FIELDS: tl.constexpr = tl.constexpr(entry_table.ENTRY_FIELDS)
"""Numbers of an entry, int64."""
FIELD_A: tl.constexpr = tl.constexpr(0)
FIELD_B: tl.constexpr = tl.constexpr(1)
"""The address of Bᵀ."""
FIELD_C: tl.constexpr = tl.constexpr(2)
FIELD_BIAS: tl.constexpr = tl.constexpr(3)
FIELD_RANK: tl.constexpr = tl.constexpr(4)
