"""One base on one GPU and on several: milliseconds a step and of a prompt, each rank's floor, and the part of the sums.

    python -m benchmarks.gpu.parallel [--ranks 1,2] [--parts 2] [--layers 80] [--batches 1,8,32,64] [--prompt 2048]
        [--json FILE] [--folder DIR] [--device cuda]

The base has Llama-3-70B's shape, in NF4 with random weights, and is walked as 1.5 times its layers, without adapters
and with a LoRA of its own for each row. Its file is made quantized: it takes 37 GB of disk at 80 layers. Each number of
ranks runs in a process of its own. Before rows are timed, the tokens that decoding gives some of them are compared with
the base's own layers walked in `transformers`' code. The floor is what one rank reads of weights, adapters, keys and
values at the bandwidth that copying reaches. The sums' part is that of rank 0's kernels, and has its waits for others.
`--parts` measures on one GPU what one of so many ranks computes, without sums: a base with its part of the heads, of
the MLP's columns and of the vocabulary.
`--device cpu` does all but the profile with a small base, to see that it runs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import torch
from bitsandbytes.functional import QuantState
from safetensors.torch import save_file
from torch.profiler import ProfilerActivity, profile
from transformers import MistralConfig

from benchmarks.gpu.decode import (
    CHECKED_ROWS,
    MIDDLE_TOKENS,
    NEW_TOKENS,
    PROMPT_TOKENS,
    SKIPPED,
    begin,
    check,
    finish,
    lease,
    numbers,
    request,
    timed,
)
from benchmarks.gpu.floor import copy_bandwidth, floor_bytes, weight_bytes
from benchmarks.gpu.goals import Figures
from benchmarks.gpu.models import SMALL, Files, add_file_options
from benchmarks.gpu.timeline import works
from lorarep_runtime.config import PAGE_TOKENS, BaseConfig, EngineConfig, SchedulerConfig
from lorarep_runtime.engine.engine import Engine
from lorarep_runtime.model.kv_cache import KVShape, pages_of
from lorarep_runtime.request import Event
from tests.support.models import MISTRAL_7B, projections, save_tokenizer

LLAMA_70B = {
    **MISTRAL_7B,
    **dict(vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_attention_heads=64, num_hidden_layers=80),
}
"""The shape of Llama-3-70B, with Mistral's names."""
DIVIDED = ("num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size")
"""What each rank has a part of."""
WALKED = "walked"
PROFILED = 16
"""Steps whose kernels are counted."""
SUMS = ("all_reduce", "AllReduce", "nccl")
"""Parts of the names of the kernels that add up the ranks' terms."""


@dataclass(frozen=True)
class LargeFiles(Files):
    """A base of Llama-3-70B's shape, whose file is quantized, and LoRAs for it."""

    parts: int = 1
    """Ranks of which the base is what one computes."""

    @property
    def shape(self) -> dict[str, Any]:
        whole = {**LLAMA_70B, **({**SMALL, "vocab_size": 1024} if self.device == "cpu" else {})}
        divided = {name: whole[name] // self.parts for name in DIVIDED}
        return {**whole, **divided, "num_hidden_layers": self.layers}

    @property
    def stacks(self) -> dict[str, tuple[int, ...]]:
        return {WALKED: tuple(i for start, end in self.replication("published") for i in range(start, end))}

    @cached_property
    def base(self) -> Path:
        folder = self.folder / "base"
        if not (folder / "tokenizer.json").exists():  # the last file to be written
            save_quantized(folder, self.shape, self.device)
        return folder


def save_quantized(folder: Path, shape: dict[str, Any], device: str) -> None:
    """A checkpoint as bitsandbytes writes it, with random NF4 weights."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    hidden, vocab = shape["hidden_size"], shape["vocab_size"]

    def dense(rows: int, std: float) -> torch.Tensor:
        return torch.randn(rows, hidden, device=device).mul_(std).bfloat16().cpu()

    files: dict[str, dict[str, torch.Tensor]] = {
        "vocabulary": {
            "model.embed_tokens.weight": dense(vocab, 1.0),
            "lm_head.weight": dense(vocab, hidden**-0.5),
            "model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16),
        }
    }
    places: dict[str, str] = {}
    for layer in range(shape["num_hidden_layers"]):
        tensors = {}
        for module, (out, into) in projections(shape).items():
            name = f"model.layers.{layer}.{module}.weight"
            state = QuantState(
                # The codes' mean square is 0.3 or so.
                absmax=torch.full((out * into // 64,), 1.8 * into**-0.5),
                shape=torch.Size((out, into)),
                code=bnb.get_4bit_type("nf4", device="cpu"),
                blocksize=64,
                quant_type="nf4",
                dtype=torch.bfloat16,
            )
            tensors[name] = torch.randint(0, 256, (out * into // 2, 1), dtype=torch.uint8, device=device).cpu()
            tensors |= {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{norm}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
        files[f"layer-{layer}"] = tensors
        for file, held in files.items():
            save_file({k: v.contiguous() for k, v in held.items()}, folder / f"{file}.safetensors")
            places |= dict.fromkeys(held, f"{file}.safetensors")
        files = {}
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = MistralConfig(**shape, dtype="bfloat16", architectures=["MistralForCausalLM"])
    config.quantization_config = dict(
        quant_method="bitsandbytes",
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype="bfloat16",
        bnb_4bit_use_double_quant=False,
    )
    config.save_pretrained(folder)
    save_tokenizer(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_file_options(parser)
    parser.set_defaults(layers=80)
    parser.add_argument("--ranks", type=numbers, default=[1, 2])
    parser.add_argument("--parts", type=int, default=1, help="Measures what one of so many ranks computes, alone.")
    parser.add_argument("--batches", type=numbers, default=[1, 8, 32, 64])
    parser.add_argument("--prompt", type=int, default=2048, help="Tokens of the long prompt.")
    parser.add_argument("--json", type=Path, help="File that the figures are added to.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        files = LargeFiles(options.folder or Path(folder), options.layers, options.device, options.parts)
        if options.parts > 1 and options.ranks != [1]:
            parser.error("--parts: one rank measures a part, with --ranks 1 and a folder of its own")
        if len(options.ranks) == 1:
            measure(files, options)
        else:
            measure_each(files, options)
    sys.stdout.flush()
    os._exit(0)  # NCCL would wait for ranks that have ended


def measure_each(files: LargeFiles, options: argparse.Namespace) -> None:
    """Measures each number of ranks in a process of its own."""
    _ = files.base  # made once
    figures = options.json or files.folder / "parallel.json"
    for ranks in options.ranks:
        more = ["--folder", str(files.folder), "--json", str(figures), "--ranks", str(ranks)]
        command = [sys.executable, "-m", "benchmarks.gpu.parallel", *sys.argv[1:], *more]
        subprocess.run(command, check=True, env=os.environ)
    compare(json.loads(figures.read_text()), options.ranks)


def measure(files: LargeFiles, options: argparse.Namespace) -> None:
    """Prints and keeps the figures of one number of ranks."""
    (ranks,) = options.ranks
    figures, bandwidth = Figures(options.json), copy_bandwidth(options.device)
    prefix = f"parallel/{ranks if files.parts == 1 else f'part of {files.parts}'}"
    most = max(options.batches)
    engine = started(files, ranks, most, options.prompt)
    try:
        print(f"{ranks} ranks: weights of a step {weight_bytes(engine, files.stacks[WALKED]) / 1e9:.2f} GB on rank 0")
        for rank, held in enumerate(engine.ledger().ranks or [engine.ledger().categories]):
            print(f"rank {rank} holds " + ", ".join(f"{name} {size / 1e9:.2f}" for name, size in held.items()) + " GB")
        seconds = prompt_seconds(engine, options.prompt)
        figures.put(f"{prefix}/prompt", ms=seconds * 1e3)
        print(f"first token of a prompt of {options.prompt} tokens: {seconds * 1e3:.1f} ms", flush=True)
        loras = []
        for number in range(most):
            folder = files.adapter("published-lora", number)
            engine.adapters.load(f"lora{number}", str(folder), trusted=True)
            loras.append(f"lora{number}")
        for case, names in (("none", [WALKED] * most), ("lora", loras)):
            for batch in options.batches:
                rows = names[:batch]
                check(engine, rows, among=min(CHECKED_ROWS, batch) if batch > 1 else None)
                step, floor = timed(engine, rows, 0), floor_bytes(engine, rows, MIDDLE_TOKENS) / bandwidth
                part = sums_part(engine, rows) if options.device == "cuda" and ranks > 1 else 0.0
                figures.put(f"{prefix}/{case}/{batch}", ms=step * 1e3, floor_ms=floor * 1e3, sums=part)
                print(
                    f"{case} {batch:3}: {step * 1e3:8.2f} ms a step, floor {floor * 1e3:6.2f}, sums {part:5.1%}",
                    flush=True,
                )
    finally:
        engine.stop()


def started(files: LargeFiles, ranks: int, rows: int, prompt: int) -> Engine:
    shape, tokens = files.shape, max(prompt, PROMPT_TOKENS) + NEW_TOKENS
    page = KVShape(shape["num_key_value_heads"], *2 * [shape["head_dim"]]).page_bytes(torch.bfloat16)
    pages = len(files.stacks[WALKED]) * (rows * (pages_of(PROMPT_TOKENS + NEW_TOKENS) + 1) + pages_of(tokens))
    began = time.perf_counter()
    engine = Engine(
        EngineConfig(
            BaseConfig(str(files.base), device=files.device, tensor_parallel=ranks),
            stacks=files.stacks,
            scheduler=SchedulerConfig(
                prefix_cache=False,  # what is measured is computed
                kv_bytes=pages * page,
                max_sequence_tokens=min(tokens + PAGE_TOKENS, shape["max_position_embeddings"]),
                max_sequences=max(32, rows),
                max_step_tokens=max(2048, rows * PROMPT_TOKENS),
            ),
        )
    )
    print(f"{ranks} ranks: ready after {time.perf_counter() - began:.1f} s", flush=True)
    return engine


def prompt_seconds(engine: Engine, tokens: int) -> float:
    """Median time to the first token of a lone prompt."""
    found = []
    for number in range(4):
        events: list[Event] = []
        prompt = tuple((37 * i + number) % 256 for i in range(tokens))
        began = time.perf_counter()
        engine.submit(request(prompt, 1), lease(engine, WALKED), events.append)
        while not events:
            engine.loop.step()
        found.append(time.perf_counter() - began)
        while engine.loop.is_busy:
            engine.loop.step()
    return statistics.median(found[1:])


def sums_part(engine: Engine, names: Sequence[str]) -> float:
    """Part of the kernels' time of some steps that rank 0's sums take."""
    begun = begin(engine, names, 0)
    while min(map(len, begun)) < SKIPPED:
        engine.loop.step()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(PROFILED):
            engine.loop.step()
        torch.cuda.synchronize()
    finish(engine, begun)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        seen.export_chrome_trace(str(file))
        found = works(json.loads(file.read_text())["traceEvents"])
    spent = {True: 0.0, False: 0.0}
    for work in found:
        spent[any(name in work.name for name in SUMS)] += work.end - work.begin
    return spent[True] / (sum(spent.values()) or 1)


def compare(figures: dict[str, dict[str, float]], ranks: Sequence[int]) -> None:
    """Prints how many times as fast more ranks are than the fewest."""
    few = min(ranks)
    for name, found in figures.items():
        _, own, *rest = name.split("/")
        if own.isdecimal() and int(own) != few:
            before = figures["/".join(("parallel", str(few), *rest))]["ms"]
            print(f"{' '.join(rest):12} {own} ranks: {before / found['ms']:.2f} times as fast as {few}")


if __name__ == "__main__":
    main()
