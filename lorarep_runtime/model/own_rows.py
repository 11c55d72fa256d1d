"""Rows of a head's or an embedding's weight that an adapter has itself, in place of the base's or beyond them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class OwnRows:
    """The weights of some tokens: all from one on, or single ones."""

    tokens: Sequence[int]
    """A range, or ids without duplicates in any order."""
    weight: Tensor
    """(tokens, hidden)."""

    def write_logits(self, x: Tensor, logits: Tensor) -> None:
        """Writes the logits of its tokens.

        Args:
            x: (hidden), the hidden state of one row.
            logits: (vocab), written to.
        """
        where = slice(self.tokens.start, self.tokens.stop) if isinstance(self.tokens, range) else self._ids
        logits[where] = self.weight.mv(x)

    def write_hidden(self, ids: Tensor, hidden: Tensor, scale: Tensor | None) -> None:
        """Writes the embeddings of its tokens.

        Args:
            ids: (rows) int64.
            hidden: (rows, hidden), written to where an id is one of its tokens.
            scale: factor of embeddings; None is 1.
        """
        rows, which = self._find(ids)
        found = self.weight[which]
        hidden[rows] = found if scale is None else found * scale

    def _find(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Indices of ids that are its tokens, and of their rows in `weight`."""
        if isinstance(self.tokens, range):
            rows = ((ids >= self.tokens.start) & (ids < self.tokens.stop)).nonzero().squeeze(1)
            return rows, ids[rows] - self.tokens.start
        ordered, order = self._ordered
        places = torch.searchsorted(ordered, ids).clamp_(max=len(ordered) - 1)
        rows = (ordered[places] == ids).nonzero().squeeze(1)
        return rows, order[places[rows]]

    @cached_property
    def _ids(self) -> Tensor:
        return torch.tensor(self.tokens, dtype=torch.int64, device=self.weight.device)

    @cached_property
    def _ordered(self) -> tuple[Tensor, Tensor]:
        ordered, order = self._ids.sort()
        return ordered, order
