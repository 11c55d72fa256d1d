"""The base: a `transformers` causal model, loaded and quantized once, with three parts replaced by lorarep's own.

Replaced are the walk over the layers (`model.layer_walk`), the linear layers (`model.linear`) and the attention
(`model.transformers_attention`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lorarep_runtime.config import BaseConfig, Quantization
from lorarep_runtime.device.gil import give_way
from lorarep_runtime.errors import FailedPrecondition
from lorarep_runtime.failpoints import failpoint
from lorarep_runtime.hub.snapshot import fetch
from lorarep_runtime.model.batch import Batch
from lorarep_runtime.model.kv_cache import PagePool
from lorarep_runtime.model.layer_walk import Walk, find_layers
from lorarep_runtime.model.linear import linear_shapes
from lorarep_runtime.model.loader import find_device, load_model, share_weights
from lorarep_runtime.model.model_config import kv_shape, quantization_of, read_model_config, trained_tokens
from lorarep_runtime.model.packed import kernels_compiled, norm_products, row_squares
from lorarep_runtime.model.transformers_attention import register_attention
from lorarep_runtime.model.weights import Weight
from lorarep_runtime.progress import Progress
from lorarep_runtime.text.tokenizer import Tokenizer


class Base:
    """One model's layers, frozen, and the means to run any plan over them.

    Raises:
        InvalidArgument, FailedPrecondition, NotFound, Unavailable: as `hub.snapshot.fetch`, or for a model that cannot
            be served exactly, naming the obstacle.
    """

    def __init__(self, config: BaseConfig, progress: Progress | None = None) -> None:
        self.device = find_device(config.device)
        snapshot = fetch(config.base, config.revision, kind="base", cache_dir=config.cache_dir, progress=progress)
        self.repository, self.commit, self.folder = snapshot.repository, snapshot.commit, snapshot.folder
        model_config = read_model_config(self.folder)
        kind, self.quantization_config = quantization_of(model_config, config)
        register_attention()
        failpoint("base")
        dtype = None if config.dtype == "auto" else getattr(torch, config.dtype)
        with kernels_compiled(kind, dtype or model_config.dtype, self.device):
            self.model = load_model(self.folder, model_config, dtype, self.quantization_config, self.device, progress)
        self.config = self.model.config
        self.dtype: torch.dtype = self.model.get_input_embeddings().weight.dtype
        self.tokenizer = Tokenizer(self.folder)
        self.max_tokens = trained_tokens(self.config)
        """Tokens of the longest sequence that is served."""
        layers, self.prefix = find_layers(self.model)
        self.modules: Mapping[str, tuple[int, int]] = linear_shapes(layers[0])
        """(out, in) of each linear module of a layer, by its path there."""
        if any(linear_shapes(layer) != self.modules for layer in layers):
            raise FailedPrecondition(
                "its layers differ in their linear modules, so positions cannot share them", field="base"
            )
        self.walk = Walk(list(layers))
        self.model.set_submodule(self.prefix, self.walk.hand_offs)
        self.weights: Sequence[Mapping[str, Weight]] = share_weights(self.model, self.walk, self.dtype, self.device)
        """For each layer the shared weights by module path, such as "self_attn.q_proj"."""
        self.squares: dict[tuple[int, str], Tensor] = {}
        """fp32 (out), |w|² of the rows of each weight that a DoRA has asked for, by layer and module path."""
        self.kv_heads, self.head_dim = kv_shape(self.config)
        self.quantization: Quantization = next(iter(self.weights[0].values())).quantization

    @property
    def layers(self) -> int:
        """Number of decoder layers of the model."""
        return len(self.walk.layers)

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding, and logits of a token."""
        return self.model.get_input_embeddings().weight.shape[0]

    def norm_terms(self, layers: Sequence[int], module: str, a: Tensor) -> tuple[Tensor, Tensor]:
        """The terms of DoRA's norms (`kernels.eager.dora_norm`) that need the base's weights.

        Args:
            layers: one for each position, so the same one may come again.
            module: path of a linear module in a layer.
            a: fp32 (positions, ranks, in), each position's own A.

        Returns:
            fp32 |w|² (positions, out) and A Wᵀ (positions, ranks, out).
        """
        squares = torch.stack([self._squares(layer, module) for layer in layers])
        return squares, norm_products([self.weights[layer][module] for layer in layers], a, self.dtype)

    def _squares(self, layer: int, module: str) -> Tensor:
        if (found := self.squares.get((layer, module))) is None:
            give_way()
            found = self.squares[layer, module] = row_squares(self.weights[layer][module], self.dtype)
        return found

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
