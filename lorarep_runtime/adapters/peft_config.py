"""`adapter_config.json`, checked: what each module of the base gets of an adapter. `peft_fields` has every field."""

from __future__ import annotations

import hashlib
import math
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import regex

from lorarep_runtime.adapters.peft_fields import ADALORA, check_fields, default_targets
from lorarep_runtime.config import AdapterLimits
from lorarep_runtime.errors import InvalidArgument, shown
from lorarep_runtime.model.compiled_adapter import Form
from lorarep_runtime.model.stack import Stack, stack_from_ranges

MAX_NAME = 256

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
ADALORA_EPSILON = 1e-5
"""PEFT adds it to the rank that it divides by."""
MATCHING_SECONDS = 10.0
"""Time limit for all matches of one adapter's patterns."""


@dataclass(frozen=True)
class BlockDiagonal:
    """BD-LoRA: modules whose A or B is block-diagonal, with the blocks alone in the file."""

    nblocks: int
    target_modules_bd_a: tuple[str, ...]
    """Parts of the paths of modules with a block-diagonal A."""
    target_modules_bd_b: tuple[str, ...]
    match_strict: bool
    """Whether each module has to be among them."""

    @classmethod
    def parse(cls, raw: Any) -> BlockDiagonal | None:
        """Checks the value of `use_bdlora`. Raises InvalidArgument, also for keys that nobody knows."""
        fields = dict(_mapping("use_bdlora", raw or None))
        if raw is None or raw is False:
            return None
        block = cls(
            nblocks=_integer("use_bdlora", fields.pop("nblocks", 1), 1, 1 << 16),
            target_modules_bd_a=_strings("use_bdlora", fields.pop("target_modules_bd_a", None)),
            target_modules_bd_b=_strings("use_bdlora", fields.pop("target_modules_bd_b", None)),
            match_strict=_boolean("use_bdlora", fields.pop("match_strict", True)),
        )
        if fields:
            raise InvalidArgument(f"has {shown(min(fields))}, which nobody knows", field="use_bdlora")
        return block

    def blocks(self, path: str) -> tuple[int, int]:
        """Number of blocks of A and of B of the module at a path.

        Raises:
            InvalidArgument: both are block-diagonal, or none although `match_strict` asks for one.
        """
        a, b = (any(part in path for part in parts) for parts in (self.target_modules_bd_a, self.target_modules_bd_b))
        if (a and b) or (self.match_strict and not a and not b):
            raise InvalidArgument(f"names {path} for {'both' if a else 'neither'} of A and B", field="use_bdlora")
        return self.nblocks if a else 1, self.nblocks if b else 1


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
        ranks = _mapping("rank_pattern", raw.get("rank_pattern"))
        config = cls(
            peft_type=raw["peft_type"],
            r=_integer(rank_field, raw.get(rank_field, usual_rank), 1, limits.max_rank),
            lora_alpha=_number("lora_alpha", raw.get("lora_alpha", 8)),
            target_modules=targets if isinstance(targets, str) else _strings("target_modules", targets),
            exclude_modules=excluded if isinstance(excluded, str) else _strings("exclude_modules", excluded),
            layers_to_transform=tuple(
                _integer("layers_to_transform", layer, 0, limits.max_positions) for layer in _items(layers)
            ),
            layers_pattern=_strings("layers_pattern", _items(raw.get("layers_pattern") or None)),
            rank_pattern=_kept_ranks(ranks, limits.max_rank)
            if adaptive
            else {
                key: _integer(f"rank_pattern[{shown(key)}]", rank, 1, limits.max_rank) for key, rank in ranks.items()
            },
            alpha_pattern={
                key: _number(f"alpha_pattern[{shown(key)}]", alpha)
                for key, alpha in _mapping("alpha_pattern", raw.get("alpha_pattern")).items()
            },
            use_rslora=_boolean("use_rslora", raw.get("use_rslora", False)),
            use_dora=_boolean("use_dora", raw.get("use_dora", False)),
            lora_bias=_boolean("lora_bias", raw.get("lora_bias", False)) and not adaptive,
            use_bdlora=None if adaptive else BlockDiagonal.parse(raw.get("use_bdlora")),
            init_lora_weights=raw.get("init_lora_weights", True),
            base_model_name_or_path=trained_on if isinstance(trained_on, str) and trained_on else None,
            has_training_tensors=any(raw.get(field) is not None for field in ("velora_config", "monteclora_config")),
            layer_replication=_ranges(raw.get("layer_replication"), limits.max_positions),
            max_positions=limits.max_positions,
            deadline=time.monotonic() + MATCHING_SECONDS,
        )
        for field, value in (("target_modules", targets), ("exclude_modules", excluded)):
            _check_expressions(field, [value] if isinstance(value, str) else [], "{}")
        for field in ("layers_pattern", *([] if adaptive else ["rank_pattern"]), "alpha_pattern"):
            # PEFT puts them into another expression, where a flag for the whole one, such as (?i), is an error.
            _check_expressions(field, getattr(config, field), "({})")
        if not config.target_modules:
            raise InvalidArgument("names no module", field="target_modules")
        if config.layers_pattern and layers is None:
            raise InvalidArgument("needs layers_to_transform", field="layers_pattern")
        return config

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

    def targets_head(self, path: str) -> bool:
        """Whether the model's head is adapted, which "all-linear" leaves out."""
        names = self.target_modules
        return not (isinstance(names, str) and names.lower() == ALL_LINEAR) and self.targets(path)

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

    def scaling(self, path: str) -> float:
        """The factor of B A x at a path: alpha/r (Hu et al., 2021), alpha/√r (Kalajdzievski, 2023), or AdaLoRA's."""
        if self.peft_type == ADALORA:  # by the rank at first, also where less is left of it
            return (self.lora_alpha if self.lora_alpha > 0 else self.r) / (self.r + ADALORA_EPSILON)
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


def _kept_ranks(pattern: Mapping[str, Any], most: int) -> dict[str, int]:
    """The ranks that AdaLoRA has kept, by whole paths: its `rank_pattern` says of each rank whether it is kept."""
    ranks: dict[str, int] = {}
    for name, kept in pattern.items():
        field = f"rank_pattern[{shown(name)}]"
        if not isinstance(kept, list) or not all(isinstance(one, bool) for one in kept) or len(kept) > most:
            raise InvalidArgument(f"{shown(kept)} is not a list of up to {most} times true or false", field=field)
        ranks[name.rpartition(".lora_")[0]] = sum(kept)
    return ranks


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
