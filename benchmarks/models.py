"""A base and adapters of any size with random weights, in files as the Hub has them, made on the device."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, MistralConfig

from tests.models import projections, save_tokenizer


def save_base(folder: Path, shape: dict[str, Any], device: str) -> Path:
    """A Mistral in bf16 whose activations neither vanish nor explode, and whose every weight matters."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(MistralConfig(**shape), dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.data.uniform_(0.8, 1.2)
        else:
            parameter.data.normal_(std=1.0 if "embed" in name else parameter.shape[1] ** -0.5)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_adapter(
    folder: Path,
    shape: dict[str, Any],
    replication: Sequence[Sequence[int]] | None,
    *,
    rank: int,
    dora: bool,
    seed: int,
    device: str,
) -> Path:
    """An adapter of all seven projections in bf16, random and not zero, as PEFT's files are."""
    generator = torch.Generator(device).manual_seed(seed)
    positions = sum(end - start for start, end in replication) if replication else shape["num_hidden_layers"]

    def noise(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, device=device)

    tensors = {}
    for position in range(positions):
        for module, (out, into) in projections(shape).items():
            name = f"base_model.model.model.layers.{position}.{module}"
            tensors[f"{name}.lora_A.weight"] = (noise(rank, into) * into**-0.5).bfloat16()
            tensors[f"{name}.lora_B.weight"] = (noise(out, rank) * 0.1 * rank**-0.5).bfloat16()
            if dora:
                tensors[f"{name}.lora_magnitude_vector"] = (1 + 0.1 * noise(out)).bfloat16()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = dict(
        peft_type="LORA",
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=rank,
        target_modules=[path.partition(".")[2] for path in projections(shape)],
        use_dora=dora,
        layer_replication=replication,
    )
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
