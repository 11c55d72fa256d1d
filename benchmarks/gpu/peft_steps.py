"""PEFT on the same base and adapters as `benchmarks.gpu.decode`: milliseconds a greedy step, one adapter for all rows.

    python -m benchmarks.gpu.peft_steps [--quantization nf4] [--batches 1,8,32] [--cases none,lora,dora] [--steps 8]
        [--json FILE] [--folder DIR] [--layers 32] [--device cuda]

The base is as `transformers` quantizes it, the adapter as `PeftModel.from_pretrained` loads and replicates it, one
fresh model for each kind. "none" is the LoRA's model with its adapter disabled, which keeps the depth. PEFT refuses
DoRA in mixed batches, hence one adapter.

Where `benchmarks.gpu.decode` has left its answers in the folder, its tokens have to be the likeliest for PEFT too,
but for rounding. That is a fair reference for LoRA and DoRA on one fresh model; of int8,
once a forward pass has been made.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from benchmarks.gpu.decode import LARGEST_GAP, largest_gap, numbers, prompts
from benchmarks.gpu.goals import PEFT_CASES, Figures, add_figure_options
from benchmarks.gpu.models import Files, add_file_options, load_with_transformers

WARM_UP = 3
"""Steps before the timed ones."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_file_options(parser)
    add_figure_options(parser)
    parser.add_argument("--batches", type=numbers, default=[1, 8, 32])
    parser.add_argument("--cases", type=lambda text: text.split(","), default=list(PEFT_CASES))
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run(Files(options.folder or Path(folder), options.layers, options.device), options)


def run(files: Files, options: argparse.Namespace) -> None:
    figures = Figures(options.json)
    file = files.folder / f"answers-{options.quantization}.json"
    answers = json.loads(file.read_text()) if file.exists() else {}
    for kind in ("lora", "dora"):
        cases = [case for case in options.cases if (case == "dora") == (kind == "dora")]
        if not cases:
            continue
        began = time.perf_counter()
        model = adapted(files, kind, options.quantization)
        print(f"PEFT's {kind} loaded in {time.perf_counter() - began:.1f} s", flush=True)
        if f"{kind}0" in answers:
            gap = check(model, *answers[f"{kind}0"])
            figures.put(f"{options.quantization}/peft/check/{kind}", gap=gap)
        for case in cases:
            for batch in options.batches:
                if case == "none":
                    with model.disable_adapter():
                        seconds = step_seconds(model, batch, options.steps)
                else:
                    seconds = step_seconds(model, batch, options.steps)
                print(f"PEFT, {case}, batch {batch}: {seconds * 1e3:.1f} ms a step", flush=True)
                figures.put(f"{options.quantization}/peft/{case}/{batch}", ms=seconds * 1e3)
        del model
        if options.device == "cuda":
            torch.cuda.empty_cache()


def adapted(files: Files, kind: str, quantization: str) -> PeftModel:
    model = load_with_transformers(files.base, quantization, files.device)
    if quantization == "int8":
        with torch.no_grad():  # else replicas lose their weights
            model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=files.device))
    return PeftModel.from_pretrained(model, files.adapter(kind, 0)).eval()


@torch.inference_mode()
def check(model: PeftModel, prompt: list[int], tokens: list[int]) -> float:
    """How much likelier than lorarep's token another is for PEFT, at most."""
    text = torch.tensor([[*prompt, *tokens]], device=model.device)
    logits = model(input_ids=text).logits[0, len(prompt) - 1 : -1].float()
    gap, same = largest_gap(logits, tokens)
    print(
        f"lorarep's tokens: {same} of {len(tokens)} the likeliest for PEFT, largest gap {gap:.3f} standard deviations"
        + ("" if gap < LARGEST_GAP else ": they DIFFER")
    )
    return gap


@torch.inference_mode()
def step_seconds(model: PeftModel, batch: int, steps: int) -> float:
    tokens = torch.tensor(prompts(batch), device=model.device)
    options: dict[str, Any] = dict(use_cache=True, logits_to_keep=1)
    seconds, cache = [], None
    for _ in range(1 + WARM_UP + steps):
        began = time.perf_counter()
        output = model(input_ids=tokens, past_key_values=cache, **options)
        cache, tokens = output.past_key_values, output.logits[:, -1:].argmax(2)
        tokens.tolist()  # waits for it, as who streams does
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1 + WARM_UP :])


if __name__ == "__main__":
    main()
