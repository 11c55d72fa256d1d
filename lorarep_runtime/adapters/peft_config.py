"""`adapter_config.json`, checked: every field is consumed, known to have no effect at inference, or refused by name.

The fields and their meaning are those of PEFT's LoraConfig: https://huggingface.co/docs/peft/package_reference/lora.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import regex

from lorarep_runtime.config import AdapterLimits
from lorarep_runtime.errors import FailedPrecondition, InvalidArgument, shown
from lorarep_runtime.model.stack import Stack, stack_from_ranges

MAX_NAME = 256

NO_EFFECT = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",  # of modules_to_save, which are refused
    "eva_config",
    "fan_in_fan_out",  # of Conv1D; PEFT resets it over linear layers
    "inference_mode",
    "lora_dropout",
    "lora_ga_config",
    "loftq_config",
    "megatron_core",
    "monteclora_config",  # PEFT itself ignores it unless it trains
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
}
"""Fields that matter for training alone, or that detail a feature which another field turns on."""
EXPECTED: Mapping[str, tuple[object, ...]] = {
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM", None),
    "bias": ("none",),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),  # others change the base's own weights
}
"""Fields whose value has to be one of these."""
CONSUMED = {
    "alpha_pattern",
    "exclude_modules",
    "layer_replication",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_bias",
    "r",
    "rank_pattern",
    "target_modules",
    "use_dora",
    "use_rslora",
}
"""Fields that `AdapterConfig` keeps."""
ALL_LINEAR = "all-linear"
"""The value of `target_modules` that stands for every linear module."""
_PLAIN = re.compile(r"[\w.]*")
_BRACES = re.compile(r"\{[^{}]*\}")
_ANOTHERS = re.compile(r"\{(?!\d*,?\d*\})|\[:\^?\w+:\]")
"""What means something to `regex`, which matches here, and only its own characters to `re`, which PEFT uses: errors
that are allowed, such as "{e<=1}", and POSIX classes. No path of a module has any of these characters."""
MAX_PATTERNS = 8192
"""Most names or patterns in one field."""
MAX_REPEATED = 100_000
"""Most characters that the repeats of one field's patterns add when they are written out. `regex` writes them out to
compile a pattern, so that a few nested repeats could take all memory."""
MATCHING_SECONDS = 10.0
"""Time limit for all matches of one adapter's patterns."""


@dataclass(frozen=True)
class AdapterConfig:
    """The fields of an adapter's config that matter at inference, named as in PEFT's LoraConfig."""

    r: int
    lora_alpha: float
    target_modules: str | tuple[str, ...]
    """A regular expression that matches whole paths of modules, or the names that such paths end in."""
    exclude_modules: str | tuple[str, ...]
    """Modules that are not adapted although they are targets, in the same form."""
    layers_to_transform: tuple[int, ...]
    """Positions that are adapted; empty means all."""
    layers_pattern: tuple[str, ...]
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    use_rslora: bool
    use_dora: bool
    lora_bias: bool
    layer_replication: tuple[tuple[int, int], ...] | None
    max_positions: int
    deadline: float
    """`time.monotonic()` seconds until which patterns may be matched."""

    @classmethod
    def parse(cls, raw: Mapping[str, Any], limits: AdapterLimits) -> AdapterConfig:
        """Checks a config.

        Args:
            raw: the JSON object of `adapter_config.json`.
            limits: what an adapter may ask for.

        Raises:
            InvalidArgument: a value is malformed or over a limit.
            FailedPrecondition: a field asks for something that cannot be served exactly.
        """
        _check_supported(raw)
        targets, excluded = raw.get("target_modules"), raw.get("exclude_modules")
        layers = raw.get("layers_to_transform")
        for field in ("layers_to_transform", "layers_pattern"):
            if isinstance(targets, str) and raw.get(field) is not None:
                raise InvalidArgument("goes with a list of target_modules, not with an expression", field=field)
        config = cls(
            r=_integer("r", raw.get("r", 8), 1, limits.max_rank),
            lora_alpha=_number("lora_alpha", raw.get("lora_alpha", 8)),
            target_modules=targets if isinstance(targets, str) else _strings("target_modules", targets),
            exclude_modules=excluded if isinstance(excluded, str) else _strings("exclude_modules", excluded),
            layers_to_transform=tuple(
                _integer("layers_to_transform", layer, 0, limits.max_positions) for layer in _items(layers)
            ),
            layers_pattern=_strings("layers_pattern", _items(raw.get("layers_pattern") or None)),
            rank_pattern={
                key: _integer(f"rank_pattern[{shown(key)}]", rank, 1, limits.max_rank)
                for key, rank in _mapping("rank_pattern", raw.get("rank_pattern")).items()
            },
            alpha_pattern={
                key: _number(f"alpha_pattern[{shown(key)}]", alpha)
                for key, alpha in _mapping("alpha_pattern", raw.get("alpha_pattern")).items()
            },
            use_rslora=_boolean("use_rslora", raw.get("use_rslora", False)),
            use_dora=_boolean("use_dora", raw.get("use_dora", False)),
            lora_bias=_boolean("lora_bias", raw.get("lora_bias", False)),
            layer_replication=_ranges(raw.get("layer_replication"), limits.max_positions),
            max_positions=limits.max_positions,
            deadline=time.monotonic() + MATCHING_SECONDS,
        )
        for field, value in (("target_modules", targets), ("exclude_modules", excluded)):
            _check_expressions(field, [value] if isinstance(value, str) else [], "{}")
        for field in ("layers_pattern", "rank_pattern", "alpha_pattern"):
            # PEFT puts them into another expression, where a flag for the whole one, such as (?i), is an error.
            _check_expressions(field, getattr(config, field), "({})")
        if not config.target_modules:
            raise InvalidArgument("names no module", field="target_modules")
        if config.layers_pattern and layers is None:
            raise InvalidArgument("needs layers_to_transform", field="layers_pattern")
        if config.use_dora and config.lora_bias:
            raise InvalidArgument("does not go with use_dora", field="lora_bias")
        return config

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
            return names.lower() == ALL_LINEAR or self._names("target_modules", names, path)
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

    def rank(self, path: str) -> int:
        """The rank r of the module at a path."""
        key = self._first("rank_pattern", self.rank_pattern, path)
        return self.r if key is None else self.rank_pattern[key]

    def scaling(self, path: str) -> float:
        """The factor of B A x at a path: alpha/r (Hu et al., 2021), or alpha/√r (Kalajdzievski, 2023)."""
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


def _check_supported(raw: Mapping[str, Any]) -> None:
    """Refuses a config whose fields, or their values, ask for something unknown."""
    for field, value in raw.items():
        if field in EXPECTED:
            # The types have to be equal as well: True == 1.
            if not any(value == known and type(value) is type(known) for known in EXPECTED[field]):
                raise FailedPrecondition(f"{shown(value)} is not supported; {EXPECTED[field]} are", field=field)
        elif field not in CONSUMED | NO_EFFECT and value not in (None, False, [], {}):
            raise FailedPrecondition(f"is not supported, and is {shown(value)}", field=field)
    if "peft_type" not in raw:
        raise InvalidArgument("is missing", field="peft_type")


def _ranges(value: Any, max_positions: int) -> tuple[tuple[int, int], ...] | None:
    if not value and not isinstance(value, bool | int):
        return None
    # Checked over a base of any size: ranges that are wrong on every base are refused without one.
    stack_from_ranges(value, 2**31, max_positions=max_positions)
    return tuple((start, end) for start, end in value)


def _items(value: Any) -> Sequence[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]


def _strings(field: str, value: Any) -> tuple[str, ...]:
    if value is not None and not isinstance(value, list):
        raise InvalidArgument(f"{shown(value)} is not a list of names", field=field)
    items = value or []
    for item in items:
        if not isinstance(item, str) or not item:
            raise InvalidArgument(f"{shown(item)} is not a name", field=field)
    _check_count(field, items)
    return tuple(items)


def _mapping(field: str, value: Any) -> Mapping[str, Any]:
    if value is not None and not isinstance(value, dict):
        raise InvalidArgument(f"{shown(value)} is not an object", field=field)
    _check_count(field, value or {})
    return value or {}


def _check_count(field: str, items: Sequence[Any] | Mapping[str, Any]) -> None:
    if len(items) > MAX_PATTERNS:
        raise InvalidArgument(f"{len(items)} entries are over the limit of {MAX_PATTERNS}", field=field)


def _check_expressions(field: str, patterns: Iterable[str], whole: str) -> None:
    """Refuses patterns that would take all memory to compile, and patterns that PEFT's own `re` does not know.

    Repeats within repeats take memory; recursion and other extensions of `regex` are unknown to `re`.

    Args:
        whole: the expression that PEFT puts a pattern into, in place of its braces.
    """
    added = 0
    for pattern in patterns:
        # Counted as if each repeat were nested in the one before. Braces that are no repeats only lower the limit.
        times = 1
        for brace in _BRACES.findall(pattern):
            count = max(map(int, re.findall(r"[0-9]{1,9}", brace)), default=1)
            times = min(times * max(count, 1), MAX_REPEATED + 1)
        added += len(pattern) * (times - 1)
        if added > MAX_REPEATED:
            raise InvalidArgument(
                f"its repeats written out are over the limit of {MAX_REPEATED} characters", field=field
            )
        if found := _ANOTHERS.search(pattern):
            raise InvalidArgument(f"{shown(pattern)} has {found[0]!r}, which is no part of any path", field=field)
        if not _PLAIN.fullmatch(pattern):
            try:
                re.compile(whole.format(pattern))
            except (re.error, RecursionError, OverflowError, ValueError) as error:
                raise InvalidArgument(f"{shown(pattern)} is not a regular expression: {error}", field=field) from error


def _integer(field: str, value: Any, low: int, high: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise InvalidArgument(f"{shown(value)} is not a whole number from {low} to {high}", field=field)
    return value


def _number(field: str, value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < 1e30:
        raise InvalidArgument(f"{shown(value)} is not a finite number", field=field)
    return float(value)


def _boolean(field: str, value: Any) -> bool:
    if value is not None and not isinstance(value, bool):
        raise InvalidArgument(f"{shown(value)} is not true or false", field=field)
    return bool(value)


def check_name(name: str) -> None:
    """Checks that a text can be an adapter's name. Raises InvalidArgument."""
    if not name or len(name) > MAX_NAME or name != name.strip() or "," in name or not name.isprintable():
        raise InvalidArgument(
            f"{name!r} is not 1 to {MAX_NAME} printable characters without commas or edge spaces", field="name"
        )
