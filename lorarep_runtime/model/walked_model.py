"""A loaded `transformers` causal model with three parts replaced by lorarep's own.

Replaced are the walk over the layers (`model.layer_walk`), the linear layers (`model.linear`) and the attention
(`model.transformers_attention`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lorarep_runtime.errors import FailedPrecondition
from lorarep_runtime.model.batch import Batch
from lorarep_runtime.model.kv_cache import PagePool
from lorarep_runtime.model.layer_walk import Walk, find_layers
from lorarep_runtime.model.linear import linear_shapes
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
            FailedPrecondition: the model has no list of equal layers.
        """
        self.model = model
        self.device = device
        self.config = model.config
        self.dtype: torch.dtype = model.get_input_embeddings().weight.dtype
        layers, self.prefix = find_layers(model)
        self.modules: Mapping[str, tuple[int, int]] = linear_shapes(layers[0])
        """(out, in) of each linear module of a layer, by its path there."""
        if any(linear_shapes(layer) != self.modules for layer in layers):
            raise FailedPrecondition(
                "its layers differ in their linear modules, so positions cannot share them", field="base"
            )
        self.walk = Walk(list(layers))
        model.set_submodule(self.prefix, self.walk.hand_offs)
        self.weights: Sequence[Mapping[str, Weight]] = share_weights(model, self.walk, self.dtype, device)
        """For each layer the shared weights by module path, such as "self_attn.q_proj"."""
        self.kv_heads, self.head_dim = kv_shape(self.config)

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
