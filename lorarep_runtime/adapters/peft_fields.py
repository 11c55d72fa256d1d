"""What each field of an `adapter_config.json` is to the server: used, without effect at inference, or refused by name.

The fields and their meaning are those of PEFT's LoraConfig and AdaLoraConfig:
https://huggingface.co/docs/peft/package_reference/lora.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lorarep_runtime.errors import FailedPrecondition, InvalidArgument, shown

LORA, ADALORA = "LORA", "ADALORA"
"""The methods that are served. An AdaLoRA is a LoRA once its file is read."""
TASK = "CAUSAL_LM"

CONSUMED = {
    "alora_invocation_tokens",
    "alpha_pattern",
    "bias",
    "ensure_weight_tying",
    "exclude_modules",
    "init_lora_weights",
    "init_r",
    "layer_replication",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_bias",
    "modules_to_save",
    "peft_type",
    "r",
    "rank_pattern",
    "target_modules",
    "target_parameters",
    "task_type",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_rslora",
}
"""Fields that decide what is computed, or whether anything is."""
NO_EFFECT = {
    "auto_mapping",
    "base_model_name_or_path",
    "beta1",  # of AdaLoRA's schedule, as are those in capitals or with a T
    "beta2",
    "corda_config",
    "deltaT",
    "eva_config",
    "fan_in_fan_out",  # of Conv1D; PEFT sets it as the base's modules need it
    "inference_mode",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "merge_weights",  # of PEFT before 0.3
    "model_type",
    "monteclora_config",  # samples only while it trains, as the next projects only gradients
    "orth_reg_weight",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_r",
    "tfinal",
    "tinit",
    "total_step",
    "velora_config",
}
"""Fields that matter for training alone, or that detail a feature which another field turns on."""
REFUSED = {
    "arrow_config": "Arrow chooses among other adapters for each token: serve those by their names, or as a mix",
    "kasa_config": "KaSA changes the base's own weights: merge the adapter, and serve the merged model as a base",
    "megatron_config": "its layers are Megatron's: convert the adapter to the modules of transformers",
    "use_qalora": "QALoRA pools its inputs in groups: merge the adapter, and serve the merged model as a base",
}
"""Fields that are refused once they are set, and the way out."""
INITS = (True, False, None, "gaussian", "eva", "orthogonal", "lora_ga", "mica")
"""Values of `init_lora_weights` that leave the base as it is where PEFT loads an adapter."""
CHANGED_BASES = ("pissa", "olora", "corda")
"""What values of `init_lora_weights` begin with that change the base before training."""
BIASES = ("none", "all", "lora_only")
"""Values of `bias`. A base without biases has none to train, and a file with any is refused by their names."""
VARIANTS = ("use_dora", "use_bdlora", "velora_config", "monteclora_config", "alora_invocation_tokens")
"""Fields of which PEFT takes one at most."""


def check_fields(raw: Mapping[str, Any]) -> None:
    """Refuses a config whose fields, or their values, ask for what is not served: first of all its method and task.

    Args:
        raw: the JSON object of `adapter_config.json`.

    Raises:
        InvalidArgument: `peft_type` is missing, or fields contradict each other as PEFT sees it.
        FailedPrecondition: naming a field that cannot be served exactly, and the way out.
    """
    _check_method(raw)
    _check_init(raw.get("init_lora_weights", True))
    bias = raw.get("bias", "none")
    if bias not in BIASES:
        raise FailedPrecondition(f"{shown(bias)} is not supported; {', '.join(BIASES)} are", field="bias")
    for field in (*sorted(raw.keys() & REFUSED.keys()), *sorted(raw.keys() - REFUSED.keys())):
        if field not in CONSUMED | NO_EFFECT and not _is_off(raw[field]):
            way_out = f": {REFUSED[field]}" if field in REFUSED else ""
            raise FailedPrecondition(f"is not supported, and is {shown(raw[field])}{way_out}", field=field)
    _check_variants(raw)


def _check_method(raw: Mapping[str, Any]) -> None:
    if "peft_type" not in raw:
        raise InvalidArgument("is missing: not a config that PEFT has written", field="peft_type")
    method, task = raw["peft_type"], raw.get("task_type")
    if method not in (LORA, ADALORA):
        raise FailedPrecondition(
            f"{shown(method)} is not supported; {LORA} (with rsLoRA and DoRA) and {ADALORA} are. PEFT converts some "
            "others to LoRA (peft.convert_to_lora), or merges them into a base of their own",
            field="peft_type",
        )
    if task not in (TASK, None):
        raise FailedPrecondition(
            f"{shown(task)} is not supported; {TASK} is, for adapters of models that generate text", field="task_type"
        )


def _check_init(init: object) -> None:
    # The types have to be equal as well: True == 1.
    name = init.lower() if isinstance(init, str) else init
    if any(name == known and type(name) is type(known) for known in INITS):
        return
    if isinstance(name, str) and name.startswith(CHANGED_BASES):
        reason = (
            "changed the base's own weights before training, and the file goes with those: save it as plain LoRA with "
            "PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    elif name == "loftq":
        reason = (
            "goes with a base that LoftQ has quantized: serve that base, and set init_lora_weights to true in the "
            "adapter's config"
        )
    else:
        reason = f"is not supported; {', '.join(map(str, INITS))} are"
    raise FailedPrecondition(f"{shown(init)} {reason}", field="init_lora_weights")


def _check_variants(raw: Mapping[str, Any]) -> None:
    """Refuses what PEFT refuses: two variants of LoRA at once, or one that AdaLoRA or parameters do not know."""
    init = raw.get("init_lora_weights", True)
    on = [field for field in VARIANTS if raw.get(field) not in (None, False, [])]
    if raw["peft_type"] == ADALORA:
        for field in ("use_dora", "target_parameters", "alora_invocation_tokens"):
            if raw.get(field):
                raise InvalidArgument(f"does not go with {ADALORA}", field=field)
        return  # it ignores the others
    if init == "mica":
        on.append("init_lora_weights")
    if raw.get("target_parameters") and (own := [*on, *(["lora_bias"] if raw.get("lora_bias") else [])]):
        raise InvalidArgument("does not go with target_parameters", field=own[0])
    if len(on) > 1:
        raise InvalidArgument(f"does not go with {on[0]}", field=on[1])
    if raw.get("lora_bias") and (raw.get("use_dora") or not isinstance(init, bool)):
        raise InvalidArgument("goes without use_dora, and with init_lora_weights true or false", field="lora_bias")


def _is_off(value: object) -> bool:
    """Whether the value of a field that nobody knows turns nothing on."""
    pending = [value]
    while pending:
        one = pending.pop()
        if isinstance(one, Mapping):
            pending += one.values()
        elif one not in (None, False, "", []):
            return False
    return True


_QV, _FUSED, _FUSED_GPT2 = ("q_proj", "v_proj"), ("query_key_value",), ("c_attn",)
_OPT = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
_BOTH: Mapping[str, Sequence[str]] = {
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text", "gpt_neo", "gptj", "llama", "llama4", "qwen2", "qwen3"), _QV),
    **dict.fromkeys(("bloom", "gpt_neox"), _FUSED),
    **dict.fromkeys(("gpt2", "gpt_bigcode"), _FUSED_GPT2),
    "nemotron_h": ("q_proj", "k_proj", "v_proj", "o_proj"),
}
DEFAULT_TARGETS: Mapping[str, Mapping[str, Sequence[str]]] = {
    LORA: {
        **_BOTH,
        **dict.fromkeys(("mistral", "mixtral", "opt", "stablelm"), _QV),
        "codegen": ("qkv_proj",),
        "falcon": _FUSED,
        "mpt": ("Wqkv",),
        "phi": ("q_proj", "v_proj", "fc1", "fc2"),
    },
    ADALORA: {**_BOTH, "opt": _OPT},
}
"""What a null `target_modules` stands for, by method and `model_type` of the base, as in PEFT's own tables."""


def default_targets(method: str, family: str | None) -> Sequence[str]:
    """The modules that PEFT adapts where a config names none.

    Args:
        method: `LORA` or `ADALORA`.
        family: `model_type` of the base's config.

    Raises:
        InvalidArgument: PEFT has no default for the family.
    """
    found = DEFAULT_TARGETS[method].get(family or "")
    if found is None:
        raise InvalidArgument(
            f"names no module, and PEFT has no default for a base of type {family!r}", field="target_modules"
        )
    return found
