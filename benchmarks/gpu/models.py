"""A base and adapters of any size with random weights, in files as the Hub has them, made on the device.

    python -m benchmarks.gpu.models --folder FOLDER [--layers 32] [--device cuda]

makes all files that the other benchmarks load. Otherwise each benchmark makes the files that it needs.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, MistralConfig, PreTrainedModel

from tests.support.models import MISTRAL_7B, projections, save_tokenizer

SMALL = dict(hidden_size=256, intermediate_size=512, num_attention_heads=4, num_key_value_heads=2, head_dim=64)
RANKS = (4, 8, 16, 64)
FILES = 8
"""Files of each kind of adapter. More names than files share them; each name has a copy in memory."""
DEEP, PUBLISHED = "deep", "published"
"""Stacks of twice the base's depth, and of 1.5 times, as the published adapter of 10 billion has it."""
KINDS: dict[str, tuple[str, tuple[int, ...], bool | None]] = {
    "lora": (DEEP, (8,), False),
    "dora": (DEEP, (8,), True),
    "mixed": (DEEP, RANKS, None),
    "published-lora": (PUBLISHED, (8,), False),
    "published-dora": (PUBLISHED, (8,), True),
}
"""Stack, ranks that rotate, and DoRA or not; None makes every other adapter a DoRA."""


@dataclass(frozen=True)
class Files:
    """A base and adapters, made on first use. They stay in the folder, which belongs to these layers and this shape."""

    folder: Path
    layers: int
    device: str

    @property
    def shape(self) -> dict[str, Any]:
        """Mistral-7B's; a small one on the CPU."""
        return {**MISTRAL_7B, **(SMALL if self.device == "cpu" else {}), "num_hidden_layers": self.layers}

    def replication(self, stack: str) -> list[list[int]]:
        half, quarter = self.layers // 2, self.layers // 4
        ranges = [[0, half], [quarter, quarter * 3], [half, self.layers]]
        return ranges + ranges[-1:] * (stack == DEEP)

    @property
    def stacks(self) -> dict[str, tuple[int, ...]]:
        """As the engine takes them; "48" is of half the base more, without a layer that is walked thrice."""
        quarter = self.layers // 4
        return {
            DEEP: layers_of(self.replication(DEEP)),
            "48": layers_of([[0, self.layers - quarter], [quarter, self.layers]]),
        }

    @cached_property
    def base(self) -> Path:
        folder = self.folder / "base"
        if not (folder / "tokenizer.json").exists():  # the last file to be written
            save_base(folder, self.shape, self.device)
            if self.device == "cuda":
                torch.cuda.empty_cache()
        return folder

    def adapter(self, kind: str, number: int) -> Path:
        number %= FILES
        stack, ranks, dora = KINDS[kind]
        folder = self.folder / f"{kind}{number}"
        if not (folder / "adapter_config.json").exists():
            save_adapter(
                folder,
                self.shape,
                self.replication(stack),
                rank=ranks[number // 2 % len(ranks)],
                dora=number % 2 == 1 if dora is None else dora,
                seed=100 * list(KINDS).index(kind) + number,
                device=self.device,
            )
        return folder

    def make(self) -> None:
        _ = self.base
        for kind in KINDS:
            for number in range(FILES):
                self.adapter(kind, number)


def add_file_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--folder", type=Path, help="Where base and adapters are, or are made, and stay.")


def layers_of(replication: Sequence[Sequence[int]]) -> tuple[int, ...]:
    return tuple(layer for start, end in replication for layer in range(start, end))


def load_with_transformers(base: Path, quantization: str, device: str) -> PreTrainedModel:
    """Loads the base as a user of PEFT does."""
    quantized = {
        "none": None,
        "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16),
        "int8": BitsAndBytesConfig(load_in_8bit=True),
    }[quantization]
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.bfloat16, device_map={"": device}, quantization_config=quantized
    ).eval()
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            # On some CPUs bitsandbytes repacks the weight in place before PEFT's DoRA reads it.
            module.support_avx512bf16_for_cpu = False
    return model


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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_file_options(parser)
    options = parser.parse_args()
    if options.folder is None:
        parser.error("--folder is missing")
    Files(options.folder, options.layers, options.device).make()
