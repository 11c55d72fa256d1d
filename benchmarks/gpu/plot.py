"""Draws step times by batch size and by number of adapters, and what many requests get, from the figures of
`benchmarks.gpu.table`.

    python -m benchmarks.gpu.plot FILE... [--quantization nf4] [--to benchmarks/results]

makes `batches.svg`, `distinct.svg` and `offered.svg`. Lines without figures are left out. vLLM's figures are in
`benchmarks.gpu.goals`; they come from another GPU of the same kind, and vLLM materialises the stack.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from benchmarks.gpu.goals import VLLM_BF16, VLLM_BF16_ADAPTERS, VLLM_NF4, Figures

RESULTS = Path(__file__).resolve().parents[1] / "results"
OURS, OTHER, PEFT, VLLM, VLLM_TOO = "#2a6f97", "#61a5c2", "#c1121f", "#7f7f7f", "#b0b0b0"
TICKS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--quantization", default="nf4")
    parser.add_argument("--to", type=Path, default=RESULTS)
    options = parser.parse_args()
    figures = Figures(others=options.files)
    by_batch(figures, options.quantization, options.to / "batches.svg")
    by_adapters(figures, options.quantization, options.to / "distinct.svg")
    by_offered(figures, options.quantization, options.to / "offered.svg")


def by_batch(figures: Figures, quantization: str, file: Path) -> None:
    prefix, title = f"{quantization}/sweep", quantization.upper()
    figure, axes = framed("rows of a step", "64 positions of Mistral-7B, ms a step")
    line(axes, figures.by_number(f"{prefix}/lora/"), "lorarep, a LoRA each", OURS)
    line(axes, figures.by_number(f"{prefix}/lora/", "floor_ms"), "floor of that: reading its bytes", OURS, floor=True)
    line(axes, figures.by_number(f"{prefix}/none/"), "lorarep, no adapter", OTHER)
    line(axes, figures.by_number(f"{prefix}/none/", "floor_ms"), "floor of that", OTHER, floor=True)
    line(axes, figures.by_number(f"{quantization}/peft/lora/"), f"PEFT, {title}, one LoRA for all", PEFT)
    line(axes, VLLM_NF4, "vLLM, NF4, a LoRA each", VLLM)
    line(axes, VLLM_BF16, "vLLM, bf16, a LoRA each", VLLM_TOO)
    save(figure, file)


def by_adapters(figures: Figures, quantization: str, file: Path) -> None:
    prefix, title = f"{quantization}/sweep", quantization.upper()
    figure, axes = framed("LoRAs among the rows of a step", "64 positions of Mistral-7B, ms a step")
    for rows, colour, peft in ((256, OURS, PEFT), (32, OTHER, "#e5818a")):
        name = f"{prefix}/{rows} rows/"
        line(axes, figures.by_number(name), f"lorarep, {rows} rows", colour)
        line(axes, figures.by_number(name, "floor_ms"), f"floor of {rows} rows", colour, floor=True)
        one = figures.get(f"{quantization}/peft/lora/{rows}", "ms")
        line(axes, {} if one is None else {1: one}, f"PEFT, {title}, {rows} rows, one LoRA", peft)
    line(axes, VLLM_BF16_ADAPTERS, "vLLM, bf16, 32 rows", VLLM)
    save(figure, file)


def by_offered(figures: Figures, quantization: str, file: Path) -> None:
    """Tokens a second above, and the time to the first token below."""
    figure, (rates, firsts) = framed("requests offered at once", "tokens/s", "first token, ms")
    for adapters, label, colour in ((0, "no adapter", OTHER), (32, "32 LoRAs", OURS)):
        prefix = f"{quantization}/offered/{adapters} LoRAs/"
        line(rates, figures.by_number(prefix, "tokens_per_s"), label, colour)
        line(firsts, figures.by_number(prefix, "first_p50_ms"), f"{label}, median", colour)
        line(firsts, figures.by_number(prefix, "first_p99_ms"), f"{label}, 99th percentile", colour, floor=True)
    save(figure, file)


def framed(x_label: str, *y_labels: str) -> tuple[Any, Any]:
    """A figure, and its axes: as many as there are labels, one above the other, or one alone."""
    plt.rcParams["svg.hashsalt"] = "steps"  # the same file for the same numbers
    figure, axes = plt.subplots(len(y_labels), figsize=(8, 4.5 * len(y_labels)), layout="constrained")
    for one, y_label in zip(figure.axes, y_labels, strict=True):
        one.set(xscale="log", yscale="log", xlabel=x_label, ylabel=y_label)
    return figure, axes


def line(axes: Any, points: Mapping[int, float], label: str, colour: str, *, floor: bool = False) -> None:
    if points:
        style = dict(linestyle=":") if floor else dict(marker="o", markersize=4)
        axes.plot(list(points), list(points.values()), label=label, color=colour, **style)


def save(figure: Any, file: Path) -> None:
    for axes in figure.axes:
        axes.set_xticks(TICKS, [str(tick) for tick in TICKS])
        axes.minorticks_off()
        bottom, top = axes.get_ylim()
        ticks = [tick for tick in (10**power * n for power in range(5) for n in (1, 2, 5)) if bottom <= tick <= top]
        axes.set_yticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
