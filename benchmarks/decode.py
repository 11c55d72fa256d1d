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

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.models import MISTRAL_7B, save_adapter, save_base
from lorarep_runtime.config import BaseConfig, EngineConfig, SchedulerConfig
from lorarep_runtime.engine import Engine
from lorarep_runtime.request import Event, Output, Request, Stopping

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
    loras = [
        save_adapter(folder / f"lora{i}", shape, replication, rank=8, dora=False, seed=i, device=device)
        for i in range(most)
    ]
    mixed = [
        save_adapter(
            folder / f"mixed{i}",
            shape,
            replication,
            rank=RANKS[i // 2 % 4],
            dora=i % 2 == 1,
            seed=100 + i,
            device=device,
        )
        for i in range(most)
    ]
    started = time.perf_counter()
    stack = tuple(layer for start, end in replication for layer in range(start, end))
    engine = Engine(
        EngineConfig(
            BaseConfig(str(base), quantization=options.quantization, device=device),
            stacks={"deep": stack},
            scheduler=SchedulerConfig(kv_bytes=8 << 30, max_sequence_tokens=8192, max_sequences=max(32, most)),
        )
    )
    print(f"loaded the base in {time.perf_counter() - started:.1f} s", flush=True)
    for kind in (loras[:1], loras[1:], mixed[1:2], mixed[:1] + mixed[2:]):
        started = time.perf_counter()
        for adapter in kind:
            engine.adapters.load(adapter.name, str(adapter), trusted=True)
        if kind:
            print(f"loaded {len(kind)} adapters like {kind[0].name}: {time.perf_counter() - started:.2f} s", flush=True)
    check(engine, ["lora0", "mixed1", None])
    if options.profile:
        profile(engine, [loras[i].name for i in range(options.batches[-1])])
    engine.start()
    bandwidth = copy_bandwidth(device)
    weights = weight_bytes(engine, stack)
    print(f"copying moves {bandwidth / 1e12:.2f} TB/s; weights of a step {weights / 1e9:.2f} GB\n")
    print(f"{'':24}" + "".join(f"{f'batch {batch}':>28}" for batch in options.batches))
    cases = (
        ("no adapter", lambda i: None),
        ("a LoRA each", lambda i: loras[i].name),
        ("LoRA and DoRA, r 4-64", lambda i: mixed[i].name),
    )
    for title, name in cases:
        line = f"{title:24}"
        for batch in options.batches:
            names = [name(i) for i in range(batch)]
            extra = sum(engine.adapters.get(n).bytes for n in names if n is not None)
            keys = (
                batch
                * len(stack)
                * (PROMPT_TOKENS + NEW_TOKENS // 2)
                * engine.pool.page_bytes(8, 128, engine.base.dtype)
                // 16
            )
            floor = (weights + extra + keys) / bandwidth
            step = timed(engine, names)
            line += f"{step * 1e3:9.2f} ms {floor * 1e3:5.2f} {step / floor:4.2f}x"
        print(line, flush=True)
    engine.stop()


def prompts(count: int) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(7)
    return [tuple(p) for p in torch.randint(3, 259, (count, PROMPT_TOKENS), generator=generator).tolist()]


def request(prompt: tuple[int, ...], new_tokens: int) -> Request:
    return Request(prompt, stopping=Stopping(max_new_tokens=new_tokens, ignore_eos=True))


def lease(engine: Engine, name: str | None):
    return engine.adapters.lease([(name, 1.0)]) if name else engine.adapters.lease([], "deep")


def check(engine: Engine, names: Sequence[str | None]) -> None:
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


def timed(engine: Engine, names: Sequence[str | None]) -> float:
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


def profile(engine: Engine, names: Sequence[str | None]) -> None:
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
