"""Steady decoding on one GPU through the whole engine: milliseconds a step, beside the floor.

    python benchmarks/decode.py [--layers 32] [--quantization nf4] [--batches 1,8,16,32]

The base has Mistral-7B's shape and random weights, is saved and loaded as any other; adapters cover all seven
projections of a stack of twice its depth. Before anything is timed, the tokens of decoding are compared with the base's
own layers walked in `transformers`' code. The floor is what reading a step's weights, adapters, keys and values costs
at the bandwidth that copying reaches.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.models import save_adapter, save_base
from lorarep_runtime.adapters.pool import Lease
from lorarep_runtime.cache import PagePool
from lorarep_runtime.config import PAGE_TOKENS, BaseConfig, EngineConfig, SchedulerConfig
from lorarep_runtime.engine import Engine
from lorarep_runtime.request import Event, Output, Request, Stopping
from lorarep_runtime.stack import merge
from tests.models import MISTRAL_7B

PROMPT_TOKENS = 128
NEW_TOKENS = 144
SKIPPED = 32
"""Tokens before and after those that are timed: all sequences are decoding meanwhile."""
RANKS = (4, 8, 16, 64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--quantization", default="nf4")
    parser.add_argument("--batches", type=lambda text: [int(n) for n in text.split(",")], default=[1, 8, 16, 32])
    parser.add_argument("--profile", action="store_true", help="Print the kernels of a step of the largest batch.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run(Path(folder), options)


def run(folder: Path, options: argparse.Namespace) -> None:
    device, layers = "cuda", options.layers
    shape = {**MISTRAL_7B, "num_hidden_layers": layers}
    half, quarter = layers // 2, layers // 4
    replication = [[0, half], [quarter, quarter * 3], [half, layers], [half, layers]]
    started = time.perf_counter()
    base = save_base(folder / "base", shape, device)
    print(f"made the base in {time.perf_counter() - started:.1f} s", flush=True)
    torch.cuda.empty_cache()
    most = max(options.batches)

    def adapters(name: str, count: int, seed: int, **kind: Any) -> list[str]:
        for i in range(count):
            choice = {
                key: value[i // 2 % len(value)] if isinstance(value, tuple) else value for key, value in kind.items()
            }
            choice["dora"] = i % 2 == 1 if choice["dora"] is None else choice["dora"]
            save_adapter(folder / f"{name}{i}", shape, replication, seed=seed + i, device=device, **choice)
        return [f"{name}{i}" for i in range(count)]

    loras = adapters("lora", most, 0, rank=8, dora=False)
    doras = adapters("dora", min(most, 8), 100, rank=8, dora=True)
    mixed = adapters("mixed", most, 200, rank=RANKS, dora=None)
    torch.cuda.empty_cache()
    started = time.perf_counter()
    stack = layers_of(replication)
    stacks = {"deep": stack, "one and a half": layers_of([[0, layers - quarter], [quarter, layers]])}
    engine = Engine(
        EngineConfig(
            BaseConfig(str(base), quantization=options.quantization, device=device),
            stacks=stacks,
            scheduler=SchedulerConfig(kv_bytes=8 << 30, max_sequence_tokens=8192, max_sequences=max(32, most)),
        )
    )
    print(f"base to ready, kernels compiled and captured: {time.perf_counter() - started:.1f} s", flush=True)
    for kind in (loras, doras, mixed):
        started = time.perf_counter()
        for name in kind:
            engine.adapters.load(name, str(folder / name), trusted=True)
        seconds = (time.perf_counter() - started) / len(kind)
        print(f"adapters like {kind[0]}: {seconds * 1e3:.0f} ms each", flush=True)
    check(engine, [loras[0], doras[0], mixed[-1], "deep", "one and a half", "base"])
    ledger, held = engine.ledger(), torch.cuda.memory_allocated()
    print(f"ledger {ledger.total:,} bytes, allocator {held:,}: {abs(ledger.total / held - 1):.2%} apart")
    print({name: f"{size / 2**30:.3f} GiB" for name, size in ledger.categories.items()})
    bandwidth = copy_bandwidth(device)
    print(f"copying moves {bandwidth / 1e12:.2f} TB/s; weights of a step {weight_bytes(engine, stack) / 1e9:.2f} GB")
    if options.profile:
        profile(engine, loras)
    engine.start()
    print(f"\n{'ms a step, floor, ratio':26}" + "".join(f"{f'batch {batch}':>22}" for batch in options.batches))
    for title, names in (
        ("no adapter", ["deep"] * most),
        ("a LoRA each, r=8", loras),
        ("a DoRA each, r=8", doras),
        ("LoRA and DoRA, r=4 to 64", mixed),
        ("1.5 times the depth", ["one and a half"] * most),
        ("half of them the base", ["one and a half", "base"] * (most // 2)),
    ):
        line = f"{title:26}"
        for batch in options.batches:
            if batch <= len(names):
                step, floor = timed(engine, names[:batch]), floor_of(engine, names[:batch], bandwidth)
                line += f"{step * 1e3:9.2f}{floor * 1e3:7.2f}{step / floor:6.2f}"
        print(line, flush=True)
    engine.stop()


def layers_of(replication: Sequence[Sequence[int]]) -> tuple[int, ...]:
    return tuple(layer for start, end in replication for layer in range(start, end))


def floor_of(engine: Engine, names: Sequence[str], bandwidth: float) -> float:
    """Seconds to read what a step reads once: its plan's weights, each row's adapter, keys and values."""
    rows = [lease(engine, name) for name in names]
    plan = merge(tuple(sorted({row.stack for row in rows})))
    adapters = sum(engine.adapters.get(name).bytes for name in names if name not in engine.stacks)
    base = engine.base
    token = PagePool.page_bytes(base.kv_heads, base.head_dim, base.dtype) // PAGE_TOKENS
    keys = sum(len(row.stack) for row in rows) * (PROMPT_TOKENS + NEW_TOKENS // 2) * token
    for row in rows:
        row.release()
    return (weight_bytes(engine, [step.layer for step in plan.steps]) + adapters + keys) / bandwidth


def prompts(count: int) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(7)
    return [tuple(p) for p in torch.randint(0, 256, (count, PROMPT_TOKENS), generator=generator).tolist()]


def request(prompt: tuple[int, ...], new_tokens: int) -> Request:
    return Request(prompt, stopping=Stopping(max_new_tokens=new_tokens, ignore_eos=True))


def lease(engine: Engine, name: str) -> Lease:
    """For an adapter, or for a stack without one."""
    return engine.adapters.lease([], name) if name in engine.stacks else engine.adapters.lease([(name, 1.0)])


def check(engine: Engine, names: Sequence[str]) -> None:
    """Tokens that decoding chose have to be the likeliest, but for rounding, where each layer is computed by itself."""
    asked = [
        (request(prompt, 24), lease(engine, name)) for prompt, name in zip(prompts(len(names)), names, strict=True)
    ]
    answers = engine.generate(asked)
    for (wanted, _), answer, name in zip(asked, answers, names, strict=True):
        text = [*wanted.prompt, *answer.tokens]
        held = lease(engine, name)
        logits = engine.logits(text, held)[len(wanted.prompt) - 1 : -1]
        held.release()
        chosen = logits.gather(1, torch.tensor(answer.tokens, device=logits.device)[:, None])[:, 0]
        gap = (logits.max(1).values - chosen) / logits.std(1)
        same = int((gap == 0).sum())
        print(
            f"check {name}: {same} of {len(gap)} tokens the likeliest, largest gap {gap.max():.3f} standard deviations"
        )
        if not gap.max() < 0.2:
            raise SystemExit(f"{name}: decoding disagrees with the layers")


def timed(engine: Engine, names: Sequence[str]) -> float:
    """Seconds a step."""
    ended = threading.Semaphore(0)
    times: list[list[float]] = [[] for _ in names]

    def listener(mine: list[float]):
        def on_event(event: Event) -> None:
            if isinstance(event, Output):
                mine.append(time.perf_counter())
            else:
                ended.release()

        return on_event

    for prompt, name, mine in zip(prompts(len(names)), names, times, strict=True):
        engine.submit(request(prompt, NEW_TOKENS), lease(engine, name), listener(mine))
    for _ in names:
        ended.acquire()
    gaps = [b - a for mine in times for a, b in zip(mine[SKIPPED:-SKIPPED], mine[SKIPPED + 1 : -SKIPPED], strict=False)]
    return statistics.fmean(gaps)


def weight_bytes(engine: Engine, stack: Sequence[int]) -> int:
    layers = [sum(t.nbytes for w in layer.values() for t in (*w.data, *w.constants)) for layer in engine.base.weights]
    return sum(layers[i] for i in stack) + engine.base.model.get_output_embeddings().weight.nbytes


def copy_bandwidth(device: str) -> float:
    """Bytes read and written a second by a copy of 1 GiB."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(10):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        target.copy_(source)
        end.record()
        torch.cuda.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e3)
    return 2 * source.nbytes / statistics.median(seconds)


def profile(engine: Engine, names: Sequence[str]) -> None:
    from torch.profiler import ProfilerActivity

    held = [lease(engine, name) for name in names]
    for prompt, one in zip(prompts(len(names)), held, strict=True):
        engine.submit(request(prompt, 40), one, lambda event: None)
    for _ in range(20):
        engine.step()
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiled:
        for _ in range(5):
            engine.step()
    print(profiled.key_averages().table(sort_by="cuda_time_total", row_limit=16, max_name_column_width=50))
    while engine.step():
        pass


if __name__ == "__main__":
    main()
