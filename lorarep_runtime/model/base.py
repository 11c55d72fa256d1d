"""The base: a `transformers` causal model, loaded and quantized once, whose layers every stack walks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PretrainedConfig

from lorarep_runtime.config import BaseConfig, Quantization
from lorarep_runtime.device.gil import give_way
from lorarep_runtime.device.group import Group
from lorarep_runtime.device.threads import limit_threads
from lorarep_runtime.errors import FailedPrecondition, first_line
from lorarep_runtime.failpoints import failpoint
from lorarep_runtime.hub.snapshot import fetch
from lorarep_runtime.model.batch import Batch, Span
from lorarep_runtime.model.cut import FIELD, cut_of
from lorarep_runtime.model.family_check import check_family, is_compared
from lorarep_runtime.model.form import EMBEDDING, HEAD
from lorarep_runtime.model.kv_cache import PagePool, PageTable
from lorarep_runtime.model.loader import find_device, load_model
from lorarep_runtime.model.model_config import quantization_of, read_model_config, trained_tokens
from lorarep_runtime.model.packed import kernels_compiled, norm_products, row_squares
from lorarep_runtime.model.shard import Shard
from lorarep_runtime.model.transformers_attention import register_attention
from lorarep_runtime.model.walked_model import WalkedModel
from lorarep_runtime.model.weights import DenseWeight, Weight, shared_weight
from lorarep_runtime.progress import Progress
from lorarep_runtime.text.tokenizer import Tokenizer

Join = Callable[[Path, torch.device], Group]
"""Has the other ranks load the base from a folder, and returns this rank's place among them, on its device."""


class Base(WalkedModel):
    """A base that is loaded from the Hub or a folder, with its tokenizer.

    Raises:
        InvalidArgument, FailedPrecondition, NotFound, Unavailable: as `hub.snapshot.fetch`, or for a model that cannot
            be served exactly, naming the obstacle.
    """

    def __init__(self, config: BaseConfig, progress: Progress | None = None, join: Join | None = None) -> None:
        """
        Args:
            progress: told of the download and of tensors.
            join: joins the ranks that share the base, where there are several.
        """
        device = find_device(config.device)
        limit_threads(config.tensor_parallel if device.type == "cpu" else 1)
        snapshot = fetch(config.base, config.revision, kind="base", cache_dir=config.cache_dir, progress=progress)
        self.repository, self.commit, self.folder = snapshot.repository, snapshot.commit, snapshot.folder
        model_config = read_model_config(self.folder)
        self.max_tokens = trained_tokens(model_config)
        """Tokens of the longest sequence that is served."""
        kind, self.quantization_config = quantization_of(model_config, config)
        shard = None if join is None else self._shard(config.tensor_parallel, model_config, kind, device, join)
        with ThreadPoolExecutor(1) as pool:
            # Both import libraries, which takes seconds.
            checked = pool.submit(check_family, self.folder, model_config, config.cache_dir)
            register_attention()
            failpoint("base")
            checked.result()
        dtype = None if config.dtype == "auto" else getattr(torch, config.dtype)
        with kernels_compiled(kind, dtype or model_config.dtype, device):
            # A whole base that is not quantized may be too much for one device.
            mapped = shard is not None and kind == "none" and device.type != "cpu"
            model = load_model(
                self.folder, model_config, dtype, self.quantization_config, device, progress, mapped=mapped
            )
        super().__init__(model, device, shard)
        if not is_compared(model_config):
            self._try(model_config.model_type)
        self.tokenizer = Tokenizer(self.folder)
        self.squares: dict[tuple[int, str], Tensor] = {}
        """fp32 (out), |w|² of the rows of each weight that a DoRA has asked for, by layer and module path."""
        self.quantization: Quantization = kind
        """That of the checkpoint or the configuration; a checkpoint may leave some weights as they are."""

    def _shard(
        self, ranks: int, config: PretrainedConfig, kind: Quantization, device: torch.device, join: Join
    ) -> Shard:
        """Joins the other ranks once it is known that the base can be divided.

        Raises:
            FailedPrecondition: it cannot.
        """
        if not is_compared(config):
            raise FailedPrecondition(
                f"a base of type {config.model_type!r} like this one is not served by several ranks", field=FIELD
            )
        cut = partial(cut_of, config, ranks=ranks, quantization=kind)
        cut(rank=0)
        group = join(self.folder, device)
        return Shard(cut(rank=group.rank), group)

    def _try(self, family: str) -> None:
        """Computes two tokens: the family was compared in fp32, on the CPU and with plain weights alone.

        Raises:
            FailedPrecondition: that fails.
        """
        stack = tuple(range(self.layers))
        pool = PagePool(len(stack), self.kv_shape, dtype=self.dtype, device=self.device)
        table = PageTable(pool, len(stack))
        table.grow(2)
        try:
            for done, tokens in enumerate(([0], [0])):
                batch = Batch([Span(tokens, done, stack, None, table)], self.device)
                self.forward(batch, pool, torch.zeros(1, dtype=torch.int64)).cpu()
        except Exception as error:  # whatever a family's code raises here, it would raise for each request
            raise FailedPrecondition(
                f"a base of type {family!r} cannot be served in {self.dtype} on {self.device}: {first_line(error)}",
                field="base",
            ) from error

    def norm_terms(self, layers: Sequence[int], module: str, a: Tensor) -> tuple[Tensor, Tensor]:
        """The terms of DoRA's norms (`kernels.eager.dora_norm`) that need the base's weights: this rank's parts.

        Args:
            layers: one for each position, so the same one may come again; `HEAD` or `EMBEDDING` for one of these.
            module: path of a linear module in a layer, or of the head or the embedding.
            a: fp32 (positions, ranks, in), each position's own A.

        Returns:
            fp32 |w|² (positions, out) and A Wᵀ (positions, ranks, out).
        """
        squares = torch.stack([self._squares(layer, module) for layer in layers])
        return squares, norm_products([self._weight(layer, module) for layer in layers], a, self.dtype)

    def _squares(self, layer: int, module: str) -> Tensor:
        if (found := self.squares.get((layer, module))) is None:
            give_way()
            found = self.squares[layer, module] = row_squares(self._weight(layer, module), self.dtype)
        return found

    def _weight(self, layer: int, module: str) -> Weight:
        if layer == EMBEDDING:
            return DenseWeight(self.end_weight(EMBEDDING).T)
        return shared_weight(self.model.get_submodule(module)) if layer == HEAD else self.weights[layer][module]
