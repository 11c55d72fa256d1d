"""Steady decoding through the whole engine: milliseconds a step, and the floor.

    python -m benchmarks.gpu.decode [--layers 32] [--quantization nf4] [--batches 1,8,16,32] [--cases none,lora,...]
        [--timeline 8,32] [--distinct 1,8,32 --rows 32,256] [--temperature 0] [--deterministic] [--name decode]
        [--double-quantization] [--json FILE] [--folder DIR] [--device cuda]

The base has Mistral-7B's shape and random weights, is saved and loaded as any other; adapters cover all seven
projections of a stack of twice its depth. Before rows are timed, the tokens that decoding gives some of them are
compared with the base's own layers walked in `transformers`' code. The floor is what reading a step's weights,
adapters, keys and values once costs at the bandwidth that copying reaches.

`--timeline` profiles steps of those batches: how long the device has nothing to do between two, and what it does at a
position. `--distinct` times so many rows with so many adapters among them. At a `--temperature` their tokens are drawn.
`--device cpu` does all but the profile with a small base, to see that it runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.gpu.floor import copy_bandwidth, floor_bytes, weight_bytes
from benchmarks.gpu.goals import BATCHES, CASES, Figures, add_figure_options
from benchmarks.gpu.models import DEEP, Files, add_file_options
from benchmarks.gpu.timeline import profiled
from lorarep_runtime.adapters.lease import Lease
from lorarep_runtime.config import PAGE_TOKENS, BaseConfig, EngineConfig, SchedulerConfig
from lorarep_runtime.engine.engine import Engine
from lorarep_runtime.model.kv_cache import KVShape
from lorarep_runtime.request import Event, Output, Request, Sampling, Stopping

PROMPT_TOKENS = 128
NEW_TOKENS = 144
SKIPPED = 32
"""Tokens before and after those that are timed."""
MIDDLE_TOKENS = PROMPT_TOKENS + NEW_TOKENS // 2
CHECKED_TOKENS = 24
CHECKED_ROWS = 3
"""Rows compared before a figure is timed; they compute with all the others."""
LARGEST_GAP = 0.2
"""In standard deviations of the logits: how much likelier than the chosen token another may be, by rounding."""


def numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",") if n]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_file_options(parser)
    add_figure_options(parser)
    parser.add_argument("--batches", type=numbers, default=list(BATCHES))
    parser.add_argument("--cases", type=lambda text: text.split(","), default=list(CASES))
    parser.add_argument("--timeline", type=numbers, default=[])
    parser.add_argument("--distinct", type=numbers, default=[])
    parser.add_argument("--rows", type=numbers, default=[], help="Rows among which the --distinct adapters are.")
    add_temperature(parser)
    add_deterministic(parser)
    parser.add_argument("--double-quantization", action="store_true", help="NF4's scales are quantized once more.")
    parser.add_argument("--name", default="decode", help="The figures' name in the file.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run(Files(options.folder or Path(folder), options.layers, options.device), options)


def add_temperature(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="Temperature of the timed steps; 0 takes the likeliest tokens."
    )


def add_deterministic(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--deterministic", action="store_true", help="Each row's result is bitwise the same in any batch."
    )


def run(files: Files, options: argparse.Namespace) -> None:
    figures, prefix = Figures(options.json), f"{options.quantization}/{options.name}"
    most = max(options.batches + options.rows)
    given = {"double_quantization": options.double_quantization, "deterministic": options.deterministic}
    engine = started(files, options.quantization, most, **given)
    rows = {"none": [DEEP] * most, "48": ["48"] * most, "half": ["48", "base"] * -(-most // 2)}
    for case in options.cases:
        if case not in rows:
            loaded = max(options.batches + (options.distinct if case == "lora" else []))
            rows[case] = load(engine, files, case, loaded)
    checked = [rows[c][-1 if c == "mixed" else 0] for c in options.cases if c in ("lora", "dora", "mixed")]
    answers = check(engine, [*checked, DEEP, "48", "base"])
    (files.folder / f"answers-{options.quantization}.json").write_text(json.dumps(answers))
    bandwidth = copy_bandwidth(options.device)
    device = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    figures.put(f"{prefix}/about", device=device, torch=torch.__version__, bandwidth=bandwidth)
    weights = weight_bytes(engine, engine.stacks[DEEP]) / 1e9
    print(f"{device}: copying moves {bandwidth / 1e12:.2f} TB/s; weights of a step {weights:.2f} GB")

    def figure(name: str, names: Sequence[str]) -> str:
        check(engine, names, among=CHECKED_ROWS)
        step, floor = timed(engine, names, options.temperature), floor_bytes(engine, names, MIDDLE_TOKENS) / bandwidth
        figures.put(f"{prefix}/{name}", ms=step * 1e3, floor_ms=floor * 1e3)
        return f"{step * 1e3:9.2f}{floor * 1e3:7.2f}{step / floor:6.2f}"

    if options.cases:
        print(f"\n{'ms a step, floor, ratio':32}" + "".join(f"{f'batch {batch}':>22}" for batch in options.batches))
    for case in options.cases:
        print(f"{CASES[case]:32}", end="")
        for batch in options.batches:
            # One row cannot be half and half.
            cell = "" if case == "half" and batch == 1 else figure(f"{case}/{batch}", rows[case][:batch])
            print(f"{cell:>22}", end="", flush=True)
        print()
    for count in options.rows:
        for distinct in (n for n in options.distinct if n <= count):
            names = [rows["lora"][i % distinct] for i in range(count)]
            print(f"{count} rows, {distinct} LoRAs{figure(f'{count} rows/{distinct}', names):>22}", flush=True)
    for case in [case for case in ("none", "lora", "mixed") if case in options.cases]:
        for batch in options.timeline:
            begun = begin(engine, rows[case][:batch], options.temperature)
            while min(map(len, begun)) < SKIPPED:
                engine.loop.step()
            seen = profiled(engine.loop.step)
            finish(engine, begun)
            seen.print(f"{CASES[case]}, batch {batch}")
            figures.put(
                f"{prefix}/timeline/{case}/{batch}",
                **{**vars(seen), "ms_unprofiled": figures.get(f"{prefix}/{case}/{batch}", "ms")},
            )


def started(
    files: Files, quantization: str, rows: int, *, double_quantization: bool = False, deterministic: bool = False
) -> Engine:
    """An engine for so many rows, whose prompts fit into one step, so that all rows decode from the next step on."""
    base, positions = files.base, len(files.stacks[DEEP])
    shape = files.shape
    page = KVShape(shape["num_key_value_heads"], *2 * [shape["head_dim"]]).page_bytes(torch.bfloat16)
    pages = rows * positions * (-(-(PROMPT_TOKENS + NEW_TOKENS) // PAGE_TOKENS) + 1)
    began = time.perf_counter()
    engine = Engine(
        EngineConfig(
            BaseConfig(
                str(base), quantization=quantization, double_quantization=double_quantization, device=files.device
            ),
            stacks=files.stacks,
            scheduler=SchedulerConfig(
                prefix_cache=False,  # what is measured is computed
                kv_bytes=max(pages * page, 1 << 30),
                max_sequence_tokens=min(8192, shape["max_position_embeddings"]),
                max_sequences=max(32, rows),
                max_step_tokens=max(2048, rows * PROMPT_TOKENS),
            ),
            deterministic=deterministic,
        )
    )
    print(f"base to ready, kernels compiled and captured: {time.perf_counter() - began:.1f} s", flush=True)
    return engine


def load(engine: Engine, files: Files, kind: str, count: int) -> list[str]:
    """Loads so many adapters onto the device and returns their names."""
    folders = [files.adapter(kind, i) for i in range(count)]
    began = time.perf_counter()
    for i, folder in enumerate(folders):
        engine.adapters.load(f"{kind}{i}", str(folder), trusted=True)
    print(f"adapters like {kind}: {(time.perf_counter() - began) / count * 1e3:.0f} ms each", flush=True)
    return [f"{kind}{i}" for i in range(count)]


def prompts(count: int) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(7)
    return [tuple(p) for p in torch.randint(0, 256, (count, PROMPT_TOKENS), generator=generator).tolist()]


def request(prompt: tuple[int, ...], new_tokens: int, temperature: float = 0) -> Request:
    sampling = Sampling(temperature=temperature, top_p=0.95 if temperature else 1, seed=0)
    return Request(prompt, sampling=sampling, stopping=Stopping(max_new_tokens=new_tokens, ignore_eos=True))


def lease(engine: Engine, name: str) -> Lease:
    """A lease of an adapter, or of a stack without one."""
    return engine.adapters.lease([], name) if name in engine.stacks else engine.adapters.lease([(name, 1.0)])


def check(
    engine: Engine, names: Sequence[str], among: int | None = None
) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Tokens that decoding chose have to be the likeliest, but for rounding, where each layer is computed by itself.

    Args:
        among: so many of the rows, the first and last among them, are compared, in silence; None is all.

    Returns:
        The prompts and the tokens, by name.
    """
    asked = [
        (request(prompt, CHECKED_TOKENS), lease(engine, name))
        for prompt, name in zip(prompts(len(names)), names, strict=True)
    ]
    answers = engine.generate(asked)
    last = len(names) - 1
    compared = range(len(names)) if among is None else sorted({i * last // (among - 1) for i in range(among)})
    for i in compared:
        text = [*asked[i][0].prompt, *answers[i].tokens]
        held = lease(engine, names[i])
        logits = engine.logits(text, held)[PROMPT_TOKENS - 1 : -1]
        held.release()
        gap, same = largest_gap(logits, answers[i].tokens)
        seen = (
            f"check {names[i]}: {same} of {len(logits)} tokens the likeliest, largest gap {gap:.3f} standard deviations"
        )
        if among is None:
            print(seen)
        if not gap < LARGEST_GAP:
            raise SystemExit(f"{seen}: row {i} of {len(names)} disagrees with the layers")
    return {
        name: (wanted.prompt, answer.tokens) for (wanted, _), answer, name in zip(asked, answers, names, strict=True)
    }


def largest_gap(logits: torch.Tensor, tokens: Sequence[int]) -> tuple[float, int]:
    """How much likelier than its token another is, at most, and how many are the likeliest. logits: (n, vocab)."""
    chosen = logits.gather(1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0]
    gap = (logits.max(1).values - chosen) / logits.std(1)
    return float(gap.max()), int((gap == 0).sum())


def begin(engine: Engine, names: Sequence[str], temperature: float) -> list[list[float]]:
    """Submits a request for each; when their tokens come is added to the lists, and at last infinity."""
    times: list[list[float]] = [[] for _ in names]

    def listener(mine: list[float]) -> Callable[[Event], None]:
        def on_event(event: Event) -> None:
            if isinstance(event, Exception):
                raise SystemExit(f"a request failed: {event}")  # out of the engine's step
            mine.append(time.perf_counter() if isinstance(event, Output) else float("inf"))

        return on_event

    for prompt, name, mine in zip(prompts(len(names)), names, times, strict=True):
        engine.submit(request(prompt, NEW_TOKENS, temperature), lease(engine, name), listener(mine))
    return times


def finish(engine: Engine, begun: Sequence[Sequence[float]]) -> None:
    while any(not mine or mine[-1] < float("inf") for mine in begun):
        engine.loop.step()


def timed(engine: Engine, names: Sequence[str], temperature: float) -> float:
    """Seconds a step."""
    begun = begin(engine, names, temperature)
    finish(engine, begun)
    spans = [mine[SKIPPED : -1 - SKIPPED] for mine in begun]
    return statistics.fmean((mine[-1] - mine[0]) / (len(mine) - 1) for mine in spans)


if __name__ == "__main__":
    main()
