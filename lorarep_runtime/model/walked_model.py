"""A loaded `transformers` causal model with three parts replaced by lorarep's own.

Replaced are the walk over the layers (`model.layer_walk`), the linear layers (`model.linear`) and the attention
(`model.transformers_attention`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lorarep_runtime.device.staging import moved
from lorarep_runtime.errors import FailedPrecondition
from lorarep_runtime.model.adapted_ends import AdaptedEnds, ends_of
from lorarep_runtime.model.batch import Batch
from lorarep_runtime.model.cut import check_layers
from lorarep_runtime.model.divided_ends import DividedEnds
from lorarep_runtime.model.experts import adapt_experts, adaptable_parameters
from lorarep_runtime.model.form import HEAD, Ends, ParameterShape
from lorarep_runtime.model.kv_cache import PagePool
from lorarep_runtime.model.layer_walk import Walk, find_layers
from lorarep_runtime.model.linear import SharedLinear, compute_row_by_row, linear_shapes, multiply_in_blocks, straighten
from lorarep_runtime.model.loader import share_weights
from lorarep_runtime.model.model_config import kv_shape
from lorarep_runtime.model.own_attention import take_attention
from lorarep_runtime.model.shard import Shard
from lorarep_runtime.model.weights import Weight

if TYPE_CHECKING:
    from transformers import PreTrainedModel


DETERMINISTIC = {"llama", "mistral", "qwen2", "qwen3"}
"""`model_type`s whose layers compute with their modules alone, and are known to be deterministic on a CPU then."""


class WalkedModel:
    """One model's layers, frozen, and the means to run any plan over them."""

    def __init__(self, model: PreTrainedModel, device: torch.device, shard: Shard | None = None) -> None:
        """
        Args:
            model: with lorarep's attention; its layers and linear layers are taken out of it.
            device: where it lies.
            shard: what of the layers this rank computes; None is all.

        Raises:
            FailedPrecondition: the model has no list of layers, these have no linear modules, or what they have cannot
                be divided.
        """
        self.model = model
        self.device = device
        self.config = model.config
        embedding: Any = model.get_input_embeddings()
        self.dtype: torch.dtype = embedding.weight.dtype
        self.vocab_size: int = embedding.weight.shape[0]
        """Rows of the whole embedding, and logits of a token."""
        layers, self.prefix = find_layers(model)
        for layer in layers:
            straighten(layer)
        self.layer_modules: Sequence[Mapping[str, tuple[int, int]]] = [linear_shapes(layer) for layer in layers]
        """For each layer (out, in) of its linear modules, by their paths there. They are those of whole modules."""
        self.modules: Mapping[str, tuple[int, int]] = dict(chain(*(m.items() for m in reversed(self.layer_modules))))
        """(out, in) of each linear module that there is, by its path in the first layer that has it."""
        if not self.modules:
            raise FailedPrecondition("its layers have no linear modules", field="base")
        self.shard = shard
        """What of each layer this rank computes; None is all."""
        self.divided_ends: DividedEnds | None = None
        """What of the embedding and the head this rank computes; None is all."""
        if shard is not None:
            check_layers(layers, self.layer_modules, self.config)
            self.divided_ends = DividedEnds(model, shard, device)
        self.walk = Walk(list(layers), in_tuples=take_attention(model))
        model.set_submodule(self.prefix, self.walk.hand_offs)
        self.layer_parameters: Sequence[Mapping[str, ParameterShape]] = [{} for _ in layers]
        """For each layer the parameters of experts and routers that adapters may adapt: on a CPU, of one rank."""
        if device.type == "cpu" and shard is None:
            self.layer_parameters = [adaptable_parameters(layer) for layer in layers]
            for layer in layers:
                adapt_experts(layer)
        self.weights: Sequence[Mapping[str, Weight]] = share_weights(model, self.walk, self.dtype, device, shard)
        """For each layer the shared weights by module path, such as "self_attn.q_proj": of this rank's parts."""
        whole = kv_shape(self.config)
        self.kv_shape = whole if shard is None else shard.cut.kv_shape(whole)
        """This rank's keys and values of a token at a position."""
        self.is_general = device.type != "cuda" and shard is None
        """Whether `forward` computes all tokens and logits, and this process alone all of them."""
        self.ends = ends_of(model) if self.is_general else Ends()
        """The head and the embedding where adapters may adapt them."""
        self._adapted_ends = AdaptedEnds(model, self.ends, self.walk)

    @property
    def layers(self) -> int:
        """Number of decoder layers of the model."""
        return len(self.walk.layers)

    @property
    def held_modules(self) -> Mapping[str, tuple[int, int]]:
        """(out, in) of this rank's part of each linear module, by its path."""
        return self._held(self.modules)

    @property
    def held_layer_modules(self) -> Sequence[Mapping[str, tuple[int, int]]]:
        """For each layer (out, in) of this rank's part of each linear module."""
        return [self._held(modules) for modules in self.layer_modules]

    def _held(self, modules: Mapping[str, tuple[int, int]]) -> Mapping[str, tuple[int, int]]:
        if self.shard is None:
            return modules
        return {name: self.shard.cut.part(name, shape).shape for name, shape in modules.items()}

    def end_weight(self, position: int) -> Tensor:
        """(vocab, hidden), the weight of the head (`HEAD`) or the embedding."""
        model = self.model
        module = model.get_output_embeddings() if position == HEAD else model.get_input_embeddings()
        weight: Tensor = module.weight
        return weight

    def make_deterministic(self) -> None:
        """Has `forward` compute each row on a CPU bitwise the same, whatever other rows there are. It is slower then.

        Raises:
            FailedPrecondition: the base is not of DETERMINISTIC.
        """
        if self.config.model_type not in DETERMINISTIC:
            raise FailedPrecondition(
                f"a base of type {self.config.model_type!r} cannot be, only one of {', '.join(sorted(DETERMINISTIC))}",
                field="deterministic",
            )
        for layer in self.walk.layers:
            for module in layer.modules():
                if isinstance(module, SharedLinear):
                    multiply_in_blocks(module)
                elif not [*module.children(), *module.parameters()]:
                    compute_row_by_row(module)  # activations: torch computes the ends of a thread's numbers otherwise
        multiply_in_blocks(self.model.get_output_embeddings())
        self.walk.deterministic = True

    @torch.inference_mode()
    def forward(self, batch: Batch, pool: PagePool, rows: Tensor) -> Tensor:
        """Runs a batch through its plan, and stores the keys and values of all rows in the pool's pages.

        Args:
            rows: (n) int64 on the CPU, the rows whose logits are wanted.

        Returns:
            (n, vocab) fp32 logits, as wide as the largest vocabulary of a row. What is beyond its own means nothing.
            Of several ranks rank 0 has them, and the others' mean nothing.
        """
        with self.walk.over(batch, pool), self._adapted_ends.over(batch, rows):
            logits = self.model(
                input_ids=self._adapted_ends.known(batch.token_ids).unsqueeze(0),
                position_ids=batch.token_places.unsqueeze(0),
                use_cache=False,
                logits_to_keep=moved(rows, self.device),
            ).logits
        return logits[0].float()
