"""Eight requests on eight adapters of one replicated stack, on the CPU: lorarep and PEFT, in one run.

    python -m benchmarks.cpu.decode [--hidden-size 512] [--new-tokens 64] [--repeats 5]

PEFT gets a physically stacked model, since its own replication goes wrong with a second adapter; its weights take more
memory there, and its arithmetic is the same. Both sides answer the same prompts greedily; the answers are compared
before anything is timed. The floor is what reading the stack's weights once a step costs at the measured bandwidth.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from peft import PeftModel

from lorarep_runtime.config import BaseConfig, EngineConfig, SchedulerConfig
from lorarep_runtime.engine.engine import Engine
from lorarep_runtime.request import Request, Stopping
from tests.support.models import load_base, save_adapter, save_base, stack_of, stacked, without_replication

MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANGES = [[0, 6], [2, 8]]
LAYERS = 8
REQUESTS = 8
PROMPT_TOKENS = 32

Side = Callable[[list[Path]], list[list[int]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        compare(Path(folder), options.hidden_size, options.new_tokens, options.repeats)


def compare(folder: Path, hidden: int, new_tokens: int, repeats: int) -> None:
    base = save_base(
        "llama",
        folder / "base",
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4 // 64 * 64,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=hidden // 8,
        vocab_size=4096,
    )
    config = dict(r=8, lora_alpha=16, target_modules=MODULES, layer_replication=RANGES)
    loras = [save_adapter(base, folder / f"lora{i}", seed=i, **config) for i in range(REQUESTS)]
    doras = [
        save_adapter(base, folder / f"dora{i}", seed=50 + i, use_dora=True, **config) for i in range(REQUESTS // 2)
    ]
    mixed = [adapter for pair in zip(loras, doras, strict=False) for adapter in pair]

    engine = Engine(
        EngineConfig(
            BaseConfig(str(base), dtype="float32", device="cpu"),
            scheduler=SchedulerConfig(kv_bytes=256 << 20, prefix_cache=False),
        )
    )
    model = stacked(load_base(base, attn_implementation="sdpa"), stack_of(RANGES, LAYERS))
    peft = None
    for adapter in {*loras, *doras}:
        engine.adapters.load(adapter.name, str(adapter), trusted=True)
        plain = without_replication(adapter)
        if peft is None:
            peft = PeftModel.from_pretrained(model, plain, adapter_name=adapter.name)
        else:
            peft.load_adapter(plain, adapter_name=adapter.name)
    assert peft is not None
    peft.eval()

    generator = torch.Generator().manual_seed(3)
    prompts = torch.randint(0, 256, (REQUESTS, PROMPT_TOKENS), generator=generator)
    length = dict(min_new_tokens=new_tokens, max_new_tokens=new_tokens, do_sample=False, pad_token_id=256)

    def ours(adapters: list[Path]) -> list[list[int]]:
        stopping = Stopping(max_new_tokens=new_tokens, ignore_eos=True)
        answers = engine.generate(
            (Request(tuple(prompt.tolist()), stopping=stopping), engine.adapters.lease([(adapter.name, 1.0)]))
            for prompt, adapter in zip(prompts, adapters, strict=True)
        )
        return [list(answer.tokens) for answer in answers]

    def one_after_the_other(adapters: list[Path]) -> list[list[int]]:
        answers = []
        for prompt, adapter in zip(prompts, adapters, strict=True):
            peft.set_adapter(adapter.name)
            answers.append(peft.generate(input_ids=prompt[None], **length)[0, PROMPT_TOKENS:].tolist())
        return answers

    def mixed_batch(adapters: list[Path]) -> list[list[int]]:
        names = [adapter.name for adapter in adapters]
        return peft.generate(input_ids=prompts, adapter_names=names, **length)[:, PROMPT_TOKENS:].tolist()

    weights = sum(w.data[0].nbytes for layer in stack_of(RANGES, LAYERS) for w in engine.base.weights[layer].values())
    floor = weights / bandwidth()
    print(f"hidden size {hidden}, {len(stack_of(RANGES, LAYERS))} positions, {torch.get_num_threads()} threads, fp32")
    print(f"weights read a step {weights / 1e6:.0f} MB, floor {floor * 1e3:.1f} ms a step\n")
    print(f"{'':34}{'tokens/s':>10}{'ms/step':>10}{'x floor':>10}{'lorarep is':>14}")
    for title, adapters, peft_side in (
        ("4 LoRA + 4 DoRA, PEFT one at a time", mixed, one_after_the_other),
        ("8 LoRA, PEFT one at a time", loras, one_after_the_other),
        ("8 LoRA, PEFT's mixed batch", loras, mixed_batch),
    ):
        with torch.inference_mode():
            if ours(adapters) != peft_side(adapters):
                raise SystemExit(f"{title}: the answers differ")
            times: dict[Side, list[float]] = {side: [] for side in (ours, peft_side)}
            for _ in range(repeats):
                for side in times:
                    times[side].append(timed(side, adapters))
        mine, theirs = (statistics.median(times[side]) for side in (ours, peft_side))
        for name, seconds in (("lorarep", mine), (title, theirs)):
            rate, step = REQUESTS * new_tokens / seconds, seconds / new_tokens
            ratio = f"{theirs / mine:.1f} times as fast" if name == "lorarep" else ""
            print(f"{name:34}{rate:10.0f}{step * 1e3:10.1f}{step / floor:10.1f}   {ratio}")
        print()


def timed(side: Side, adapters: list[Path]) -> float:
    start = time.perf_counter()
    side(adapters)
    return time.perf_counter() - start


def bandwidth() -> float:
    """Bytes per second of reading memory, by a sum over 512 MB."""
    data = torch.ones(1 << 27)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        data.sum()
        seconds.append(time.perf_counter() - start)
    return data.nbytes / min(seconds)


if __name__ == "__main__":
    main()
