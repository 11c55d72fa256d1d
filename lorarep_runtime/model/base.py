"""The base: a `transformers` causal model, loaded and quantized once, with three parts replaced by lorarep's own.

The walk over the layers (`walk`), the linear layers (`linear`) and the attention (`walk`, `kernels.attention`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PretrainedConfig
from transformers.utils.logging import set_tqdm_hook

from lorarep_runtime.config import BaseConfig, Quantization
from lorarep_runtime.device.arena import Arena
from lorarep_runtime.device.gil import give_way
from lorarep_runtime.errors import FailedPrecondition, InvalidArgument, first_line
from lorarep_runtime.failpoints import failpoint
from lorarep_runtime.hub.snapshot import fetch
from lorarep_runtime.model.batch import Batch
from lorarep_runtime.model.kv_cache import PagePool
from lorarep_runtime.model.layer_walk import ATTENTION, Walk, register_attention
from lorarep_runtime.model.linear import SharedLinear
from lorarep_runtime.model.packed import kernels_compiled, norm_products, pack_layers, row_squares
from lorarep_runtime.model.weights import Weight, shared_weight
from lorarep_runtime.progress import Progress
from lorarep_runtime.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LAYERS_AT_ONCE = 4
"""Whose weights get memory together, which the allocator rounds to 2 MiB."""
UNIFORM_ATTENTION = {"full_attention", "sliding_attention"}
"""Attention kinds whose keys and values can be paged; others keep state of another form."""


class Base:
    """One model's layers, frozen, and the means to run any plan over them.

    Raises:
        InvalidArgument, FailedPrecondition, NotFound, Unavailable: as `hub.fetch`, or for a model that cannot be served
            exactly, naming what stands in the way.
    """

    def __init__(self, config: BaseConfig, progress: Progress | None = None) -> None:
        self.device = _device(config.device)
        snapshot = fetch(config.base, config.revision, kind="base", cache_dir=config.cache_dir, progress=progress)
        self.repository, self.commit, self.folder = snapshot.repository, snapshot.commit, snapshot.folder
        self.config = read_model_config(self.folder)
        kind, self.quantization_config = quantization_of(self.config, config)
        register_attention()
        failpoint("base")
        dtype = self.config.dtype if config.dtype == "auto" else getattr(torch, config.dtype)
        loading = _reporting(progress, "load" if self.quantization_config is None else "quantize")
        with loading, _memory_as_needed(), kernels_compiled(kind, dtype, self.device):
            self.model = AutoModelForCausalLM.from_pretrained(
                self.folder,
                config=self.config,
                dtype="auto" if config.dtype == "auto" else dtype,
                # Each tensor is quantized as it is read, so the unquantized model is never whole in memory.
                device_map={"": self.device},
                attn_implementation=ATTENTION,
                quantization_config=self.quantization_config,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
            ).eval()
        self.model.requires_grad_(False)
        self.config = self.model.config
        self.dtype: torch.dtype = self.model.get_input_embeddings().weight.dtype
        self.tokenizer = Tokenizer(self.folder)
        self.max_tokens = trained_tokens(self.config)
        layers, self.prefix = find_layers(self.model)
        self.modules: Mapping[str, tuple[int, int]] = linear_shapes(layers[0])
        """(out, in) of each linear module of a layer."""
        if any(linear_shapes(layer) != self.modules for layer in layers):
            raise FailedPrecondition(
                "its layers differ in their linear modules, so positions cannot share them", field="base"
            )
        self.walk = Walk(list(layers))
        self.model.set_submodule(self.prefix, self.walk.hand_offs)
        self.weights: Sequence[Mapping[str, Weight]] = self._shared_weights()
        """Of each layer, the shared weights by module path, such as "self_attn.q_proj"."""
        self.squares: dict[tuple[int, str], Tensor] = {}
        """fp32 (out), |w|² of the rows of those that DoRAs have asked for, by layer and module path."""
        self.kv_heads, self.head_dim = kv_shape(self.config)
        self.quantization: Quantization = next(iter(self.weights[0].values())).quantization

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self.walk.layers)

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding, and logits of a token."""
        return self.model.get_input_embeddings().weight.shape[0]

    def _shared_weights(self) -> list[dict[str, Weight]]:
        """Takes the weights out of the model. On a GPU what stays of the layers lies apart from what is made on the
        way."""
        on_gpu, weights = self.device.type == "cuda", []
        pool = torch.cuda.MemPool() if on_gpu else None
        for first in range(0, self.layers, LAYERS_AT_ONCE):
            some = self.walk.layers[first : first + LAYERS_AT_ONCE]
            weights += _share_linears(some, self.walk, self.dtype, pool)
            if on_gpu:
                torch.cuda.empty_cache()  # so that both copies are there for these layers alone
        vectors = [p for module in (self.model, *self.walk.layers) for p in module.parameters() if p.dim() == 1]
        arena = Arena(vectors, self.device, pool)
        for vector in vectors:  # norms and biases
            vector.data = arena.cat((vector.data,))
        return weights

    def norm_terms(self, layers: Sequence[int], module: str, a: Tensor) -> tuple[Tensor, Tensor]:
        """What `dora` says of a linear module of layers, which may come again, each with its own A.

        Args:
            a: fp32 (layers, ranks, in).

        Returns:
            fp32 |w|² (layers, out) and A Wᵀ (layers, ranks, out).
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
        """Runs a batch through its plan.

        Args:
            rows: (n) int64, the rows whose logits are wanted.

        Returns:
            (n, vocab) fp32 logits. Keys and values of all rows are in the pool's pages.
        """
        with self.walk.over(batch, pool):
            logits = self.model(
                input_ids=batch.token_ids.unsqueeze(0),
                position_ids=batch.token_places.unsqueeze(0),
                use_cache=False,
                logits_to_keep=rows,
            ).logits
        return logits[0].float()


@contextmanager
def _reporting(progress: Progress | None, stage: str) -> Iterator[None]:
    """Has `progress` told of the tensors that `transformers` loads, in place of the bar that it would draw."""

    def counted(tensors: Collection[Any]) -> Iterator[Any]:
        for done, tensor in enumerate(tensors, 1):
            yield tensor
            if progress is not None:
                progress(stage, done, len(tensors))

    def bar(make: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        return counted(*args) if args else make(**{**options, "disable": True})

    before = set_tqdm_hook(None if progress is None else bar)
    try:
        yield
    finally:
        set_tqdm_hook(before)


@contextmanager
def _memory_as_needed() -> Iterator[None]:
    """Keeps `transformers` from taking memory for the whole model at once, which saves it calls of the driver: no part
    of that could be given back while anything of the model lies there."""
    from transformers import modeling_utils  # imported where a model is loaded: that takes seconds

    name = "caching_allocator_warmup"
    taking = getattr(modeling_utils, name, None)
    if taking is None:  # of another version, which may take it or not
        yield
        return
    setattr(modeling_utils, name, lambda *_: None)
    try:
        yield
    finally:
        setattr(modeling_utils, name, taking)


def _device(name: str) -> torch.device:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    here = ["cpu"] if accelerator is None else ["cpu", accelerator.type]
    if name == "auto":
        return torch.device(here[-1])
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InvalidArgument(f"{name!r} is not a torch device", field="device") from error
    if device.type not in here:
        raise InvalidArgument(f"{name!r} is none of those here: {', '.join(here)}", field="device")
    if device.index:  # a thread's kernels are launched on the first, if it does not say otherwise
        raise InvalidArgument(f"{name!r} is not the first; CUDA_VISIBLE_DEVICES says which one that is", field="device")
    return device


def read_model_config(folder: Path) -> PretrainedConfig:
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (ValueError, OSError, KeyError) as error:
        raise FailedPrecondition(f"transformers cannot read its config: {first_line(error)}", field="base") from error
    text = config.get_text_config()
    foreign = set(getattr(text, "layer_types", None) or ()) - UNIFORM_ATTENTION
    if foreign:
        raise FailedPrecondition(f"layer_types {sorted(foreign)} have no keys and values to page", field="base")
    return config


def quantization_of(model: PretrainedConfig, config: BaseConfig) -> tuple[Quantization, BitsAndBytesConfig | None]:
    """How the weights will be held, and what to give `transformers`: None where the checkpoint is quantized already or
    nothing is to be."""
    own = getattr(model, "quantization_config", None)
    if own is not None:
        own = own if isinstance(own, dict) else own.to_dict()
        four = own.get("load_in_4bit") or own.get("_load_in_4bit")
        kind: Quantization = "nf4" if four else "int8"
        if own.get("quant_method") != "bitsandbytes" or (four and own.get("bnb_4bit_quant_type") != "nf4"):
            raise FailedPrecondition(
                f"quantized with {own.get('quant_method')}, which lorarep does not read", field="base"
            )
        if config.quantization not in ("none", kind):
            raise InvalidArgument(
                f"{config.quantization!r}, but the checkpoint is {kind!r} already", field="quantization"
            )
        return kind, None
    if config.double_quantization and config.quantization != "nf4":
        raise InvalidArgument(f"goes with nf4, not with {config.quantization!r}", field="double_quantization")
    if config.quantization == "int8":
        return "int8", BitsAndBytesConfig(load_in_8bit=True)
    if config.quantization == "nf4":
        return "nf4", BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=config.double_quantization
        )
    return "none", None


def trained_tokens(config: PretrainedConfig) -> int:
    """Longest sequence that the base serves.

    A rotary embedding that changes its frequencies past a length changes them for every sequence of a batch; such a
    base is served up to that length, where each sequence has the frequencies it has alone.
    """
    text = config.get_text_config()
    limit: int = text.max_position_embeddings
    rope = getattr(text, "rope_parameters", None) or {}
    for parameters in [rope, *(v for v in rope.values() if isinstance(v, dict))]:
        if parameters.get("rope_type") in ("dynamic", "longrope"):
            limit = min(limit, parameters.get("original_max_position_embeddings") or limit)
    return limit


def kv_shape(config: PretrainedConfig) -> tuple[int, int]:
    """Heads of keys and values, and their dimension."""
    text = config.get_text_config()
    kv_heads: int = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_dim: int = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return kv_heads, head_dim


def find_layers(model: PreTrainedModel) -> tuple[nn.ModuleList, str]:
    """The list of a model's decoder layers, and its path, such as "model.layers".

    Raises:
        FailedPrecondition: the model has none.
    """
    count = model.config.get_text_config().num_hidden_layers
    for child in model.get_decoder().children():
        if isinstance(child, nn.ModuleList) and len(child) == count:
            return child, next(path for path, module in model.named_modules() if module is child)
    raise FailedPrecondition(f"{type(model).__name__} has no list of {count} decoder layers", field="base")


def linear_shapes(layer: nn.Module) -> dict[str, tuple[int, int]]:
    """(out, in) of each linear module of a layer, by its path there."""
    return {n: (m.out_features, m.in_features) for n, m in layer.named_modules() if isinstance(m, nn.Linear)}


def _share_linears(
    layers: Sequence[nn.Module], walk: Walk, dtype: torch.dtype, pool: torch.cuda.MemPool | None
) -> list[dict[str, Weight]]:
    linears = [{n: m for n, m in layer.named_modules() if isinstance(m, nn.Linear)} for layer in layers]
    weights = [{name: shared_weight(module) for name, module in own.items()} for own in linears]
    pack_layers(weights, dtype, pool)
    for layer, modules, own in zip(layers, linears, weights, strict=True):
        for name, module in modules.items():
            layer.set_submodule(name, SharedLinear(own[name], module.bias, name, walk.adapt))
            # bitsandbytes has a weight and its module refer to each other: apart, their memory is free at once.
            del module.weight
    return weights
