"""The two ends of a decode step: from tokens to h, and from h to logits and the likeliest next tokens.

Where several ranks share the base, each looks up its own tokens and computes their logits. h is the sum of all ranks'
terms, and rank 0 gathers the logits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lorarep_runtime.gpu.rank_sums import RankSums

if TYPE_CHECKING:
    from lorarep_runtime.model.base import Base

HEAD_ROWS = 32
"""Rows that the head of a deterministic step takes at a time: a library sums in another order for another number."""


class StepEnds:
    """The embedding, and the last norm and the head, of one rank's steps."""

    def __init__(self, base: Base, sums: RankSums | None) -> None:
        """
        Args:
            sums: of the ranks that share the base, where there are several.
        """
        decoder: Any = base.model.get_decoder()
        self._norm = decoder.norm
        self._embedding, self._head = base.model.get_input_embeddings(), base.model.get_output_embeddings()
        self._divided, self._sums = base.divided_ends, sums

    def embed(self, tokens: Tensor, h: Tensor) -> None:
        """Writes the embeddings of tokens (rows), which are rank 0's, to h (rows, hidden size)."""
        if self._divided is None or self._sums is None:
            h.copy_(self._embedding(tokens))
            return
        self._sums.share(tokens)  # rank 0 alone draws
        self._sums.put(self._divided.embedding_term(tokens), h)

    def choose(self, h: Tensor, logits: Tensor, tokens: Tensor, *, deterministic: bool) -> None:
        """Writes logits and the likeliest tokens of rows, on rank 0 alone where there are several.

        Args:
            h: (n, hidden size), after the last layer.
            logits: fp32, the first n of (rows, vocab).
            tokens: int64 (n).
            deterministic: whether a row's logits are bitwise the same for any number of rows.
        """
        if self._divided is None or self._sums is None:
            at_once = HEAD_ROWS if deterministic else len(h)
            for some, to in zip(h.split(at_once), logits.split(at_once), strict=True):
                filled = some if len(some) == at_once else F.pad(some, (0, 0, 0, at_once - len(some)))
                to.copy_(self._head(self._norm(filled))[: len(some)])
        elif not self._sums.gather(self._divided.own_logits(self._norm(h)), logits):
            return
        torch.argmax(logits, 1, out=tokens)
