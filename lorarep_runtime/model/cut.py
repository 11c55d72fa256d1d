"""What each rank holds of a base that several devices share: tensor parallelism (Megatron-LM, Shoeybi et al., 2019).

q, k, v, gate and up are cut by their outputs: each rank has whole heads, and its columns of the MLP. o and down are cut
by their inputs, so each rank computes a term of every output, and the ranks add these up. Adapters are cut as their
modules are (S-LoRA, Sheng et al., 2023). y = c ⊙ (W x) + B (A x) + b is linear in x: where a module is cut by its
inputs, each rank has all of c and B, applies them to its own term, and one sum serves both products. Rank 0 alone adds
the biases there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from lorarep_runtime.config import Quantization
from lorarep_runtime.errors import FailedPrecondition
from lorarep_runtime.model.compiled_adapter import Layout
from lorarep_runtime.model.form import Form
from lorarep_runtime.model.kv_cache import KVShape
from lorarep_runtime.model.model_config import kv_shape
from lorarep_runtime.model.packed import PACKED_MODULES
from lorarep_runtime.model.weights import DenseWeight, Int8Weight, NF4Weight, Weight

SUMMED = frozenset({"self_attn.o_proj", "mlp.down_proj"})
"""Modules that are cut by their inputs: their outputs are sums over the ranks."""
KEYS_AND_VALUES = frozenset({"self_attn.k_proj", "self_attn.v_proj"})
BLOCK = 64
"""Weights of NF4 that share a scale; no cut divides them."""
FIELD = "tensor_parallel"


class Part(NamedTuple):
    """What a rank holds of a weight (out, in), and of the adapters for it."""

    rows: slice
    """Its outputs."""
    columns: slice
    """Its inputs."""
    is_summed: bool
    """Whether other ranks hold further terms of each output."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the part."""
        return self.rows.stop - self.rows.start, self.columns.stop - self.columns.start


@dataclass(frozen=True)
class Cut:
    """Which part of every module one rank holds. All ranks hold parts of equal shapes."""

    rank: int
    ranks: int
    kv_heads: int
    """Of the whole base. Where they are fewer than the ranks, several ranks hold the same one."""

    def part(self, module: str, shape: tuple[int, int]) -> Part:
        """The rank's part of a module.

        Args:
            module: its path in the layer.
            shape: (out, in) of the whole weight.
        """
        out, into = shape
        if module in SUMMED:
            return Part(slice(0, out), _share(into, self.rank, self.ranks), True)
        if module in KEYS_AND_VALUES and self.kv_heads < self.ranks:
            return Part(_share(out, self.rank * self.kv_heads // self.ranks, self.kv_heads), slice(0, into), False)
        return Part(_share(out, self.rank, self.ranks), slice(0, into), False)

    def form(self, module: str, form: Form) -> Form:
        """The form of the rank's part of an adapter's entry."""
        return form._replace(shape=self.part(module, form.shape).shape)

    def layout(self, layout: Layout) -> Layout:
        """The rank's part of an adapter."""
        forms: dict[tuple[str, Form], Form] = {}
        cut = {}
        for key, form in layout.items():
            at = key[1], form
            if at not in forms:
                forms[at] = self.form(*at)
            cut[key] = forms[at]
        return cut

    def kv_shape(self, whole: KVShape) -> KVShape:
        """The rank's keys and values of a token at a position."""
        return whole._replace(heads=max(1, whole.heads // self.ranks))


def _share(size: int, number: int, of: int) -> slice:
    width = size // of
    return slice(number * width, (number + 1) * width)


def cut_of(config: PretrainedConfig, rank: int, ranks: int, quantization: Quantization) -> Cut:
    """One rank's cut of a base.

    Args:
        config: the base's.

    Raises:
        FailedPrecondition: the base cannot be divided among so many ranks; it says by what.
    """
    text = config.get_text_config()
    heads, kv, inner = text.num_attention_heads, kv_shape(config), getattr(text, "intermediate_size", None)
    if not isinstance(inner, int):
        raise FailedPrecondition(f"a base of type {config.model_type!r} is not served by several ranks", field=FIELD)
    for name, size in (("num_attention_heads", heads), ("intermediate_size", inner)):
        if size % ranks:
            raise FailedPrecondition(f"{ranks} ranks do not divide its {name}, {size}", field=FIELD)
    if kv.heads % ranks and ranks % kv.heads:
        raise FailedPrecondition(
            f"{ranks} ranks do not divide its num_key_value_heads, {kv.heads}, nor are they a multiple", field=FIELD
        )
    if quantization == "nf4":
        for name, width in (("attention's outputs", heads * kv.value_dim), ("intermediate_size", inner)):
            if width % (ranks * BLOCK):
                raise FailedPrecondition(
                    f"{ranks} ranks do not divide its {name}, {width}, into whole blocks of {BLOCK}", field=FIELD
                )
        if text.hidden_size % BLOCK:
            raise FailedPrecondition(f"blocks of {BLOCK} do not divide its hidden_size", field=FIELD)
    return Cut(rank, ranks, kv.heads)


def check_layers(
    layers: Iterable[nn.Module], modules: Sequence[Mapping[str, tuple[int, int]]], config: PretrainedConfig
) -> None:
    """Refuses layers of which a rank's heads alone would compute something else.

    Args:
        layers: whole ones, of `transformers`.
        modules: for each its linear modules.

    Raises:
        FailedPrecondition: a module or a parameter is not among those that can be divided.
    """
    known = {name for names in PACKED_MODULES for name in names}
    dim = kv_shape(config).key_dim
    for layer, linear in zip(layers, modules, strict=True):
        if unknown := sorted(set(linear) ^ known):
            raise FailedPrecondition(f"{unknown[0]} is not divided among ranks", field=FIELD)
        for name, parameter in layer.named_parameters():
            is_linear = name.rpartition(".")[0] in known
            if not is_linear and name.startswith("self_attn.") and parameter.shape != (dim,):
                raise FailedPrecondition(f"{name} goes over several heads and is not divided among ranks", field=FIELD)


def cut_weight(weight: Weight, part: Part, device: torch.device) -> Weight:
    """A copy of a rank's part of a weight, bit by bit; of double quantization's scales what they stand for, in fp32.

    Args:
        device: where the copy is; a quantized weight is there already.
    """
    rows, columns = part.rows, part.columns
    if isinstance(weight, NF4Weight):
        from bitsandbytes.functional import QuantState

        state = weight.state
        blocks = slice(columns.start // BLOCK, columns.stop // BLOCK)
        halves = slice(columns.start // 2, columns.stop // 2)
        absmax = weight.scales().view(weight.shape[0], -1)[rows, blocks]
        packed = weight.data[0].view(weight.shape[0], -1)[rows, halves]
        own = QuantState(
            absmax=_copy(absmax).flatten(),
            shape=torch.Size(part.shape),
            code=state.code,
            blocksize=state.blocksize,
            quant_type=state.quant_type,
            dtype=state.dtype,
        )
        return NF4Weight(_copy(packed).view(-1, 1), own)
    if isinstance(weight, Int8Weight):
        return Int8Weight(_copy(weight.data[0][rows, columns]), _copy(weight.constants[0][rows]))
    return DenseWeight(_copy(weight.data[0][rows, columns], device))


def cut_bias(bias: nn.Parameter | None, part: Part, rank: int, device: torch.device) -> nn.Parameter | None:
    """A copy of a rank's part of a module's own bias, on its device; that of a sum is rank 0's."""
    if bias is None or (part.is_summed and rank):
        return None
    return nn.Parameter(_copy(bias.data[part.rows], device), requires_grad=False)


def _copy(view: Tensor, device: torch.device | None = None) -> Tensor:
    """A copy in memory of its own, without which the whole would stay; None leaves it on its device."""
    return view.to(device or view.device, copy=True, memory_format=torch.contiguous_format)
