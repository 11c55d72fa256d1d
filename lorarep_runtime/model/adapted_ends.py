"""Has a model's head and embedding compute with what adapters have for them: LoRA, DoRA, and rows of their own.

An adapter may have another vocabulary than the base: more tokens, whose rows it has itself, or fewer. The model itself
computes with the base's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorarep_runtime.kernels.eager import adapt as eager
from lorarep_runtime.kernels.eager.adapt import Slice
from lorarep_runtime.model.batch import Batch
from lorarep_runtime.model.compiled_adapter import Adapter
from lorarep_runtime.model.form import EMBEDDING, HEAD, End, Ends
from lorarep_runtime.model.layer_walk import Walk

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def ends_of(model: PreTrainedModel) -> Ends:
    """A model's head and embedding, as far as they are plain."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    paths = {module: path for path, module in model.named_modules()}
    return Ends(
        End(paths[head], head.out_features, head.in_features) if type(head) is nn.Linear else None,
        End(paths[embedding], embedding.num_embeddings, embedding.embedding_dim)
        if isinstance(embedding, nn.Embedding)
        else None,
        head is not None and head.weight is embedding.weight,
    )


class AdaptedEnds:
    """The head and the embedding of a model. One forward pass at a time."""

    def __init__(self, model: PreTrainedModel, ends: Ends, walk: Walk) -> None:
        """
        Args:
            ends: those that adapters may adapt.
            walk: says whether each row is computed alone.
        """
        self._ends = ends
        self._walk = walk
        self._ids: Tensor
        self._spans: Sequence[tuple[slice, Adapter]] = []
        """The rows of adapters that have anything for the embedding."""
        self._adapters: Sequence[Adapter | None] = []
        """The adapter of each wanted row, if any of them has something for the head."""
        if ends.head is not None:
            model.get_output_embeddings().register_forward_hook(self._adapt_head)
        if ends.embedding is not None:
            model.get_input_embeddings().register_forward_hook(self._adapt_embedding)

    @contextmanager
    def over(self, batch: Batch, rows: Tensor) -> Iterator[None]:
        """Has both compute with the adapters of a batch, in the forward pass within.

        Args:
            rows: (n) int64, the rows whose logits are wanted.
        """
        spans = batch.spans if any(self._ends) else []
        self._ids = batch.token_ids
        self._spans = [
            (slice(int(start), int(start) + len(span.tokens)), span.adapter)
            for start, span in zip(batch.starts, spans, strict=False)
            if span.adapter is not None and EMBEDDING in span.adapter.ends
        ]
        if any(span.adapter is not None and span.adapter.ends for span in spans):
            of_rows = np.searchsorted(batch.starts, rows.numpy(), side="right") - 1
            self._adapters = [spans[index].adapter for index in of_rows]
        try:
            yield
        finally:
            self._spans, self._adapters = [], []
            del self._ids

    def known(self, ids: Tensor) -> Tensor:
        """Token ids (rows) as the model can look them up: its embedding has no rows for an adapter's new tokens."""
        return ids if self._ends.embedding is None else ids.clamp(max=self._ends.embedding.tokens - 1)

    def _adapt_embedding(self, embedding: nn.Module, given: tuple[Tensor, ...], hidden: Tensor) -> None:
        """After the embedding: changes hidden states (1, rows, hidden) of the batch's tokens in place."""
        own = getattr(embedding, "embed_scale", None)  # of families that scale within the module
        scale = None if own is None else torch.as_tensor(own, dtype=hidden.dtype)
        for rows, adapter in self._spans:
            for own_rows in adapter.own_rows(EMBEDDING):
                own_rows.write_hidden(self._ids[rows], hidden[0, rows], scale)
            if (entry := adapter.ends[EMBEDDING]) is None:
                continue
            at_once = 1 if self._walk.deterministic else rows.stop - rows.start
            for begin in range(rows.start, rows.stop, at_once):
                some = slice(begin, begin + at_once)
                added = entry.A[:, self._ids[some]].T @ entry.B.T
                if entry.c is not None:
                    hidden[0, some] *= entry.c
                hidden[0, some] += added if scale is None else added * scale

    def _adapt_head(self, head: nn.Module, given: tuple[Tensor, ...], logits: Tensor) -> Tensor:
        """After the head: changes logits (..., rows, vocab) of hidden states (..., rows, hidden), or wider ones."""
        if not self._adapters:
            return logits
        bias: Any = head.bias
        widest = max((adapter.vocabulary or 0 for adapter in self._adapters if adapter is not None), default=0)
        more = widest - logits.shape[-1]
        wide = F.pad(logits, (0, more)) if more > 0 else logits
        x, y = given[0].flatten(0, -2), wide.flatten(0, -2)
        for row, adapter in enumerate(self._adapters):  # one by one: no row's result depends on the others
            if adapter is not None and HEAD in adapter.ends:
                _adapt_logits(adapter, x[row], y[row], bias)
        return wide


def _adapt_logits(adapter: Adapter, x: Tensor, logits: Tensor, bias: Tensor | None) -> None:
    """Changes one row's logits (vocab), which have the head's bias, as an adapter says; x: (hidden)."""
    if bias is not None:
        logits[: len(bias)] -= bias
    own_rows = adapter.own_rows(HEAD)
    for own in own_rows:
        own.write_logits(x, logits)
    if (entry := adapter.ends[HEAD]) is not None:
        eager.adapt(x.unsqueeze(0), logits[: len(entry.B)].unsqueeze(0), [Slice(0, 1, *entry)])
    # PEFT leaves out the bias of a head in which it replaces single rows.
    if bias is not None and all(isinstance(own.tokens, range) for own in own_rows):
        logits[: len(bias)] += bias
