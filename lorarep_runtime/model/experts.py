"""Mixtures of experts whose weights adapters adapt: parameters of a layer that are no linear modules.

`transformers` holds the weights of all experts of a layer in one parameter (experts, out, in), or (experts, in, out),
and those of a router in another, (experts, hidden). PEFT adapts both by its `target_parameters`: each expert has an A
and a B of its own. Rows with such an adapter are computed here, all others by the family's own code.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from inspect import signature
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lorarep_runtime.errors import FailedPrecondition
from lorarep_runtime.kernels.eager.adapt import Slice
from lorarep_runtime.model.form import ParameterShape
from lorarep_runtime.model.layer_walk import walk_of

_S = TypeVar("_S")
GATE_UP, UP, DOWN = "gate_up_proj", "up_proj", "down_proj"
"""Names of the parameters of experts, as the experts interface of `transformers` reads them."""


def adaptable_parameters(layer: nn.Module) -> dict[str, ParameterShape]:
    """Parameters of a layer that adapters may adapt, by their paths there, in the order in which a module has them."""
    found = {}
    for path, module in layer.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if _has_experts(module) and name in (GATE_UP, UP, DOWN) and parameter.dim() == 3:
                experts, *shape = parameter.shape
                out, into = reversed(shape) if module.is_transposed else shape
                found[f"{path}.{name}"] = ParameterShape(experts, (out, into))
            elif _is_router(module) and name == "weight" and parameter.dim() == 2:
                found[f"{path}.{name}"] = ParameterShape(0, (parameter.shape[0], parameter.shape[1]))
    return found


def adapt_experts(layer: nn.Module) -> None:
    """Has the experts and routers of a walk's layer compute with each row's adapter."""
    for path, module in layer.named_modules():
        if _has_experts(module):
            module.forward = partial(_experts, module, path, module.forward)
        elif _is_router(module):
            # A copy has the same parameters, and the forward of before.
            module.forward = partial(_router, copy.copy(module), f"{path}.weight", module.forward)


def _has_experts(module: nn.Module) -> bool:
    """Whether the experts interface of `transformers` describes a module."""
    return all(hasattr(module, name) for name in ("is_transposed", "has_gate", "has_bias", "has_post_expert_norm"))


def _is_router(module: nn.Module) -> bool:
    """Whether a module is a router that chooses for each row by itself, from hidden states and biases alone."""
    if "router" not in type(module).__name__.lower() or not isinstance(getattr(module, "weight", None), nn.Parameter):
        return False
    return all(name.endswith("bias") for name in list(signature(module.forward).parameters)[1:])


def _experts(
    module: Any, path: str, plain: Callable[..., Tensor], hidden: Tensor, index: Tensor, weights: Tensor
) -> Tensor:
    """The experts of a layer, for all rows of a visit.

    Args:
        module: the experts.
        path: of the module in its layer.
        plain: the family's own code.
        hidden: (rows, hidden).
        index: (rows, chosen), the experts of each row.
        weights: (rows, chosen), their parts of the sum.

    Returns:
        (rows, hidden).
    """
    segments: dict[tuple[int, int], dict[str, Slice]] = defaultdict(dict)
    for name in (GATE_UP, UP, DOWN):
        for s in walk_of(module).slices(f"{path}.{name}"):
            segments[s.start, s.stop][name] = s
    if not segments:
        return plain(hidden, index, weights)
    parts = []
    for rows, entries in _all_rows(segments, len(hidden)):
        given = hidden[rows], index[rows], weights[rows]
        parts.append(plain(*given) if entries is None else _adapted(module, *given, entries))
    return torch.cat(parts)


def _adapted(module: Any, hidden: Tensor, index: Tensor, weights: Tensor, entries: Mapping[str, Slice]) -> Tensor:
    """The experts of rows that have one adapter, one expert after the other; arguments as for `_experts`.

    Args:
        entries: the adapter's, by names of parameters.
    """

    def linear(name: str, expert: int, x: Tensor) -> Tensor:
        weight = getattr(module, name)[expert]
        y = x @ (weight if module.is_transposed else weight.T)
        if module.has_bias:
            y += getattr(module, f"{name}_bias")[expert]
        if (entry := entries.get(name)) is not None:
            a, b = (matrix.unflatten(0, (module.num_experts, -1))[expert] for matrix in (entry.A, entry.B.T))
            y += (x @ a.T) @ b
        return y

    out = torch.zeros_like(hidden)
    for expert in index.unique().tolist():
        if expert >= module.num_experts:  # stands for none
            continue
        rows, places = torch.where(index == expert)
        if module.has_gate:
            inner = module._apply_gate(linear(GATE_UP, expert, hidden[rows]))
        else:
            inner = module.act_fn(linear(UP, expert, hidden[rows]))
        y = linear(DOWN, expert, inner)
        if module.has_post_expert_norm:
            y = module.post_expert_norm(y)
        out.index_add_(0, rows, (y * weights[rows, places, None]).to(out.dtype))
    return out


def _router(module: Any, path: str, plain: Callable[..., Any], hidden: Tensor, *biases: Any) -> Any:
    """The router of a layer, for all rows of a visit.

    Args:
        module: a router that computes with what its `weight` is meanwhile.
        path: of the weight in its layer.
        plain: the family's own code.
        hidden: (rows, hidden) or (1, rows, hidden).
        biases: what else it is called with.

    Returns:
        What the family's code does: a tensor (rows, ...), or several.

    Raises:
        FailedPrecondition: it returns something else, and a row has an adapter.
    """
    segments = {(s.start, s.stop): s for s in walk_of(module).slices(path)}
    if not segments:
        return plain(hidden, *biases)
    x = hidden.flatten(0, -2)
    parts = []
    for rows, entry in _all_rows(segments, len(x)):
        weights = {} if entry is None else {"weight": module.weight + entry.B @ entry.A}
        found = torch.func.functional_call(module, weights, (x[rows], *biases))
        parts.append((found,) if isinstance(found, Tensor) else found)
        if any(not isinstance(t, Tensor) or len(t) != len(x[rows]) for t in parts[-1]):
            raise FailedPrecondition(f"{path} is of a router that does not choose row by row", field="adapters")
    several = tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return several[0] if isinstance(found, Tensor) else several


def _all_rows(segments: Mapping[tuple[int, int], _S], count: int) -> Iterator[tuple[slice, _S | None]]:
    """All rows in their order: segments with what they have of an adapter, and the rows between them with None."""
    end = 0
    for start, stop in sorted(segments):
        if end < start:
            yield slice(end, start), None
        yield slice(start, stop), segments[start, stop]
        end = stop
    if end < count:
        yield slice(end, count), None
