"""Loading a base: a `transformers` causal model is read and quantized once, and its linear weights become shared ones.

While a model is loaded three behaviours of `transformers` are changed for the whole process: its progress bar, that it
takes memory for the whole model at once, and, for a CPU, that it leaves the weights in a map of their files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import BitsAndBytesConfig, PretrainedConfig
from transformers.utils.logging import set_tqdm_hook

from lorarep_runtime.device.arena import Arena
from lorarep_runtime.errors import DataLoss, InvalidArgument, first_line
from lorarep_runtime.hub.files import INDEX, WEIGHTS
from lorarep_runtime.model.layer_walk import Walk
from lorarep_runtime.model.linear import SharedLinear, linear_modules
from lorarep_runtime.model.model_config import model_class
from lorarep_runtime.model.own_attention import own_attention
from lorarep_runtime.model.packed import pack_layers
from lorarep_runtime.model.shard import Shard
from lorarep_runtime.model.transformers_attention import ATTENTION
from lorarep_runtime.model.weights import Weight, shared_weight
from lorarep_runtime.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LAYERS_AT_ONCE = 4
"""Layers whose weights get memory together, which the allocator rounds to 2 MiB."""


def find_device(name: str) -> torch.device:
    """The device of a base: "auto" is the accelerator, or the CPU where there is none.

    Raises:
        InvalidArgument: there is no such device, or it is not the first of its kind.
    """
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
    if device.index:  # a thread's kernels are launched on the first device, if it does not say otherwise
        raise InvalidArgument(f"{name!r} is not the first; CUDA_VISIBLE_DEVICES says which one that is", field="device")
    return device


def load_model(
    folder: Path,
    config: PretrainedConfig,
    dtype: torch.dtype | None,
    quantization: BitsAndBytesConfig | None,
    device: torch.device,
    progress: Progress | None,
    *,
    mapped: bool = False,
) -> PreTrainedModel:
    """Loads a causal model with frozen weights and lorarep's attention, which has to be registered.

    Args:
        folder: a snapshot with safetensors files.
        dtype: of weights that are not quantized; None is the checkpoint's own.
        quantization: how to quantize; None where the checkpoint is quantized already or nothing is to be quantized.
        progress: told of tensors, as stage "load" or "quantize".
        mapped: leaves the weights in maps of their files, on the CPU; for those of which parts are copied elsewhere.

    Raises:
        DataLoss: a file of weights is truncated or no safetensors file, named; or a weight is missing, or of another
            shape than the config says.
    """
    _check_weights(folder)
    with (
        _reporting(progress, "load" if quantization is None else "quantize"),
        _memory_as_needed(),
        nullcontext() if mapped else _read(device),
    ):
        load = model_class(config).from_pretrained
        model, found = load(
            folder,
            config=config,
            dtype="auto" if dtype is None else dtype,
            # Each tensor is quantized as it is read, so the unquantized model is never whole in memory.
            device_map={"": torch.device("cpu") if mapped else device},
            attn_implementation=own_attention(config) or ATTENTION,
            quantization_config=quantization,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            # Weights that are missing, or of another shape, are drawn at random then: they are refused here, by name.
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    for name, theirs, ours in sorted(found["mismatched_keys"]):
        raise DataLoss(f"has the shape {tuple(theirs)}, and the config of the base says {tuple(ours)}", field=name)
    if missing := found["missing_keys"]:
        raise DataLoss(f"is not among the weights of the base, which lack {len(missing)}", field=min(missing))
    return model.eval().requires_grad_(False)


def _check_weights(folder: Path) -> None:
    """Opens each file of weights: what fails inside `transformers` does not say in which file."""
    index = folder / INDEX
    whole = not index.exists() or (folder / WEIGHTS["base"][0]).exists()
    names = {WEIGHTS["base"][0]} if whole else set(json.loads(index.read_bytes())["weight_map"].values())
    for name in sorted(names):
        try:
            with safe_open(folder / name, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise DataLoss(f"is not a whole safetensors file: {first_line(error)}", field=name) from error


def share_weights(
    model: PreTrainedModel, walk: Walk, dtype: torch.dtype, device: torch.device, shard: Shard | None = None
) -> list[dict[str, Weight]]:
    """Takes the linear weights out of the walk's layers, packs them, and puts SharedLinears in their place.

    On a GPU everything of the layers that stays lies in memory of its own, apart from what is only needed meanwhile.

    Args:
        model: without its layers, which hang in the walk.
        dtype: of the activations.
        shard: what of them this rank holds; None is all.

    Returns:
        For each layer its weights, by module path.
    """
    on_gpu, weights = device.type == "cuda", []
    pool = torch.cuda.MemPool() if on_gpu else None
    for first in range(0, len(walk.layers), LAYERS_AT_ONCE):
        weights += _share_linears(walk.layers[first : first + LAYERS_AT_ONCE], walk, dtype, device, pool, shard)
        if on_gpu:
            torch.cuda.empty_cache()  # so that there are two copies of these layers alone
    for module in (model, *walk.layers):
        if any(p.device.type != device.type for p in module.parameters()):  # still in maps of their files
            module.to(device)
    vectors = [p for module in (model, *walk.layers) for p in module.parameters() if p.dim() == 1]
    arena = Arena(vectors, device, pool)
    for vector in vectors:  # norms and biases
        vector.data = arena.cat((vector.data,))
    return weights


def _share_linears(
    layers: Sequence[nn.Module],
    walk: Walk,
    dtype: torch.dtype,
    device: torch.device,
    pool: torch.cuda.MemPool | None,
    shard: Shard | None,
) -> list[dict[str, Weight]]:
    linears = [linear_modules(layer) for layer in layers]
    weights = [{name: shared_weight(module) for name, module in own.items()} for own in linears]
    if shard is not None:
        weights = [{name: shard.weight(name, weight, device) for name, weight in own.items()} for own in weights]
    pack_layers(weights, dtype, pool)
    for layer, modules, own in zip(layers, linears, weights, strict=True):
        for name, module in modules.items():
            bias, add_up = (module.bias, None) if shard is None else shard.rest(name, module, device)
            layer.set_submodule(name, SharedLinear(own[name], bias, name, walk.adapt, add_up))
            # bitsandbytes has a weight and its module refer to each other: apart, their memory is free at once.
            del module.weight
    return weights


@contextmanager
def _reporting(progress: Progress | None, stage: str) -> Iterator[None]:
    """Tells `progress` of the tensors that `transformers` loads, in place of the bar that it would draw.

    The hook is the process's: other threads that load a model meanwhile would report here, too.
    """

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
    """Keeps `transformers` from taking memory for a whole model at once, by a patch of its module for the process.

    That saves it calls of the driver, but no part of the memory could be given back while anything of the model lies
    there.
    """
    from transformers import modeling_utils  # imported where a model is loaded: that takes seconds

    name = "caching_allocator_warmup"
    taking = getattr(modeling_utils, name, None)
    if taking is None:  # another version of `transformers`, which may take it or not
        yield
        return
    setattr(modeling_utils, name, lambda *_: None)
    try:
        yield
    finally:
        setattr(modeling_utils, name, taking)


@contextmanager
def _read(device: torch.device) -> Iterator[None]:
    """Has weights that stay on the CPU read into memory of their own, by a patch of `transformers` for the process.

    They would stay a map of their files, and who writes to these later would change the weights, or end the process by
    SIGBUS. Its `disable_mmap` would hold the whole model twice.
    """
    if device.type != "cpu":
        yield
        return
    from transformers import modeling_utils  # imported where a model is loaded, as above

    def read(file: Any, framework: str = "pt", device: str = "cpu", **_: Any) -> Any:
        return safe_open(file, framework=framework, device=device, backend="pread")

    mapping = modeling_utils.safe_open
    modeling_utils.safe_open = read
    try:
        yield
    finally:
        modeling_utils.safe_open = mapping
