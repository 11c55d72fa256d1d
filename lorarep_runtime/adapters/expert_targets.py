"""Targets of adapters that were trained while `transformers` had a module for each projection of each expert.

From version 5 on it has one parameter for all experts of a layer. PEFT converts the configs of such adapters, and their
tensors, as it loads them (`peft.utils.transformers_weight_conversion`). This is what its config becomes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from lorarep_runtime.errors import FailedPrecondition


class OldExperts(NamedTuple):
    """How the mixtures of experts of a family were made of modules."""

    block: str
    """Path in a layer of the module that has router and experts."""
    router: str
    """Name of the router there."""
    gate_up: tuple[str, str]
    """Names of the modules of an expert whose outputs one parameter stacks now, in that order."""
    down: str
    """Name of an expert's other module."""

    @property
    def parameters(self) -> Mapping[str, str]:
        """By names of modules, the ends of the paths of the parameters that hold their weights now."""
        return {
            self.router: f"{self.router}.weight",
            **dict.fromkeys(self.gate_up, "gate_up_proj"),
            self.down: "down_proj",
        }


_MIXTRAL = OldExperts("block_sparse_moe", "gate", ("w1", "w3"), "w2")
_QWEN2_MOE = OldExperts("mlp", "gate", ("gate_proj", "up_proj"), "down_proj")
OLD_EXPERTS: Mapping[str, OldExperts] = {
    **dict.fromkeys(("minimax", "minimax_m2", "mixtral"), _MIXTRAL),
    **dict.fromkeys(
        (
            *("afmoe", "beam", "cohere2_moe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "ernie4_5_moe"),
            *("exaone_moe", "flex_olmo", "glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm_moe_dsa", "hunyuan_v1_moe"),
            *("longcat_flash", "mellum", "olmoe", "qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_omni_moe"),
            *("qwen3_omni_moe_text", "qwen3_omni_moe_thinker", "sarvam_mla", "solar_open"),
        ),
        _QWEN2_MOE,
    ),
}
"""By `model_type` of the base, as in PEFT's tables."""


class Targets(NamedTuple):
    """The fields of a config that are converted."""

    modules: tuple[str, ...]
    parameters: tuple[str, ...]
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]


def converted(targets: Targets, old: OldExperts, rank: int, alpha: float) -> Targets:
    """Targets with parameters in place of the modules that they were.

    A parameter of two modules has the rank and the alpha of both.

    Args:
        targets: as a config has them.
        rank, alpha: of modules that no pattern names.

    Raises:
        FailedPrecondition: only one of two modules that are one parameter now is a target.
    """
    moved: dict[str, set[str]] = {}
    rest = []
    for target in targets.modules:
        name = target.rpartition(".")[2]
        if name in old.parameters:
            moved.setdefault(old.parameters[name], set()).add(name)
        else:
            rest.append(target)
    ranks, alphas = dict(targets.ranks), dict(targets.alphas)
    if found := moved.get("gate_up_proj"):
        if missing := set(old.gate_up) - found:
            raise FailedPrecondition(
                f"name {min(found)} without {min(missing)}, and PEFT converts only both together to the parameter "
                "gate_up_proj that they are now: merge the adapter, and serve the merged model as a base",
                field="target_modules",
            )
        key = rf".*\.{re.escape('gate_up_proj')}"
        ranks[key], alphas[key] = rank * len(old.gate_up), alpha * len(old.gate_up)
    parameters = (*targets.parameters, *sorted(moved.keys() - set(targets.parameters)))
    return Targets(tuple(rest), parameters, ranks, alphas)


def file_modules(paths: Sequence[str], old: OldExperts | None) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Where a file has the tensors of targeted parameters of one layer.

    PEFT wraps a module once for each of its parameters that is a target: the last one is outermost.

    Args:
        paths: of the parameters in the layer, in the order in which their modules have them.
        old: how the file has them, where its modules are converted.

    Returns:
        By these paths, that of the module in the layer that the tensors are of, and names of modules of each expert.
    """
    found: dict[str, tuple[str, tuple[str, ...]]] = {}
    for index, path in enumerate(paths):
        module, _, name = path.rpartition(".")
        if old is not None:
            block, leaf = old.block, module.rpartition(".")[2]
            modules = {"gate_up_proj": old.gate_up, "down_proj": (old.down,)}.get(name, ())
            found[path] = f"{block}.{leaf}", modules
        else:
            wrappers = sum(other.rpartition(".")[0] == module for other in paths[index + 1 :])
            found[path] = module + ".base_layer" * wrappers, ()
    return found
