"""The fields of an adapter's entry (`entry_table`), as `tl.constexpr`: Triton kernels see no other global constants."""

from __future__ import annotations

import triton.language as tl

from lorarep_runtime.kernels import entry_table

ENTRY_FIELDS: tl.constexpr = tl.constexpr(entry_table.ENTRY_FIELDS)
"""Number of int64 fields of an entry."""
FIELD_A: tl.constexpr = tl.constexpr(0)
"""Place in an entry of the address of A."""
FIELD_B: tl.constexpr = tl.constexpr(1)
"""Place in an entry of the address of Bᵀ."""
FIELD_C: tl.constexpr = tl.constexpr(2)
"""Place in an entry of the address of c."""
FIELD_BIAS: tl.constexpr = tl.constexpr(3)
"""Place in an entry of the address of the adapter's bias."""
FIELD_RANK: tl.constexpr = tl.constexpr(4)
"""Place in an entry of the rank."""
