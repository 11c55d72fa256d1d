"""A loaded `transformers` causal model with three parts replaced by lorarep's own.

Replaced are the walk over the layers (`model.layer_walk`), the linear layers (`model.linear`) and the attention
(`model.transformers_attention`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lorarep_runtime.errors import FailedPrecondition
from lorarep_runtime.model.batch import Batch
from lorarep_runtime.model.kv_cache import PagePool
from lorarep_runtime.model.layer_walk import Walk, find_layers
from lorarep_runtime.model.linear import linear_shapes, straighten
from lorarep_runtime.model.loader import share_weights
from lorarep_runtime.model.model_config import kv_shape
from lorarep_runtime.model.weights import Weight

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class WalkedModel:
    """One model's layers, frozen, and the means to run any plan over them."""

    def __init__(self, model: PreTrainedModel, device: torch.device) -> None:
        """
        Args:
            model: with lorarep's attention; its layers and linear layers are taken out of it.
            device: where it lies.

        Raises:
            FailedPrecondition: the model has no list of layers, or these have no linear modules.
        """
        self.model = model
        self.device = device
        self.config = model.config
        self.dtype: torch.dtype = model.get_input_embeddings().weight.dtype
        layers, self.prefix = find_layers(model)
        for layer in layers:
            straighten(layer)
        self.layer_modules: Sequence[Mapping[str, tuple[int, int]]] = [linear_shapes(layer) for layer in layers]
        """For each layer (out, in) of its linear modules, by their paths there."""
        self.modules: Mapping[str, tuple[int, int]] = dict(chain(*(m.items() for m in reversed(self.layer_modules))))
        """(out, in) of each linear module that there is, by its path in the first layer that has it."""
        if not self.modules:
            raise FailedPrecondition("its layers have no linear modules", field="base")
        self.walk = Walk(list(layers))
        model.set_submodule(self.prefix, self.walk.hand_offs)
        self.weights: Sequence[Mapping[str, Weight]] = share_weights(model, self.walk, self.dtype, device)
        """For each layer the shared weights by module path, such as "self_attn.q_proj"."""
        self.kv_shape = kv_shape(self.config)

    @property
    def layers(self) -> int:
        """Number of decoder layers of the model."""
        return len(self.walk.layers)

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding, and logits of a token."""
        return self.model.get_input_embeddings().weight.shape[0]

    @torch.inference_mode()
    def forward(self, batch: Batch, pool: PagePool, rows: Tensor) -> Tensor:
        """Runs a batch through its plan, and stores the keys and values of all rows in the pool's pages.

        Args:
            rows: (n) int64, the rows whose logits are wanted.

        Returns:
            (n, vocab) fp32 logits.
        """
        with self.walk.over(batch, pool):
            logits = self.model(
                input_ids=batch.token_ids.unsqueeze(0),
                position_ids=batch.token_places.unsqueeze(0),
                use_cache=False,
                logits_to_keep=rows,
            ).logits
        return logits[0].float()
