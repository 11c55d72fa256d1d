"""The header of an adapter's weights file: read without the weights, and compared with the adapter's config."""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from lorarep_runtime.adapters.ends import MAX_NEW_TOKENS, UNREAD_WEIGHTS, EndEntries
from lorarep_runtime.adapters.peft_config import FILE_PREFIX, AdapterConfig
from lorarep_runtime.device.gil import give_way, giving_way
from lorarep_runtime.errors import DataLoss, FailedPrecondition
from lorarep_runtime.model.compiled_adapter import Key, Layout, vocabulary_of
from lorarep_runtime.model.form import Ends, Form, ParameterShape
from lorarep_runtime.model.stack import Stack

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Dtypes of weights, by their names in safetensors files."""

OPENING_SECONDS = 0.003
"""Time for which safetensors keeps Python's GIL when it opens a file of a thousand tensors."""
KNOWN, KNOWN_BYTES = 16, 1 << 20
"""Number of headers that are remembered, and most bytes of each. Adapters of one recipe have equal headers."""
ENTRY_BYTES, METADATA_BYTES = 160, 1 << 16
"""Most bytes of a header for each tensor, its name aside, and for all else."""
_TRAINING = re.compile(r"lora_velora_embed|lora_monteclora_sampler\.\w+")
"""Kinds of tensors that VeLoRA and MonteCLoRA read while they train alone."""
TRAINING_TENSORS, TRAINING_NUMBERS = 4, 1 << 12
"""Most such tensors of a module, and numbers in them beside those that grow with its rank and its input."""
OLD_PREFIXES = {"model.language_model.layers": ("language_model.model.layers", "model.layers")}
"""Paths of the decoder's layers in models of texts and images, as earlier versions of transformers had them."""
OLD_MAGNITUDE, MAGNITUDE = ".lora_magnitude_vector.weight", ".lora_magnitude_vector"
"""DoRA's vectors as some versions of PEFT have named them, and as all read them."""


class TensorInfo(NamedTuple):
    """One tensor's entry in a safetensors header."""

    dtype: str
    shape: tuple[int, ...]


Header = Mapping[str, TensorInfo]
"""All tensors of a file by name, in the order in which they lie there without gaps."""


class Expected(NamedTuple):
    """What an adapter's config says of its file."""

    config: AdapterConfig
    stack: Stack
    """The stack that the weights are for."""
    layout: Layout
    """The entries, as the config alone promises them."""
    ends: Ends
    """The base's head and embedding, as far as they may be adapted."""
    most_new_tokens: int = MAX_NEW_TOKENS
    """By which the vocabulary may be larger than the base's."""


def checked_header(file: Path, expected: Expected, prefix: str) -> tuple[Header, Layout]:
    """The tensors of an adapter's weights file, and the entries that they are: none else that matters at inference.

    Args:
        file: in the safetensors format.
        prefix: path of the list of layers, such as "model.layers".

    Raises:
        DataLoss: as `read_header`.
        FailedPrecondition: as `read_header`, or naming a tensor that is missing, surplus, of another shape or of a
            dtype that is no float.
    """
    config = expected.config
    header = read_header(file, most_header_bytes(config, expected.layout, prefix))
    if not header.keys() >= dict(giving_way(expected_tensors(expected.layout, prefix))).keys():
        header = _renamed(header, prefix)
    shapes = {name.removeprefix(FILE_PREFIX): info.shape for name, info in giving_way(header.items())}
    ends = EndEntries(config, expected.ends, shapes)
    layout = {key: form for key, form in giving_way(expected.layout.items()) if key[0] >= 0}
    layout |= ends.entries(expected.most_new_tokens)
    tensors = dict(giving_way(expected_tensors(layout, prefix)))
    unknown = header.keys() - tensors.keys()
    if surplus := {
        name
        for name in giving_way(unknown)
        if not _is_unused(name, header[name], config, prefix) and not ends.is_unread(name.removeprefix(FILE_PREFIX))
    }:
        raise FailedPrecondition(_why_surplus(min(surplus), prefix, config), field=min(surplus))
    for name, shape in giving_way(tensors.items()):
        if name not in header:
            raise FailedPrecondition("is missing in the file", field=name)
        if header[name].shape != shape:
            raise FailedPrecondition(f"has the shape {header[name].shape}, the config says {shape}", field=name)
        if header[name].dtype not in DTYPES:
            raise FailedPrecondition(f"is of type {header[name].dtype}; {', '.join(DTYPES)} are supported", field=name)
    return header, layout


def read_header(file: Path, most_bytes: int) -> Header:
    """The tensors of a safetensors file, without their weights.

    The library checks the header, and that it covers the file exactly (https://huggingface.co/docs/safetensors).

    Args:
        file: in the safetensors format.
        most_bytes: of the header. The library parses it in one piece, in many times its memory.

    Raises:
        DataLoss: the file is corrupt or truncated, or is replaced while it is read.
        FailedPrecondition: the header is larger.
    """
    try:
        start = _Start.of(file)
        if most_bytes < start.length < start.size:  # a length beyond the file is the library's to refuse
            raise FailedPrecondition(
                f"its header takes {start.length} bytes; its config's tensors need {most_bytes} at most",
                field=file.name,
            )
        return _header(start) if start.length <= KNOWN_BYTES else _header.__wrapped__(start)
    except (SafetensorError, OSError, ValueError) as error:
        raise DataLoss(str(error), field=file.name) from error


def _renamed(header: Header, prefix: str) -> Header:
    """A header with the names that are usual now in place of older ones, if it has any."""
    usual = f"{FILE_PREFIX}{prefix}."
    olds = [f"{FILE_PREFIX}{old}." for old in OLD_PREFIXES.get(prefix, ())]
    old = next((old for old in olds if any(name.startswith(old) for name in giving_way(header))), usual)

    def renamed(name: str) -> str:
        name = f"{usual}{name.removeprefix(old)}" if name.startswith(old) else name
        return f"{name.removesuffix(OLD_MAGNITUDE)}{MAGNITUDE}" if name.endswith(OLD_MAGNITUDE) else name

    names = {renamed(name): info for name, info in giving_way(header.items())}
    return names if len(names) == len(header) else header  # none may have two names


def _why_surplus(name: str, prefix: str, config: AdapterConfig) -> str:
    if name.endswith(".bias") and ".lora_" not in name:
        return (
            "is trained in place of the base's, which all adapters share: train with bias='none', or merge the "
            "adapter and serve the merged model as a base"
        )
    if config.old_experts is not None:
        return (
            "is of a module that PEFT leaves out, as its name in target_modules means experts or a router: merge the "
            "adapter where it was trained, and serve the merged model as a base"
        )
    if name.startswith(f"{FILE_PREFIX}{prefix}."):
        return "is in the file, and nothing in the config speaks of it"
    return (
        f"is of a module outside {prefix}, whose linear modules are adapted, and on a CPU head and embedding: train "
        "without it, or merge the adapter and serve the merged model as a base"
    )


def _is_unused(name: str, info: TensorInfo, config: AdapterConfig, prefix: str) -> bool:
    """Whether a tensor is of an adapted module, and has no part in what the module computes."""
    path, dot, kind = name.partition(".lora_")
    path = path.removeprefix(FILE_PREFIX)
    if not dot or not path.startswith(f"{prefix}.") or not config.targets(path):
        return False
    if info.dtype in DTYPES and config.has_training_tensors and _TRAINING.fullmatch(f"lora_{kind}"):
        return True
    # AdaLoRA may have left no rank of a module.
    return info.dtype in DTYPES and config.rank(path) == 0 and 0 in info.shape


def most_header_bytes(config: AdapterConfig, layout: Layout, prefix: str) -> int:
    """Most bytes of the header of a weights file with a layout, whichever program wrote it."""
    tensors = ((len(name) + ENTRY_BYTES) for name, _ in giving_way(expected_tensors(layout, prefix)))
    # Names of tensors that only training reads have up to as many bytes more.
    most = METADATA_BYTES + sum(tensors) * (1 + TRAINING_TENSORS * config.has_training_tensors)
    # A, B and E of modules of which AdaLoRA has left no rank are in the file, and empty.
    pruned = (path for path in giving_way(config.pruned) if path.startswith(f"{prefix}.") and config.targets(path))
    return most + sum(3 * (len(tensor_name(path, "lora_A")) + ENTRY_BYTES) for path in pruned)


def most_file_bytes(expected: Expected, layout: Layout, prefix: str) -> int:
    """Most bytes of a weights file with a layout: in the widest dtype.

    Args:
        layout: as the config promises it, or as `checked_header` gave it for the file.
    """
    config = expected.config
    widest = max(dtype.itemsize for dtype in DTYPES.values())
    numbers = sum(math.prod(shape) for _, shape in giving_way(expected_tensors(layout, prefix)))
    tokens = vocabulary_of(layout)
    # What of the base's PEFT saves beside that.
    numbers += sum(UNREAD_WEIGHTS * tokens * end.hidden for _, end in expected.ends if tokens is not None)
    if config.has_training_tensors:
        numbers += sum(f.rank * (f.rank + 1) + f.shape[1] + TRAINING_NUMBERS for f in giving_way(layout.values()))
    return 8 + most_header_bytes(config, layout, prefix) + numbers * widest


@dataclass(frozen=True)
class _Start:
    """The beginning of a file, by which a remembered header is found again."""

    length: int
    """Bytes of the header."""
    digest: bytes
    """SHA-256 of the header."""
    size: int
    """Bytes of the file."""
    file: Path = field(compare=False)

    @classmethod
    def of(cls, file: Path) -> _Start:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            digest = hashlib.sha256(opened.read(min(length, KNOWN_BYTES))).digest()
            return cls(length, digest, os.fstat(opened.fileno()).st_size, file)


@lru_cache(KNOWN)
def _header(start: _Start) -> Header:
    give_way(OPENING_SECONDS)
    with safe_open(start.file, framework="pt", backend="pread") as opened:  # not mapped: see `weights_file`
        header: dict[str, TensorInfo] = {}
        infos: dict[TensorInfo, TensorInfo] = {}
        for name in giving_way(opened.offset_keys()):
            piece = opened.get_slice(name)
            info = TensorInfo(piece.get_dtype(), tuple(piece.get_shape()))
            header[name] = infos.setdefault(info, info)  # few differ; the garbage collector visits every object
    if _Start.of(start.file) != start:  # the library opened the path a second time
        raise DataLoss("is not what it was a moment ago", field=start.file.name)
    return header


def layout_of(
    config: AdapterConfig,
    stack: Stack,
    layer_modules: Sequence[Mapping[str, tuple[int, int]]],
    layer_parameters: Sequence[Mapping[str, ParameterShape]],
    prefix: str,
    ends: Ends,
) -> Layout:
    """The entries that an adapter's config promises.

    Args:
        config: the adapter's.
        stack: the layers that the file's layer numbers count.
        layer_modules: for each layer (out, in) of its linear modules, by their paths there.
        layer_parameters: for each layer the parameters of experts and routers that may be adapted.
        prefix: path of the list of layers, such as "model.layers".
        ends: the model's head and embedding, as far as they may be adapted.

    Raises:
        FailedPrecondition: the config targets no module or no parameter, or as `EndEntries`.
        InvalidArgument: a pattern of the config cannot be matched.
    """
    layout: dict[Key, Form] = {}
    linears = ((i, linear) for i, layer in enumerate(stack) for linear in layer_modules[layer].items())
    for position, (module, matrix) in giving_way(linears):
        path = f"{prefix}.{position}.{module}"
        if config.targets(path) and (form := config.form(path, matrix)).rank:
            layout[position, module] = form
    if config.target_parameters:
        linear = len(layout)
        for position, layer in giving_way(enumerate(stack)):
            forms = config.parameter_forms(f"{prefix}.{position}", layer_parameters[layer])
            layout.update(((position, path), form) for path, form in forms.items())
        if len(layout) == linear:
            raise FailedPrecondition(
                "match no weights of experts or of a router, which are adapted on a CPU alone: train linear modules "
                "instead, or merge the adapter and serve the merged model as a base",
                field="target_parameters",
            )
    layout |= EndEntries(config, ends, {}).entries(0)
    if not layout:
        raise FailedPrecondition("match no linear layer of the decoder", field="target_modules")
    return layout


def expected_tensors(layout: Layout, prefix: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the tensors of a weights file with a layout."""
    for key, form in layout.items():
        for kind, shape in form.tensors:
            yield tensor_name(file_path(prefix, key, form), kind), shape


def path_of(prefix: str, key: Key) -> str:
    """The path of an entry's module in the model; prefix: of the list of layers."""
    position, module = key
    return module if position < 0 else f"{prefix}.{position}.{module}"


def file_path(prefix: str, key: Key, form: Form) -> str:
    """The path of the module that a file's tensors of an entry are of; prefix: of the list of layers."""
    return path_of(prefix, key if form.file_module is None else (key[0], form.file_module))


def tensor_name(path: str, kind: str) -> str:
    """The name of a module's tensor in a weights file; kind: as in `Form.tensors`."""
    return f"{FILE_PREFIX}{path}.{kind}"
