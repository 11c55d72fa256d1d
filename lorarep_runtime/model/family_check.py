"""Compares a family's walk with `transformers`' own model, in small, before a base of the family is loaded.

What the code of a family does with its layers cannot be read from a config. So a model of the base's config, with few
and narrow layers and random weights, is computed both ways on the CPU: by lorarep's walk over pages, and by the plain
model with copied layers. It decodes on two stacks at a time, of which one repeats layers.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import constants
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig

from lorarep_runtime.errors import FailedPrecondition, LorarepError, first_line
from lorarep_runtime.model.batch import Batch, Span
from lorarep_runtime.model.kv_cache import PagePool, PageTable
from lorarep_runtime.model.physical_stack import stacked
from lorarep_runtime.model.shrunk_config import shrunk_configs
from lorarep_runtime.model.stack import Stack
from lorarep_runtime.model.transformers_attention import ATTENTION
from lorarep_runtime.model.walked_model import WalkedModel

log = logging.getLogger(__name__)

COMPARED = frozenset({"llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3"})
"""Model types that lorarep's tests compare with PEFT, so that no base of theirs has to be."""
MOST_PARAMETERS = 64_000_000
"""Of the small model: more take seconds, and memory that the base may need."""
TOLERANCE = 1e-4
"""Largest difference of logits that rounding in fp32 explains, relative to the largest logit."""
PROMPTS = (9, 21)
"""Tokens of the two prompts: the longer one is over a page, and over the small window."""
DECODED = 4
"""Tokens that are decoded after the longer prompt; one more follows the shorter one."""


def check_family(config: PretrainedConfig, cache_dir: Path | None) -> None:
    """Checks that lorarep computes what `transformers` computes for bases of a config.

    Lorarep's attention has to be registered. A good verdict is kept in the cache, for this config, this code and this
    version of `transformers`.

    Args:
        config: of the whole base; it is not changed.
        cache_dir: Hub cache; None is huggingface_hub's default.

    Raises:
        FailedPrecondition: the logits differ, or one of the two cannot compute them, or no small model can be made.
    """
    family = config.model_type
    if config.get_text_config().model_type in COMPARED:
        return
    verdict = _verdict_file(config, cache_dir)
    if verdict.exists():
        return
    start = time.perf_counter()
    try:
        with torch.random.fork_rng(devices=[]), torch.inference_mode():
            _compare(config)
    # Whatever a family's code raises in small, it would raise for each request.
    except Exception as error:
        why = error.message if isinstance(error, LorarepError) else f"{type(error).__name__}: {first_line(error)}"
        raise FailedPrecondition(f"a base of type {family!r} cannot be served exactly: {why}", field="base") from error
    log.info("%s: compared with transformers in %.1f s", family, time.perf_counter() - start)
    with suppress(OSError):  # a cache that cannot be written to
        verdict.parent.mkdir(parents=True, exist_ok=True)
        verdict.touch()


def _verdict_file(config: PretrainedConfig, cache_dir: Path | None) -> Path:
    """The file that exists once a config has been found good."""
    key = "\n".join((config.to_json_string(use_diff=False), transformers.__version__, _code()))
    # The Hub's clients take every other folder there for a repository.
    folder = Path(cache_dir or constants.HF_HUB_CACHE, ".locks", "lorarep-families")
    return folder / hashlib.sha256(key.encode()).hexdigest()


@cache
def _code() -> str:
    """SHA-256 of the code that a verdict depends on: the walk, and the torch operators that it uses."""
    here = Path(__file__).parent
    files = sorted(file for folder in (here, here.parent / "kernels" / "eager") for file in folder.glob("*.py"))
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()


def _compare(config: PretrainedConfig) -> None:
    plain, small = _plain_model(config)
    layers = plain.config.get_text_config().num_hidden_layers
    straight = tuple(range(layers))
    stacks = straight, (*straight[:-1], *straight[-2:], *straight[:1])
    vocab = plain.get_input_embeddings().weight.shape[0]
    lengths = PROMPTS[0] + 1 + DECODED, PROMPTS[1] + DECODED
    texts = [[(37 * i * i + 11 * i + 5 + k) % (vocab - 8) for i in range(n)] for k, n in enumerate(lengths)]
    weights = plain.state_dict()
    ours = _walked(small, weights, stacks, texts)
    for stack, text, found in zip(stacks, texts, ours, strict=True):
        model = stacked(_model(small, "eager", weights), stack)
        expected = model(input_ids=torch.tensor([text]), use_cache=False).logits[0].float()
        worst, largest = float((found - expected).abs().max()), float(expected.abs().max())
        if not worst <= TOLERANCE * largest:  # NaN is not
            raise FailedPrecondition(
                f"its logits differ from transformers' by {worst:.2g}, where the largest is {largest:.2g}"
            )


def _plain_model(config: PretrainedConfig) -> tuple[Any, PretrainedConfig]:
    """A small model of a config that `transformers` itself can compute, with random weights, and its config."""
    reason: Exception | None = None
    for small in shrunk_configs(config):
        try:
            with torch.device("meta"):
                parameters = sum(p.numel() for p in _from_config(small, "eager").parameters())
            if parameters > MOST_PARAMETERS:
                raise FailedPrecondition(f"even a small model of it has {parameters:,} parameters")
            model = _from_config(small, "eager").float().eval()
            _randomize(model)
            logits = model(input_ids=torch.arange(1, 5).unsqueeze(0), use_cache=False).logits
            if not logits.isfinite().all():
                raise FailedPrecondition("a small model of it computes no finite logits")
            return model, small
        except Exception as error:  # a field was shrunk that others depend on
            reason = reason or error
    assert reason is not None
    raise reason


def _walked(
    config: PretrainedConfig, weights: dict[str, Tensor], stacks: Sequence[Stack], texts: Sequence[Sequence[int]]
) -> list[Tensor]:
    """The logits (tokens, vocab) of two texts on two stacks, computed as the engine does: prompts, then tokens."""
    cpu = torch.device("cpu")
    walked = WalkedModel(_model(config, ATTENTION, weights), cpu)
    pool = PagePool(2 * sum(map(len, stacks)), walked.kv_heads, walked.head_dim, dtype=walked.dtype, device=cpu)
    tables = [PageTable(pool, len(stack)) for stack in stacks]
    done = [0, 0]
    logits: list[list[Tensor]] = [[], []]
    # The first prompt alone; then its next token with the second prompt; then tokens of both.
    for counts in ((PROMPTS[0], 0), (1, PROMPTS[1]), *[(1, 1)] * DECODED):
        spans = []
        for i, count in enumerate(counts):
            if count:
                tables[i].grow(done[i] + count)
                spans.append(Span(texts[i][done[i] : done[i] + count], done[i], stacks[i], None, tables[i]))
                done[i] += count
        batch = Batch(spans, cpu)
        rows = walked.forward(batch, pool, torch.arange(int(batch.starts[-1])))
        for span, start in zip(batch.spans, batch.starts, strict=False):
            logits[tables.index(span.table)].append(rows[start : start + len(span.tokens)])
    return [torch.cat(rows) for rows in logits]


def _model(config: PretrainedConfig, attention: str, weights: dict[str, Tensor]) -> Any:
    model = _from_config(config, attention).float().eval()
    model.load_state_dict(weights)
    return model.requires_grad_(False)


def _from_config(config: PretrainedConfig, attention: str) -> Any:
    # The config is the model's own from then on.
    return AutoModelForCausalLM.from_config(
        copy.deepcopy(config), dtype=torch.float32, attn_implementation=attention, trust_remote_code=False
    )


def _randomize(model: torch.nn.Module) -> None:
    """Weights at which a wrong layer, scale or mask shows in the first digits of the logits."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.empty_like(parameter).normal_(generator=generator)
        if parameter.dim() > 1:
            parameter.copy_(noise.mul_(0.5 / parameter.shape[-1] ** 0.5))
        else:
            parameter.copy_(noise.mul_(0.3).add_(parameter if "norm" in name else 0))
