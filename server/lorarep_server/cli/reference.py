"""The reference that lorarep is compared with: a model of `transformers` with physically copied layers.

Its layers are in stack order, and its weights are dense, as bitsandbytes dequantizes them. PEFT applies the adapter;
without PEFT the adapter is merged. The reference takes the memory of the dequantized base. PEFT's own layer_replication
is not used, since it is silently wrong for some bases.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lorarep_runtime.adapters.peft_config import FILE_PREFIX, AdapterConfig
from lorarep_runtime.errors import FailedPrecondition
from lorarep_runtime.model.base import Base
from lorarep_runtime.model.compiled_adapter import whole_matrices
from lorarep_runtime.model.model_config import model_class
from lorarep_runtime.model.own_attention import own_attention
from lorarep_runtime.model.physical_stack import stacked


class Reference:
    """The model of a stack and an adapter, built with `transformers` and PEFT."""

    def __init__(
        self,
        base: Base,
        stack: Sequence[int],
        adapter: Path | None,
        config: AdapterConfig | None,
        tokens: int | None = None,
    ) -> None:
        """
        Args:
            base: the base; its folder, dtype, device and quantization are used, but none of its tensors.
            stack: the layer at each position.
            adapter: folder of an adapter for the stack.
            config: the adapter's configuration.
            tokens: of the adapter's vocabulary; None is the base's.

        Raises:
            FailedPrecondition: the adapter has more than linear layers know, and PEFT is not there.
        """
        # None in place of a config would also take the place of the one that a quantized checkpoint has.
        own = {} if base.quantization_config is None else {"quantization_config": base.quantization_config}
        load = model_class(base.config).from_pretrained
        model = load(
            base.folder,
            dtype=base.dtype,
            device_map={"": base.device},
            attn_implementation=own_attention(base.config) or "eager",
            local_files_only=True,
            **own,
        ).eval()
        use_dense_weights(model, base.dtype)
        stacked(model, stack)
        if tokens not in (None, base.vocab_size):
            model.resize_token_embeddings(tokens, mean_resizing=False)
        self.name = "transformers, physically stacked"
        self.model: Any = model
        if adapter is not None and config is not None:
            if find_spec("peft"):
                self.model = _under_peft(model, adapter)
                self.name += ", under PEFT"
            else:
                _merge(model, adapter, config)
                self.name += ", adapter merged"

    @torch.inference_mode()
    def logits(self, tokens: Sequence[int]) -> Tensor:
        """The fp32 logits (tokens, vocab) of a text."""
        ids = torch.tensor([list(tokens)], device=self.model.device)
        logits: Tensor = self.model(input_ids=ids, use_cache=False).logits[0].float()
        return logits


def use_dense_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Replaces bitsandbytes' quantized linear layers with plain ones of dequantized weights.

    The comparison is then of weights alone: LLM.int8() would also round activations to 8 bits.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, bnb.nn.Linear4bit):
            weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        elif isinstance(module, bnb.nn.Linear8bitLt):
            weight = bnb.functional.int8_vectorwise_dequant(module.weight.data, module.weight.SCB)
        else:
            continue
        plain = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
        plain.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
        plain.bias = module.bias
        model.set_submodule(name, plain)


def _under_peft(model: Any, adapter: Path) -> Any:
    """Applies an adapter with PEFT to a model whose layers are copied, so without the adapter's layer_replication."""
    from peft import PeftModel

    with tempfile.TemporaryDirectory() as folder:
        config = json.loads((adapter / "adapter_config.json").read_bytes())
        Path(folder, "adapter_config.json").write_text(json.dumps({**config, "layer_replication": None}))
        shutil.copy(adapter / "adapter_model.safetensors", folder)
        return PeftModel.from_pretrained(model, folder).eval()


def _merge(model: nn.Module, adapter: Path, config: AdapterConfig) -> None:
    """Merges an adapter into a model's weights in fp32. Each merged module gets its own copy of the weights.

    Raises:
        FailedPrecondition: it adapts experts or routers.
    """
    if config.target_parameters:
        raise FailedPrecondition("are verified with PEFT alone, which is not installed", field="target_parameters")
    tensors = load_file(adapter / "adapter_model.safetensors")
    if others := [name for name in tensors if ".lora_" not in name or ".lora_embedding_" in name]:
        raise FailedPrecondition("is compared under PEFT, which is not installed", field=min(others))
    if config.alora_invocation_tokens:
        raise FailedPrecondition("is compared under PEFT, which is not installed", field="alora_invocation_tokens")
    for path in sorted({name.removeprefix(FILE_PREFIX).partition(".lora_")[0] for name in tensors}):
        module = model.get_submodule(path)
        assert isinstance(module, nn.Linear)
        form = config.form(path, (module.out_features, module.in_features))
        if not form.rank:
            continue
        device = module.weight.device
        names = (f"{FILE_PREFIX}{path}.{kind}" for kind, _ in form.tensors)
        a, b, *rest = whole_matrices(form, [tensors[name].to(device, torch.float32) for name in names])
        weight = module.weight.float() + config.scaling(path) * b @ a
        if form.has_c:
            weight *= (rest.pop() / weight.norm(dim=1)).unsqueeze(1)
        module.weight = nn.Parameter(weight.to(module.weight.dtype), requires_grad=False)
        if form.has_bias:
            whole = config.scaling(path) * rest[0] + (0 if module.bias is None else module.bias.float())
            module.bias = nn.Parameter(whole.to(module.weight.dtype), requires_grad=False)
