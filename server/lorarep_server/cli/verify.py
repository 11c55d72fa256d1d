"""`lorarep verify`: compares an adapter in lorarep with the reference, `cli.reference`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

import click

from lorarep_runtime.config import AdapterLimits, BaseConfig, DType, EngineConfig, Quantization, SchedulerConfig
from lorarep_server.cli.folders import check_folders
from lorarep_server.cli.options import BaseSourceType, HomePath, option
from lorarep_server.sources import split_here

if TYPE_CHECKING:
    from torch import Tensor

    from lorarep_runtime.engine.engine import Engine

PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n",
    "Once upon a time, in a village by the sea, there lived",
    "1, 2, 3, 4,",
)
TOLERANCE = {"torch.float32": 1e-4, "torch.float16": 2e-2, "torch.bfloat16": 1e-1}
"""Largest difference of logits that rounding explains, relative to the largest logit. A wrong layer gives about 1."""


@dataclass(frozen=True)
class Comparison:
    """The comparison of lorarep and the reference on one prompt with its greedy answer."""

    difference: float
    """Largest absolute difference of a logit."""
    largest: float
    """Largest absolute logit of the reference."""
    same: int
    """Tokens of the answer that the reference also chooses, after the same tokens."""
    tokens: int
    """Tokens of the answer."""
    gap: float
    """Largest difference between the reference's logits of its own choice and of lorarep's token."""


@click.command()
@option("--base", type=BaseSourceType(), required=True, help="Hub repository or folder of the base.")
@option("--revision", help="Branch, tag or commit of the base.")
@option("--adapter", required=True, metavar="SOURCE[@REVISION]", help="Hub repository or folder of the adapter.")
@option("--quantization", type=click.Choice(get_args(Quantization)), default=BaseConfig.quantization)
@option("--double-quantization", is_flag=True, help="Quantize the scales of nf4 once more.")
@option("--dtype", type=click.Choice(get_args(DType)), default=BaseConfig.dtype, help="Type of activations.")
@option("--device", default=BaseConfig.device, help="Torch device.")
@option("--cache-dir", type=HomePath(file_okay=False), help="Hub cache.")
@option("--prompt", multiple=True, help="Prompt to compare on, in place of the built-in ones.")
@option("--max-new-tokens", type=click.IntRange(1, 4096), default=32, help="Tokens of each greedy answer.")
def verify(adapter: str, prompt: tuple[str, ...], max_new_tokens: int, **given: Any) -> None:
    """Compare an adapter in lorarep with a trustworthy reference: logits and greedy tokens.

    The reference is `transformers` with physically stacked layers, under PEFT where that is installed. Ends with status
    1 if the two differ by more than rounding explains.
    """
    source, revision = split_here(adapter)
    check_folders(given["base"], "base", [source])
    from lorarep_runtime.adapters.files import CONFIG_FILE, read_config
    from lorarep_runtime.adapters.peft_config import AdapterConfig
    from lorarep_runtime.engine.engine import Engine
    from lorarep_runtime.hub.snapshot import fetch
    from lorarep_server.cli.progress_bars import ProgressBars
    from lorarep_server.cli.reference import Reference

    # 1. Answer the prompts with lorarep.
    progress = ProgressBars()
    engine = Engine(EngineConfig(BaseConfig(**given), scheduler=SchedulerConfig(kv_bytes=1 << 30)), progress)
    info = engine.adapters.load("adapter", source, revision, trusted=True, progress=progress)
    answered = _answered(engine, prompt or PROMPTS, max_new_tokens)
    # 2. Build the reference of the same revision.
    folder = fetch(source, info.commit if revision else None, kind="adapter", cache_dir=given["cache_dir"]).folder
    config = AdapterConfig.parse(read_config(folder / CONFIG_FILE), AdapterLimits(), engine.base.config.model_type)
    reference = Reference(engine.base, info.stack, folder, config, answered[0][2].shape[1])
    # 3. Compare the two on each prompt.
    click.echo(f"base       {engine.base.repository} at {engine.base.commit}, {engine.base.quantization}")
    click.echo(f"adapter    {info.repository} at {info.commit}, {info.kind}, {len(info.stack)} positions")
    click.echo(f"reference  {reference.name}, {engine.base.dtype}\n")
    click.echo(f"{'prompt':32}{'largest difference':>20}{'largest logit':>15}{'equal tokens':>15}")
    compared = []
    for title, (text, prompt_tokens, logits) in zip(prompt or PROMPTS, answered, strict=True):
        one = compare(logits, reference.logits(text).cpu(), text, prompt_tokens)
        compared.append(one)
        equal = f"{one.same} of {one.tokens}"
        click.echo(f"{title[:28]!r:32}{one.difference:20.3g}{one.largest:15.3g}{equal:>15}")
    # 4. Judge the differences.
    limit = TOLERANCE[str(engine.base.dtype)] * max(one.largest for one in compared)
    worst = max(one.difference for one in compared)
    good = worst <= limit and all(one.gap <= 2 * limit for one in compared)
    verdict = "the same but for rounding" if good else "DIFFERENT"
    click.echo(f"\nlargest difference {worst:.3g}, of which rounding explains {limit:.3g}: {verdict}")
    if not good:
        raise click.exceptions.Exit(1)


def _answered(engine: Engine, prompts: Sequence[str], new_tokens: int) -> list[tuple[list[int], int, Tensor]]:
    """The greedy answers of lorarep under the adapter.

    Returns:
        For each prompt, the tokens of prompt and answer, the number of the prompt's tokens, and the logits (tokens,
        vocab) on the CPU.
    """
    from lorarep_runtime.request import Request, Stopping

    lease = engine.adapters.lease([("adapter", 1.0)])
    stopping = Stopping(max_new_tokens=new_tokens, ignore_eos=True)
    encoded = [tuple(lease.tokenizer.encode(prompt)) for prompt in prompts]
    # All prompts run in one batch, since the comparison is of requests that run concurrently.
    leases = [engine.adapters.lease([("adapter", 1.0)]) for _ in encoded]
    answers = engine.generate((Request(p, stopping=stopping), held) for p, held in zip(encoded, leases, strict=True))
    texts = [[*tokens, *answer.tokens] for tokens, answer in zip(encoded, answers, strict=True)]
    logits = [engine.logits(text, lease).cpu() for text in texts]
    lease.release()
    return [(text, len(tokens), rows) for text, tokens, rows in zip(texts, encoded, logits, strict=True)]


def compare(ours: Tensor, theirs: Tensor, text: Sequence[int], prompt_tokens: int) -> Comparison:
    """Compares logits (tokens, vocab) of a text that ends in lorarep's greedy answer.

    Args:
        ours: the logits of lorarep.
        theirs: the logits of the reference.
        text: the tokens of prompt and answer.
        prompt_tokens: the number of the prompt's tokens.
    """
    import torch

    answer = torch.tensor(text[prompt_tokens:])
    scores = theirs[prompt_tokens - 1 : -1]
    gaps = scores.max(-1).values - scores.gather(-1, answer.unsqueeze(-1)).squeeze(-1)
    same = int((scores.argmax(-1) == answer).sum())
    return Comparison(
        float((ours - theirs).abs().max()), float(theirs.abs().max()), same, len(answer), float(gaps.max())
    )
