"""Small random bases of every family, PEFT adapters for them, and the references they are compared with."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from lorarep_runtime.model.model_config import model_class
from lorarep_runtime.model.physical_stack import stacked

LAYERS = 6
VOCAB = 272
WINDOW = 8
"""Sliding window, shorter than the tests' prompts."""
SHAPE = dict(
    vocab_size=VOCAB,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    bos_token_id=257,
    eos_token_id=258,
    pad_token_id=256,
)
MISTRAL_7B: dict[str, Any] = dict(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=32768,
    sliding_window=None,
    bos_token_id=257,
    eos_token_id=258,
    pad_token_id=256,
)
"""Mistral-7B-v0.1's, with the end tokens of `save_tokenizer`'s tokenizer."""
ALTERNATING = ["sliding_attention" if i % 2 else "full_attention" for i in range(LAYERS)]
FAMILIES: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SHAPE),
    "mistral": lambda: MistralConfig(**SHAPE, head_dim=16, sliding_window=WINDOW),
    "qwen2": lambda: Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=WINDOW, layer_types=ALTERNATING),
    "qwen3": lambda: Qwen3Config(
        **SHAPE, head_dim=32, use_sliding_window=True, sliding_window=WINDOW, layer_types=ALTERNATING
    ),
    "gemma2": lambda: Gemma2Config(
        **SHAPE,
        head_dim=32,
        sliding_window=WINDOW,
        layer_types=ALTERNATING,
        query_pre_attn_scalar=24,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=8.0,
    ),
    "gemma3": lambda: Gemma3TextConfig(
        **SHAPE, head_dim=32, sliding_window=WINDOW, layer_types=ALTERNATING, query_pre_attn_scalar=24
    ),
    "phi3": lambda: Phi3Config(**SHAPE, sliding_window=WINDOW),
}
MAPS: dict[str, list[list[int]] | None] = {
    "base order": None,
    "overlap": [[0, 4], [2, 5]],
    "shrinking": [[1, 5]],
    "reordering": [[3, 6], [0, 3]],
    "repeated": [[0, 2], [0, 2], [0, 2]],
    "four ranges": [[0, 3], [1, 4], [3, 6], [3, 6]],
}


def projections(shape: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """(out, in) of the linear modules of a layer of the Llama kind."""
    hidden, inner, dim = shape["hidden_size"], shape["intermediate_size"], shape["head_dim"]
    q, kv = shape["num_attention_heads"] * dim, shape["num_key_value_heads"] * dim
    return {
        "self_attn.q_proj": (q, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, q),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }


def randomize(module: nn.Module, seed: int) -> None:
    """Weights at which a wrong layer, scale or mask shows in the first digits of the logits."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name:
            parameter.data += 0.3 * noise
        elif parameter.dim() == 1:
            parameter.data = 0.3 * noise
        else:
            parameter.data = 0.5 * noise / parameter.shape[1] ** 0.5


def save_tokenizer(folder: Path) -> None:
    """One token a byte, then <pad>, <s>, </s>."""
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab={**vocab, "<pad>": 256, "<s>": 257, "</s>": 258}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


def save_base(family: str, folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    """A random base of a family in fp32."""
    config = FAMILIES[family]()
    for name, value in changes.items():
        setattr(config, name, value)
    model = AutoModelForCausalLM.from_config(config).float()
    randomize(model, seed)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def load_base(folder: Path, quantization: str = "none", **options: Any) -> PreTrainedModel:
    """The base in fp32 as `transformers` loads it, on the CPU: bitsandbytes would choose another device."""
    configs = {
        "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32),
        "int8": BitsAndBytesConfig(load_in_8bit=True),
    }
    if quantization != "none":  # None would take the place of a quantized checkpoint's own
        options["quantization_config"] = configs[quantization]
    options = {"attn_implementation": "eager", "device_map": {"": "cpu"}, **options}
    load = model_class(AutoConfig.from_pretrained(folder)).from_pretrained
    model = load(folder, dtype=torch.float32, **options).eval()
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            # On some CPUs bitsandbytes would round to bf16, and repack the weight in place before PEFT's DoRA reads it.
            module.support_avx512bf16_for_cpu = False
    return model


def save_adapter(
    base: Path,
    folder: Path,
    *,
    seed: int = 1,
    method: type[LoraConfig] = LoraConfig,
    tokens: int | None = None,
    **config: Any,
) -> Path:
    """An adapter as PEFT saves it, with random weights.

    Args:
        tokens: of the vocabulary that the base is resized to; its new rows are random.
        config: fields of the method's config.
    """
    generator = torch.Generator().manual_seed(seed)
    resized = load_base(base)
    if tokens is not None:
        before = resized.config.vocab_size
        resized.resize_token_embeddings(tokens, mean_resizing=False)
        for end in (resized.get_input_embeddings(), resized.get_output_embeddings()):
            new = end.weight.data[before:]
            new[:] = 2 * torch.randn(new.shape, generator=generator) / new.shape[1] ** 0.5
    model = get_peft_model(resized, method(task_type="CAUSAL_LM", **config))
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "lora_magnitude" in name or "lora_E" in name:
            parameter.data *= 1 + 0.3 * noise
        elif "modules_to_save" in name or "trainable_tokens" in name:
            parameter.data += 0.1 * noise
        elif "lora_embedding" in name:
            parameter.data[:] = 0.3 * noise  # in place: head and embedding may have it together
        elif "lora_A" in name:
            parameter.data[:] = noise / parameter.shape[1] ** 0.5
        elif "lora_B" in name:
            parameter.data[:] = 0.1 * noise
    model.save_pretrained(folder)
    return folder


def stack_of(ranges: Sequence[Sequence[int]] | None, layers: int = LAYERS) -> tuple[int, ...]:
    """The layers that a replication map walks, written out the plain way."""
    return tuple(i for start, end in ranges or [[0, layers]] for i in range(start, end))


def reference(base: Path, adapter: Path | None, stack: Sequence[int], quantization: str = "none") -> nn.Module:
    """A physically stacked model under PEFT's own adapter, which is loaded without its layer_replication."""
    model = stacked(load_base(base, quantization), stack)
    if adapter is not None and (tokens := vocabulary(adapter)) is not None:
        model.resize_token_embeddings(tokens, mean_resizing=False)
    return model if adapter is None else PeftModel.from_pretrained(model, without_replication(adapter)).eval()


def vocabulary(adapter: Path) -> int | None:
    """Number of tokens that an adapter's file has rows of the embedding or the head for; None where it has none."""
    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    ends = [shape for name, shape in shapes.items() if re.search(r"(embed_tokens|lm_head)\.(\w+\.)*weight$", name)]
    return max((shape[0] for shape in ends), default=None)


def without_replication(adapter: Path) -> Path:
    """A copy of an adapter for a model that is stacked already."""
    plain = adapter.with_name(adapter.name + "-plain")
    if not plain.exists():
        shutil.copytree(adapter, plain)
        config = json.loads((plain / "adapter_config.json").read_text())
        (plain / "adapter_config.json").write_text(json.dumps({**config, "layer_replication": None}))
    return plain


@torch.inference_mode()
def reference_logits(model: nn.Module, tokens: Sequence[int]) -> Tensor:
    """(tokens, vocab)."""
    return model(input_ids=torch.tensor([list(tokens)])).logits[0].float()
