"""Goals for one H100, and the figures measured there: by name, in JSON files.

    python -m benchmarks.gpu.goals FILE...

prints a table of measured figures and goals. Figures of later files replace those of earlier ones.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BATCHES = (1, 8, 16, 32)
CASES = {
    "none": "no adapter",
    "lora": "a LoRA each, r=8",
    "dora": "a DoRA each, r=8",
    "mixed": "LoRA and DoRA, r=4 to 64",
    "48": "48 positions, no adapter",
    "half": "half of them on the base's 32",
}
"""Cases of decoding: the rows of a batch. All but the last two walk 64 positions of Mistral-7B."""
PEFT_CASES = ("none", "lora", "dora")
"""Cases that PEFT can compute too, with one adapter for all rows."""
STEPS: Mapping[tuple[str, str], Mapping[int, float]] = {
    ("nf4", "none"): {1: 5.5, 8: 5.8, 16: 6.3, 32: 8.0},
    ("nf4", "lora"): {1: 6.5, 8: 7.0, 16: 8.0, 32: 10.0},
    ("nf4", "mixed"): {1: 7.0, 8: 7.5, 16: 8.5, 32: 11.0},
    ("int8", "none"): dict.fromkeys(BATCHES, 8.0),
    ("none", "none"): {8: 12.3, 32: 13.2},
    ("none", "lora"): {8: 22.9, 32: 45.9},
}
"""Goals in milliseconds a step, at most: by quantization, case and batch, at 64 positions and prompts of 128 tokens.
The goals of unquantized weights are vLLM's times."""
VLLM_NF4 = {1: 15.6, 8: 34.0, 32: 58.5}
VLLM_BF16 = {1: 17.1, 8: 22.9, 32: 45.9}
VLLM_BF16_ADAPTERS = {1: 17.9, 32: 45.9}
"""Milliseconds a step of vLLM 0.20.2 on an H100 with the stack materialised. The first two are by batch, each row with
its own LoRA; the last is of 32 rows, by the number of their adapters."""


class Figures:
    """Numbers by name ("nf4/decode/lora/8"), kept in a file from the moment they are measured."""

    def __init__(self, file: Path | None = None, others: Iterable[Path] = ()) -> None:
        self._file = file
        self.all: dict[str, dict[str, Any]] = {}
        for one in (*others, *([file] if file is not None and file.exists() else [])):
            self.all.update(json.loads(one.read_text()))

    def put(self, name: str, **numbers: Any) -> None:
        """Stores one figure. Processes that share a file have to run one after the other."""
        self.all[name] = numbers
        if self._file is not None:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._file.write_text(json.dumps(self.all, indent=1))

    def get(self, name: str, number: str) -> float | None:
        return self.all.get(name, {}).get(number)

    def ratio(self, one: str, other: str, number: str = "ms") -> float | None:
        a, b = self.get(one, number), self.get(other, number)
        return None if a is None or b is None else a / b

    def by_number(self, prefix: str, number: str = "ms") -> dict[int, float]:
        """Values of the figures named `prefix` and a number, by that number."""
        ends = {name.removeprefix(prefix): name for name in self.all if name.startswith(prefix)}
        return {int(end): self.all[ends[end]][number] for end in sorted(filter(str.isdecimal, ends), key=int)}


def add_figure_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of benchmarks that load a quantized base and store figures in a file."""
    parser.add_argument("--quantization", default="nf4")
    parser.add_argument("--json", type=Path)


@dataclass(frozen=True)
class Goal:
    what: str
    measured: Callable[[Figures], float | None]
    asked: float
    unit: str
    at_least: bool = False
    """The goal is a lower bound; otherwise it is an upper bound."""


def _number(name: str, number: str) -> Callable[[Figures], float | None]:
    return lambda figures: figures.get(name, number)


def _over(one: str, other: str, number: str = "ms") -> Callable[[Figures], float | None]:
    return lambda figures: figures.ratio(one, other, number)


def _share(name: str, part: str) -> Callable[[Figures], float | None]:
    def share(figures: Figures) -> float | None:
        some, base = figures.get(name, part), figures.get(name, "base_bytes")
        return None if some is None or base is None else 100 * some / base

    return share


def _floors(name: str) -> Callable[[Figures], float | None]:
    def floors(figures: Figures) -> float | None:
        ms, floor = figures.get(name, "ms"), figures.get(name, "floor_ms")
        return ms / floor if ms and floor else None

    return floors


def _load_goals(kind: str, ready_ms: float) -> Sequence[Goal]:
    """Goals for adapters of 48 positions, which load into an idle engine or while streams decode."""
    shared, drawn = f"nf4/interference/{kind}", f"nf4/interference-drawn/{kind}"
    return [
        Goal(f"48 positions from files to ready, {kind}", _number(f"nf4/load/{kind}", "ms"), ready_ms, "ms"),
        Goal(f"48 positions while streams decode, {kind}", _number(shared, "ready_ms"), ready_ms, "ms"),
        Goal(f"streams' longest gap during a load, {kind}", _number(shared, "longest_gap"), 1.5, "times"),
        Goal(f"streams' longest gap, tokens drawn, {kind}", _number(drawn, "longest_gap"), 1.5, "times"),
    ]


GOALS: Sequence[Goal] = [
    *(
        Goal(f"DoRA over LoRA, batch {n}", _over(f"nf4/decode/dora/{n}", f"nf4/decode/lora/{n}"), 1.03, "times")
        for n in BATCHES
    ),
    *(
        Goal(f"depths 32 and 48 over 48, batch {n}", _over(f"nf4/decode/half/{n}", f"nf4/decode/48/{n}"), 1.15, "times")
        for n in BATCHES[1:]
    ),
    *(
        Goal(f"{CASES['lora']}, tokens drawn, batch {n}", _number(f"nf4/drawn/lora/{n}", "ms"), asked, "ms")
        for n, asked in STEPS["nf4", "lora"].items()
    ),
    Goal("bf16 over its floor, batch 1", _floors("none/decode/none/1"), 1.25, "times"),
    *(
        Goal(
            f"device idle between steps, {CASES[c]}, batch {n}", _number(f"nf4/decode/timeline/{c}/{n}", "idle"), 5, "%"
        )
        for c in ("none", "lora")
        for n in (8, 32)
    ),
    *(
        Goal(
            f"device idle between steps, tokens drawn, batch {n}",
            _number(f"nf4/drawn/timeline/lora/{n}", "idle"),
            5,
            "%",
        )
        for n in (8, 32)
    ),
    *(
        Goal(f"tokens likeliest for PEFT but for, {kind}", _number(f"nf4/peft/check/{kind}", "gap"), 0.2, "std")
        for kind in ("lora", "dora")
    ),
    Goal("2,048 tokens alone, first token", _number("nf4/interference/prompt", "alone_ms"), 200, "ms"),
    Goal("8 streams meanwhile, time per token over before", _number("nf4/interference/prompt", "slower"), 2, "times"),
    *_load_goals("lora", 150),
    *_load_goals("dora", 400),
    Goal("8,192 tokens, over reading what is added", _number("nf4/interference/long", "floors"), 1.3, "times"),
    Goal(
        "1,000 adapters over what fits, tokens/s", _number("nf4/interference/zipf", "kept"), 0.7, "times", at_least=True
    ),
    Goal("base", _number("nf4/memory", "base_gib"), 4.215, "GiB"),  # 4.21, rounded
    Goal("other memory over the base: device", _share("nf4/memory", "device_rest"), 5, "%"),
    Goal("other memory over the base: allocator", _share("nf4/memory", "reserved_rest"), 5, "%"),
    Goal("ledger and allocator apart", _number("nf4/memory", "ledger_apart"), 1, "%"),
    Goal("base to ready, over transformers' own loading", _number("nf4/load/base", "longer_s"), 20, "s"),
]


def print_all(figures: Figures) -> None:
    for quantization in ("nf4", "int8", "none"):
        print_steps(figures, quantization)
    print(f"{'':56}{'measured':>10}{'asked':>10}")
    for goal in GOALS:
        value, bound = goal.measured(figures), "at least" if goal.at_least else "at most"
        shown = "-" if value is None else f"{value:.2f}"
        said = verdict(value, goal.asked, goal.at_least)
        print(f"{goal.what:56}{shown:>10}{goal.asked:>10g} {goal.unit:6}{bound:9}{said}")


def print_steps(figures: Figures, quantization: str) -> None:
    about = figures.all.get(f"{quantization}/decode/about")
    if about is None:
        return
    print(
        f"{quantization}: {about['device']}, torch {about['torch']}, copying moves {about['bandwidth'] / 1e12:.2f} TB/s"
    )
    heads = ("batch", "ms/step", "tokens/s", "x floor", "PEFT is x", "asked")
    print(f"{'':30}" + "".join(f"{head:>10}" for head in heads))
    for case, title in CASES.items():
        asked = STEPS.get((quantization, case), {})
        measured = figures.by_number(f"{quantization}/decode/{case}/")
        for batch in sorted({*measured, *asked}):
            ms, name = measured.get(batch), f"{quantization}/decode/{case}/{batch}"
            peft = figures.ratio(f"{quantization}/peft/{case}/{batch}", name)
            cells = [None, None, None] if ms is None else [ms, 1e3 * batch / ms, _floors(name)(figures)]
            line = "".join(
                f"{'-' if cell is None else f'{cell:.{d}f}':>10}" for cell, d in zip(cells, (2, 0, 2), strict=True)
            )
            line += f"{'-' if peft is None else f'{peft:.1f}':>10}"
            if batch in asked:
                line += f"{asked[batch]:>10.1f}  {verdict(ms, asked[batch])}"
            print(f"{title:30}{batch:>10}{line}")
    print()


def verdict(value: float | None, asked: float, at_least: bool = False) -> str:
    if value is None:
        return "not measured"
    return "holds" if (value >= asked if at_least else value <= asked) else "MISSED"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    print_all(Figures(others=parser.parse_args().files))
