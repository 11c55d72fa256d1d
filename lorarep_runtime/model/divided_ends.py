"""The embedding and the head of a base that several ranks share: each has the rows of its own part of the vocabulary.

Parts have equal shapes: the last one is filled up with zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lorarep_runtime.errors import FailedPrecondition
from lorarep_runtime.integers import ceil_div
from lorarep_runtime.model.cut import FIELD
from lorarep_runtime.model.shard import Shard

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class DividedEnds:
    """One rank's part of a model's embedding and head. All ranks call the same methods, in the same order."""

    def __init__(self, model: PreTrainedModel, shard: Shard, device: torch.device) -> None:
        """Leaves a model only this rank's rows of both, and has both modules compute with the other ranks.

        Args:
            model: as `transformers` loaded it. Tied weights stay tied.
            device: where the rows are to be.

        Raises:
            FailedPrecondition: the model has an embedding or a head of another kind.
        """
        embedding, head = _plain_ends(model)
        self._group = shard.group
        self.vocab_size: int = embedding.num_embeddings
        self.width = ceil_div(self.vocab_size, shard.cut.ranks)
        """Tokens of each rank's part."""
        self._first = shard.cut.rank * self.width
        is_tied = head.weight is embedding.weight
        embedding.padding_idx = None  # of gradients alone, and may be another rank's token
        embedding.weight = self._own(embedding.weight, device)
        head.weight = embedding.weight if is_tied else self._own(head.weight, device)
        if head.bias is not None:
            head.bias = self._own(head.bias, device)
        self._look_up: Callable[[Tensor], Tensor] = embedding.forward
        self.own_logits: Callable[[Tensor], Tensor] = head.forward
        """Hidden states (..., hidden) to the logits (..., width) of this rank's tokens."""
        embedding.forward = self._embed
        head.forward = self._logits

    def _own(self, whole: Tensor, device: torch.device) -> nn.Parameter:
        part = whole.data[self._first : self._first + self.width]
        own = torch.zeros(self.width, *part.shape[1:], dtype=part.dtype, device=device)
        own[: len(part)] = part
        return nn.Parameter(own, requires_grad=False)

    def embedding_term(self, ids: Tensor) -> Tensor:
        """(..., hidden) of token ids (...): their embeddings where they are this rank's, else zeros."""
        at = ids - self._first
        term = self._look_up(at.clamp(0, self.width - 1))
        return term.masked_fill_(((at < 0) | (at >= self.width)).unsqueeze(-1), 0)

    def _embed(self, ids: Tensor) -> Tensor:
        """Embeddings (..., hidden) of token ids (...): one device's bits, as all other terms of a sum are zeros."""
        term = self.embedding_term(ids)
        self._group.add_up(term)
        return term

    def _logits(self, x: Tensor) -> Tensor:
        """Logits (..., vocab) of hidden states (..., hidden) on rank 0, and on others those of their own tokens."""
        own = self.own_logits(x)
        if not own.numel():  # on all ranks: nobody wants any
            return x.new_empty(*x.shape[:-1], self.vocab_size)
        parts = self._group.gather(own)
        return torch.cat(list(parts), -1)[..., : self.vocab_size] if parts else own


def _plain_ends(model: PreTrainedModel) -> tuple[Any, Any]:
    """A model's embedding and head.

    Raises:
        FailedPrecondition: one of them is not plain, or they are of other tokens.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    kinds = f"a {type(embedding).__name__} and a {type(head).__name__}"
    is_plain = isinstance(embedding, nn.Embedding) and type(head) is nn.Linear
    if not is_plain or head.out_features != embedding.num_embeddings:
        raise FailedPrecondition(f"its embedding and head, {kinds}, are not divided among ranks", field=FIELD)
    return embedding, head
