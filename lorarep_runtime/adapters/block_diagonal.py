"""BD-LoRA's field of a config: which modules have block-diagonal matrices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lorarep_runtime.adapters.peft_values import boolean, integer, mapping, strings
from lorarep_runtime.errors import InvalidArgument, shown


@dataclass(frozen=True)
class BlockDiagonal:
    """BD-LoRA: modules whose A or B is block-diagonal, with the blocks alone in the file."""

    nblocks: int
    target_modules_bd_a: tuple[str, ...]
    """Parts of the paths of modules with a block-diagonal A."""
    target_modules_bd_b: tuple[str, ...]
    match_strict: bool
    """Whether each module has to be among them."""

    @classmethod
    def parse(cls, raw: Any) -> BlockDiagonal | None:
        """Checks the value of `use_bdlora`. Raises InvalidArgument, also for keys that nobody knows."""
        fields = dict(mapping("use_bdlora", raw or None))
        if raw is None or raw is False:
            return None
        block = cls(
            nblocks=integer("use_bdlora", fields.pop("nblocks", 1), 1, 1 << 16),
            target_modules_bd_a=strings("use_bdlora", fields.pop("target_modules_bd_a", None)),
            target_modules_bd_b=strings("use_bdlora", fields.pop("target_modules_bd_b", None)),
            match_strict=boolean("use_bdlora", fields.pop("match_strict", True)),
        )
        if fields:
            raise InvalidArgument(f"has {shown(min(fields))}, which nobody knows", field="use_bdlora")
        return block

    def blocks(self, path: str) -> tuple[int, int]:
        """Number of blocks of A and of B of the module at a path.

        Raises:
            InvalidArgument: both are block-diagonal, or none although `match_strict` asks for one.
        """
        a, b = (any(part in path for part in parts) for parts in (self.target_modules_bd_a, self.target_modules_bd_b))
        if (a and b) or (self.match_strict and not a and not b):
            raise InvalidArgument(f"names {path} for {'both' if a else 'neither'} of A and B", field="use_bdlora")
        return self.nblocks if a else 1, self.nblocks if b else 1
