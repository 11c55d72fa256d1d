"""`adapter_config.json`, checked: what each module of the base gets of an adapter. `peft_fields` has every field."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import regex

from lorarep_runtime.adapters.block_diagonal import BlockDiagonal
from lorarep_runtime.adapters.expert_targets import OLD_EXPERTS, OldExperts, Targets, converted, file_modules
from lorarep_runtime.adapters.peft_fields import ADALORA, check_fields, default_targets
from lorarep_runtime.adapters.peft_values import (
    boolean,
    check_expressions,
    integer,
    items,
    mapping,
    number,
    ranges,
    strings,
    token_lists,
)
from lorarep_runtime.config import AdapterLimits
from lorarep_runtime.errors import FailedPrecondition, InvalidArgument, shown
from lorarep_runtime.model.form import Form, ParameterShape
from lorarep_runtime.model.stack import Stack, stack_from_ranges

FILE_PREFIX = "base_model.model."
"""PEFT puts it before the path of each module in its weights files."""
MAX_NAME = 256

ALL_LINEAR = "all-linear"
"""The value of `target_modules` that stands for every linear module."""
TIED_NAMES = ("embed_tokens", "lm_head")
"""Names of heads and embeddings that PEFT ties."""
ADALORA_EPSILON = 1e-5
"""PEFT adds it to the rank that it divides by."""
MATCHING_SECONDS = 10.0
"""Time limit for all matches of one adapter's patterns."""


@dataclass(frozen=True)
class AdapterConfig:
    """The fields of an adapter's config that matter at inference, named as in PEFT's LoraConfig."""

    peft_type: str
    r: int
    """Rank of modules that no pattern names; AdaLoRA's `init_r`."""
    lora_alpha: float
    target_modules: str | tuple[str, ...]
    """A regular expression that matches whole paths of modules, or the names that such paths end in."""
    exclude_modules: str | tuple[str, ...]
    """Modules that are not adapted although they are targets, in the same form."""
    target_parameters: tuple[str, ...]
    """Names that the paths of parameters of experts and routers end in."""
    old_experts: OldExperts | None
    """How its file has these, where they were modules when it was trained."""
    layers_to_transform: tuple[int, ...]
    """Positions that are adapted; empty means all."""
    layers_pattern: tuple[str, ...]
    rank_pattern: Mapping[str, int]
    """Ranks by expressions that paths end in, or AdaLoRA's by whole paths: none is left of some modules."""
    alpha_pattern: Mapping[str, float]
    use_rslora: bool
    use_dora: bool
    lora_bias: bool
    use_bdlora: BlockDiagonal | None
    init_lora_weights: object
    """How training began."""
    base_model_name_or_path: str | None
    """The base that it was trained on, by a repository id or by a path of another machine."""
    modules_to_save: tuple[str, ...]
    """Ends of the paths of modules that the file has whole, in place of the base's."""
    ensure_weight_tying: bool
    """Whether head and embedding, where the base has one weight for both, are adapted alike."""
    trainable_token_indices: Mapping[str, tuple[int, ...]]
    """Tokens whose rows the file has, in place of the base's, by the end of a module's path; "" is the embedding."""
    alora_invocation_tokens: tuple[int, ...]
    """aLoRA's: it adapts a sequence from the last place on at which these tokens are. Empty is the whole sequence."""
    has_training_tensors: bool
    """Whether its file may have tensors that only training reads."""
    layer_replication: tuple[tuple[int, int], ...] | None
    max_positions: int
    deadline: float
    """`time.monotonic()` seconds until which patterns may be matched."""

    @classmethod
    def parse(cls, raw: Mapping[str, Any], limits: AdapterLimits, family: str | None = None) -> AdapterConfig:
        """Checks a config.

        Args:
            raw: the JSON object of `adapter_config.json`.
            limits: what an adapter may ask for.
            family: `model_type` of the base, whose modules are adapted where the config names none.

        Raises:
            InvalidArgument: a value is malformed or over a limit.
            FailedPrecondition: a field asks for something that cannot be served exactly.
        """
        check_fields(raw)
        targets, excluded = raw.get("target_modules"), raw.get("exclude_modules")
        if targets is None:
            targets = list(default_targets(raw["peft_type"], family))
        adaptive = raw["peft_type"] == ADALORA
        layers = raw.get("layers_to_transform")
        for field in ("layers_to_transform", "layers_pattern"):
            if isinstance(targets, str) and raw.get(field) is not None:
                raise InvalidArgument("goes with a list of target_modules, not with an expression", field=field)
        trained_on = raw.get("base_model_name_or_path")
        rank_field, usual_rank = ("init_r", 12) if adaptive else ("r", 8)
        ranks = mapping("rank_pattern", raw.get("rank_pattern"))
        config = cls(
            peft_type=raw["peft_type"],
            r=integer(rank_field, raw.get(rank_field, usual_rank), 1, limits.max_rank),
            lora_alpha=number("lora_alpha", raw.get("lora_alpha", 8)),
            target_modules=targets if isinstance(targets, str) else strings("target_modules", targets),
            exclude_modules=excluded if isinstance(excluded, str) else strings("exclude_modules", excluded),
            target_parameters=strings("target_parameters", raw.get("target_parameters")),
            old_experts=None,
            layers_to_transform=tuple(
                integer("layers_to_transform", layer, 0, limits.max_positions) for layer in items(layers)
            ),
            layers_pattern=strings("layers_pattern", items(raw.get("layers_pattern") or None)),
            rank_pattern=_kept_ranks(ranks, limits.max_rank)
            if adaptive
            else {key: integer(f"rank_pattern[{shown(key)}]", rank, 1, limits.max_rank) for key, rank in ranks.items()},
            alpha_pattern={
                key: number(f"alpha_pattern[{shown(key)}]", alpha)
                for key, alpha in mapping("alpha_pattern", raw.get("alpha_pattern")).items()
            },
            use_rslora=boolean("use_rslora", raw.get("use_rslora", False)),
            use_dora=boolean("use_dora", raw.get("use_dora", False)),
            lora_bias=boolean("lora_bias", raw.get("lora_bias", False)) and not adaptive,
            use_bdlora=None if adaptive else BlockDiagonal.parse(raw.get("use_bdlora")),
            init_lora_weights=raw.get("init_lora_weights", True),
            base_model_name_or_path=trained_on if isinstance(trained_on, str) and trained_on else None,
            modules_to_save=strings("modules_to_save", raw.get("modules_to_save")),
            ensure_weight_tying=raw.get("ensure_weight_tying") is True,
            trainable_token_indices=token_lists("trainable_token_indices", raw.get("trainable_token_indices")),
            alora_invocation_tokens=token_lists(
                "alora_invocation_tokens", raw.get("alora_invocation_tokens"), are_distinct=False
            ).get("", ()),
            has_training_tensors=any(raw.get(field) is not None for field in ("velora_config", "monteclora_config")),
            layer_replication=ranges(raw.get("layer_replication"), limits.max_positions),
            max_positions=limits.max_positions,
            deadline=time.monotonic() + MATCHING_SECONDS,
        )
        for field, value in (("target_modules", targets), ("exclude_modules", excluded)):
            check_expressions(field, [value] if isinstance(value, str) else [], "{}")
        for field in ("layers_pattern", *([] if adaptive else ["rank_pattern"]), "alpha_pattern"):
            # PEFT puts them into another expression, where a flag for the whole one, such as (?i), is an error.
            check_expressions(field, getattr(config, field), "({})")
        if not config.target_modules and not config.target_parameters:
            raise InvalidArgument("names no module", field="target_modules")
        if config.layers_pattern and layers is None:
            raise InvalidArgument("needs layers_to_transform", field="layers_pattern")
        return config._converted(OLD_EXPERTS.get(family or ""))

    def _converted(self, old: OldExperts | None) -> AdapterConfig:
        """The config with parameters as targets in place of the modules that they were, if it names such modules.

        Raises:
            FailedPrecondition: it adapts them by more than LoRA, or only a part of a parameter.
        """
        names = self.target_modules
        if isinstance(names, str) and old is not None and names.lower() == ALL_LINEAR:
            names = tuple(old.parameters)
        if old is None or self.peft_type == ADALORA or isinstance(names, str):
            return self
        given = Targets(names, self.target_parameters, self.rank_pattern, self.alpha_pattern)
        found = converted(given, old, self.r, self.lora_alpha)
        if found == given:
            return self
        for field in ("use_dora", "lora_bias", "use_bdlora", "alora_invocation_tokens"):
            if getattr(self, field):
                raise FailedPrecondition("is not supported for the modules of experts or routers", field=field)
        return replace(
            self,
            target_modules=self.target_modules if isinstance(self.target_modules, str) else found.modules,
            target_parameters=found.parameters,
            rank_pattern=found.ranks,
            alpha_pattern=found.alphas,
            old_experts=old,
        )

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that says what the weights mean, in hexadecimal; the stack apart."""
        meaning = replace(self, layer_replication=None, max_positions=0, deadline=0.0)
        return hashlib.sha256(repr(meaning).encode()).hexdigest()

    def stack(self, layers: int) -> Stack:
        """The stack that the adapter was trained on.

        Args:
            layers: number of layers of the base.

        Raises:
            InvalidArgument: the ranges leave the base or are over the limit of positions.
        """
        if self.layer_replication is None:
            return tuple(range(layers))
        return stack_from_ranges(self.layer_replication, layers, max_positions=self.max_positions)

    def targets(self, path: str) -> bool:
        """Whether the linear module at a path, such as "model.layers.3.self_attn.q_proj", is adapted.

        Raises:
            InvalidArgument: an expression is malformed or takes too long to match.
        """
        if self._names("exclude_modules", self.exclude_modules, path):
            return False
        names = self.target_modules
        if isinstance(names, str):
            if names.lower() == ALL_LINEAR:
                return self.old_experts is None or path.rpartition(".")[2] not in self.old_experts.parameters
            return self._names("target_modules", names, path)
        if path in names:  # as in PEFT, where layers_to_transform selects among paths that end in a name
            return True
        if not self._names("target_modules", names, path):
            return False
        if not self.layers_to_transform:
            return True
        for pattern in self.layers_pattern or (r"[^.]*",):
            before = r"(?:^|.*?\.)" if self.layers_pattern else r".*?\."
            found = self._match("layers_pattern", rf"{before}{pattern}\.(?P<position>\d+)\.", path)
            if found is not None:
                return int(found["position"]) in self.layers_to_transform
        return False

    def parameter_forms(self, prefix: str, parameters: Mapping[str, ParameterShape]) -> dict[str, Form]:
        """The entries of a layer's parameters, by their paths there.

        Args:
            prefix: path of the layer.
            parameters: those that may be adapted.
        """
        names = self.target_parameters
        targeted = [path for path in parameters if self._names("target_parameters", names, f"{prefix}.{path}")]
        files = file_modules(targeted, self.old_experts)
        return {
            path: Form(
                self.rank(f"{prefix}.{path}"),
                parameters[path].shape,
                has_c=False,
                has_bias=False,
                experts=parameters[path].experts,
                expert_modules=files[path][1],
                file_module=files[path][0],
            )
            for path in targeted
        }

    def targets_end(self, path: str) -> bool:
        """Whether the model's head or embedding at a path is adapted. Raises as `targets`."""
        names = self.target_modules
        return not (isinstance(names, str) and names.lower() == ALL_LINEAR) and self.targets(path)

    def ties(self, names: str | tuple[str, ...]) -> bool:
        """Whether an expression or names of modules are for a head or an embedding that PEFT knows and can tie."""
        if isinstance(names, str):
            return any(self._names("target_modules", names, end) for end in TIED_NAMES)
        return any(name.rpartition(".")[2] in TIED_NAMES for name in names)

    def form(self, path: str, shape: tuple[int, int]) -> Form:
        """The entry of the linear module at a path.

        Args:
            shape: (out, in) of its weight.

        Raises:
            InvalidArgument: its blocks do not divide the shape, or a pattern cannot be matched.
        """
        a_blocks, b_blocks = (1, 1) if self.use_bdlora is None else self.use_bdlora.blocks(path)
        rank = self.rank(path)
        for blocks, sizes in ((a_blocks, (rank, shape[1])), (b_blocks, (rank, shape[0]))):
            if any(size % blocks for size in sizes):
                raise InvalidArgument(f"{blocks} blocks do not divide {sizes} of {path}", field="use_bdlora")
        return Form(
            rank,
            shape,
            self.use_dora,
            self.lora_bias,
            a_blocks=a_blocks,
            b_blocks=b_blocks,
            has_e=self.peft_type == ADALORA,
        )

    def rank(self, path: str) -> int:
        """The rank r of the module at a path; 0 where AdaLoRA has left none."""
        if self.peft_type == ADALORA:
            return self.rank_pattern.get(path, self.r)
        key = self._first("rank_pattern", self.rank_pattern, path)
        return self.r if key is None else self.rank_pattern[key]

    @property
    def pruned(self) -> Sequence[str]:
        """Paths of the modules of which AdaLoRA has left no rank, as the config has them."""
        return [path for path, rank in self.rank_pattern.items() if not rank] if self.peft_type == ADALORA else []

    def scaling(self, path: str) -> float:
        """The factor of B A x at a path: alpha/r (Hu et al., 2021), alpha/√r (Kalajdzievski, 2023), or AdaLoRA's."""
        if self.peft_type == ADALORA:  # over the rank at first, also where less is left of it
            return (self.lora_alpha if self.lora_alpha > 0 else self.rank(path)) / (self.r + ADALORA_EPSILON)
        key = self._first("alpha_pattern", self.alpha_pattern, path)
        alpha = self.lora_alpha if key is None else self.alpha_pattern[key]
        rank = self.rank(path)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def _names(self, field: str, names: str | tuple[str, ...], path: str) -> bool:
        """Whether an expression matches a path, or one of the names is it or its end."""
        if isinstance(names, str):
            return bool(names) and self._match(field, names, path, whole=True) is not None
        return path in names or any(path.endswith(f".{name}") for name in names)

    def _first(self, field: str, patterns: Mapping[str, Any], path: str) -> str | None:
        """The first pattern that a path ends in, as in PEFT's `get_pattern_key`."""
        return next((p for p in patterns if self._match(field, rf"(.*\.)?({p})$", path) is not None), None)

    def _match(self, field: str, pattern: str, path: str, *, whole: bool = False) -> regex.Match[str] | None:
        match = regex.fullmatch if whole else regex.match
        try:
            # `concurrent` lets other threads run meanwhile.
            return match(pattern, path, timeout=max(self.deadline - time.monotonic(), 1e-3), concurrent=True)
        except TimeoutError as error:
            raise InvalidArgument(f"its patterns take over {MATCHING_SECONDS} s to match", field=field) from error
        except (regex.error, RecursionError, OverflowError, ValueError) as error:
            raise InvalidArgument(f"{shown(pattern)} is not a regular expression: {error}", field=field) from error


def _kept_ranks(pattern: Mapping[str, Any], most: int) -> dict[str, int]:
    """The ranks that AdaLoRA has kept, by whole paths: its `rank_pattern` says of each rank whether it is kept."""
    ranks: dict[str, int] = {}
    for name, kept in pattern.items():
        field = f"rank_pattern[{shown(name)}]"
        if not isinstance(kept, list) or not all(isinstance(one, bool) for one in kept) or len(kept) > most:
            raise InvalidArgument(f"{shown(kept)} is not a list of up to {most} times true or false", field=field)
        ranks[name.rpartition(".lora_")[0]] = sum(kept)
    return ranks


def check_name(name: str) -> None:
    """Checks that a text can be an adapter's name. Raises InvalidArgument."""
    if not name or len(name) > MAX_NAME or name != name.strip() or "," in name or not name.isprintable():
        raise InvalidArgument(
            f"{name!r} is not 1 to {MAX_NAME} printable characters without commas or edge spaces", field="name"
        )
