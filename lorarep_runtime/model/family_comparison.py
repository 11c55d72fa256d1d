"""Compares a family's walk with `transformers`' own model, in small.

What the code of a family does with its layers cannot be read from a config. So a model of the base's config, with few
and narrow layers and random weights, is computed both ways on the CPU: by lorarep's walk over pages, and by the plain
model with copied layers. It decodes on two stacks at a time, of which one repeats layers.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from lorarep_runtime.errors import FailedPrecondition, LorarepError, first_line
from lorarep_runtime.model.batch import Batch, Span
from lorarep_runtime.model.kv_cache import PagePool, PageTable
from lorarep_runtime.model.layer_walk import find_layers
from lorarep_runtime.model.linear import SharedLinear
from lorarep_runtime.model.model_config import model_class, trained_tokens
from lorarep_runtime.model.own_attention import own_attention
from lorarep_runtime.model.physical_stack import stacked
from lorarep_runtime.model.shrunk_config import LAYERS, shrunk_configs
from lorarep_runtime.model.stack import Stack
from lorarep_runtime.model.transformers_attention import ATTENTION
from lorarep_runtime.model.walked_model import WalkedModel

MOST_PARAMETERS = 48_000_000
"""Of the small model: more take seconds, and memory that the base may need."""
TOLERANCE = 1e-4
"""Largest difference of logits that rounding in fp32 explains, relative to the largest logit."""
PROMPTS = (9, 21)
"""Tokens of the two prompts: the longer one is over a page, and over the small window."""
DECODED = 4
"""Tokens that are decoded after the longer prompt; one more follows the shorter one."""


def refusal(config: PretrainedConfig) -> str:
    """Why a base cannot be served as `transformers` computes it; empty where it can.

    Args:
        config: of the whole base; it is not changed. Lorarep's attention has to be registered.
    """
    try:
        with torch.random.fork_rng(devices=[]), torch.inference_mode():
            return _refusal(config)
    except LorarepError as error:
        return error.message
    # Whatever a family's code raises in small, it would raise for each request.
    except Exception as error:
        return _why_not_walked(error)


def _why_not_walked(error: Exception) -> str:
    """What an error of a family's code says that computes with lorarep's parts."""
    if isinstance(error, KeyError) and error.args == (ATTENTION,):
        return "its attention is one of a list of its own, and not of transformers' attention interface"
    if isinstance(error, AttributeError) and isinstance(error.obj, SharedLinear):
        return f"its code reads {error.name!r} of a linear module, and does not only compute with it"
    return f"its code does not compute over pages: {_told(error)}"


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


def _refusal(config: PretrainedConfig) -> str:
    if config.is_encoder_decoder:
        return "it is an encoder with a decoder, and only decoders alone are served"
    trained_tokens(config)
    plain, small = _plain_model(config)
    layers = plain.config.get_text_config().num_hidden_layers
    straight = tuple(range(layers))
    stacks = straight, (*straight[:-1], *straight[-2:], *straight[:1])
    vocab = plain.get_input_embeddings().weight.shape[0]
    lengths = PROMPTS[0] + 1 + DECODED, PROMPTS[1] + DECODED
    texts = [[(37 * i * i + 11 * i + 5 + k) % (vocab - 8) for i in range(n)] for k, n in enumerate(lengths)]
    ours = _walked(small, plain.state_dict(), stacks, texts)
    for stack, text, found in zip(stacks, texts, ours, strict=True):
        model = plain if stack == straight else stacked(plain, stack)
        expected = model(input_ids=torch.tensor([text]), use_cache=False).logits[0].float()
        worst, largest = float((found - expected).abs().max()), float(expected.abs().max())
        if not worst <= TOLERANCE * largest:  # NaN is not
            return f"its logits differ from transformers' by {worst:.2g}, where the largest is {largest:.2g}"
    return ""


def _plain_model(config: PretrainedConfig) -> tuple[Any, PretrainedConfig]:
    """A small model of a config that `transformers` itself can compute, with random weights, and its config."""
    reason: Exception | None = None
    for small in shrunk_configs(config, _first_layers(config)):
        try:
            with torch.device("meta"):
                parameters = sum(p.numel() for p in _from_config(small).parameters())
            if parameters > MOST_PARAMETERS:
                raise FailedPrecondition(
                    f"even a small model of it, to be compared, has {parameters:,} parameters, over {MOST_PARAMETERS:,}"
                )
            model = _from_config(small)
            _randomize(model)
            logits = model(input_ids=torch.arange(1, 5).unsqueeze(0), use_cache=False).logits
            if not logits.isfinite().all():
                raise FailedPrecondition("a small model of it computes no finite logits")
            return model, small
        except Exception as error:  # a field was shrunk that others depend on
            reason = reason or error
    if isinstance(reason, LorarepError):
        raise reason
    if isinstance(reason, ImportError):
        raise FailedPrecondition(f"transformers needs a package for it that is not installed: {first_line(reason)}")
    assert reason is not None
    raise FailedPrecondition(f"transformers computes no small model of it from tokens alone: {_told(reason)}")


def _first_layers(config: PretrainedConfig) -> int:
    """How many of the first layers have one of each kind: configs say by many names which layers have experts."""
    try:
        with torch.device("meta"):
            layers, _ = find_layers(_from_config(config))
    except Exception:  # the small model will say why
        return LAYERS
    kinds = [repr(layer) for layer in layers]
    return max(LAYERS, *(kinds.index(kind) + 1 for kind in set(kinds)))


def _walked(
    config: PretrainedConfig, weights: dict[str, Tensor], stacks: Sequence[Stack], texts: Sequence[Sequence[int]]
) -> list[Tensor]:
    """The logits (tokens, vocab) of two texts on two stacks, computed as the engine does: prompts, then tokens."""
    cpu = torch.device("cpu")
    model = _from_config(config, ATTENTION)
    model.load_state_dict(weights)
    walked = WalkedModel(model, cpu)
    pool = PagePool(2 * sum(map(len, stacks)), walked.kv_shape, dtype=walked.dtype, device=cpu)
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


def _from_config(config: PretrainedConfig, attention: str = "eager") -> Any:
    # The config is the model's own from then on.
    model = model_class(config).from_config(
        copy.deepcopy(config),
        dtype=torch.float32,
        attn_implementation=own_attention(config) or attention,
        trust_remote_code=False,
    )
    return model.float().eval().requires_grad_(False)


def _randomize(model: torch.nn.Module) -> None:
    """Weights at which a wrong layer, scale or mask shows in the first digits of the logits."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.empty_like(parameter).normal_(generator=generator)
        if parameter.dim() > 1:
            parameter.copy_(noise.mul_(0.5 / parameter.shape[-1] ** 0.5))
        else:
            parameter.copy_(noise.mul_(0.3).add_(parameter if "norm" in name else 0))
