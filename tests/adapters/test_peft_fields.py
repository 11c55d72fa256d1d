"""Every field that PEFT knows is used, without effect at inference, or refused with the way out."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from peft import AdaLoraConfig, LoraConfig
from peft.utils import constants
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lorarep_runtime.adapters.peft_config import AdapterConfig
from lorarep_runtime.adapters.peft_fields import ADALORA, CONSUMED, DEFAULT_TARGETS, LORA, NO_EFFECT, REFUSED
from lorarep_runtime.config import AdapterLimits
from lorarep_runtime.errors import FailedPrecondition, InvalidArgument

LIMITS = AdapterLimits()
PLAIN: dict[str, Any] = {"peft_type": "LORA", "target_modules": ["q_proj", "v_proj"]}


def parsed(**changes: Any) -> AdapterConfig:
    """A plain config with other fields, in the order in which PEFT writes them, but for its time limit."""
    raw = dict(sorted({**PLAIN, **changes}.items()))
    return dataclasses.replace(AdapterConfig.parse(raw, LIMITS), deadline=0.0)


@pytest.mark.parametrize("method", [LoraConfig, AdaLoraConfig])
def test_every_field_of_peft_has_one_treatment(method: type[LoraConfig]) -> None:
    fields = {field.name for field in dataclasses.fields(method)}
    treatments = (CONSUMED, NO_EFFECT, REFUSED.keys())
    assert {field: sum(field in treated for treated in treatments) for field in fields} == dict.fromkeys(fields, 1)


@pytest.mark.parametrize("field", sorted(NO_EFFECT))
@pytest.mark.parametrize("value", [None, "something", {"key": 1}, 3])
def test_a_field_without_effect_changes_nothing(field: str, value: object) -> None:
    config = parsed(**{field: value})
    told = dataclasses.replace(config, has_training_tensors=False, base_model_name_or_path=None)
    assert told == parsed()


@pytest.mark.parametrize("field", sorted(REFUSED))
def test_a_refused_field_is_named_with_the_way_out_once_it_is_set(field: str) -> None:
    with pytest.raises(FailedPrecondition, match=rf"^{field}: is not supported, and is 'something': \w+.* \w+"):
        parsed(**{field: "something"})
    offs: tuple[object, ...] = (None, False, [], {})
    for off in offs:
        assert parsed(**{field: off}) == parsed()


REFUSALS = {
    "another method": ({"peft_type": "IA3"}, r"^peft_type: 'IA3' .*convert_to_lora"),
    "a method that is no text": ({"peft_type": ["LORA"]}, r"^peft_type: "),
    "another task": ({"task_type": "SEQ_CLS"}, r"^task_type: 'SEQ_CLS' .*CAUSAL_LM"),
    "biases of another method": ({"bias": "boft_only"}, r"^bias: 'boft_only' .*lora_only"),
    "no word on biases": ({"bias": None}, r"^bias: None"),
    "PiSSA": ({"init_lora_weights": "pissa_niter_4"}, "^init_lora_weights: .*path_initial_model_for_weight_conversion"),
    "OLoRA": ({"init_lora_weights": "OLoRA"}, "^init_lora_weights: .*path_initial_model_for_weight_conversion"),
    "CorDA": ({"init_lora_weights": "corda"}, "^init_lora_weights: .*path_initial_model_for_weight_conversion"),
    "LoftQ": ({"init_lora_weights": "loftq"}, "^init_lora_weights: .*LoftQ has quantized"),
    "a number for a truth": ({"init_lora_weights": 1}, "^init_lora_weights: 1 is not supported"),
    "the unknown": ({"from_the_future": "on"}, "^from_the_future: is not supported"),
    "the unknown, nested": ({"from_the_future": {"off": False, "on": {"rank": 4}}}, "^from_the_future: "),
}


@pytest.mark.parametrize(("changes", "message"), REFUSALS.values(), ids=REFUSALS)
def test_what_cannot_be_served_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FailedPrecondition, match=message):
        parsed(**changes)


OTHERS: dict[str, dict[str, Any]] = {
    "IA3": {"feedforward_modules": ["down_proj"], "target_modules": ["k_proj"]},
    "LOHA": {"module_dropout": 0.1, "use_effective_conv2d": True, "alpha": 8},
    "OFT": {"block_share": True, "coft": True, "oft_block_size": 32},
    "PREFIX_TUNING": {"encoder_hidden_size": 1024, "num_virtual_tokens": 20, "token_dim": 1024},
    "PROMPT_TUNING": {"num_virtual_tokens": 8, "prompt_tuning_init": "TEXT", "modules_to_save": ["lm_head"]},
    "VERA": {"d_initial": 0.1, "projection_prng_key": 0, "save_projection": True, "r": 1024},
    "XLORA": {"adapters": {"0": "./one"}, "xlora_depth": 8},
}


@pytest.mark.parametrize("method", OTHERS)
@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_CLS"])
def test_another_method_is_named_before_its_own_fields_and_its_task(method: str, task: str) -> None:
    with pytest.raises(FailedPrecondition, match=r"^peft_type: "):
        parsed(peft_type=method, task_type=task, **OTHERS[method])


@pytest.mark.parametrize("task", ["SEQ_CLS", "SEQ_2_SEQ_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"])
def test_another_task_is_named_before_the_modules_that_it_saves(task: str) -> None:
    with pytest.raises(FailedPrecondition, match=r"^task_type: "):
        parsed(task_type=task, modules_to_save=["classifier", "score"], target_modules=None)


def test_a_config_without_its_type_is_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"^peft_type: is missing"):
        AdapterConfig.parse({"target_modules": ["q_proj"], "fine_tune_type": "lora"}, LIMITS)


@pytest.mark.parametrize(
    "changes",
    [
        dict(use_dora=True, init_lora_weights="mica"),
        dict(use_dora=True, velora_config={}),
        dict(use_bdlora={"match_strict": False}, monteclora_config={}),
        dict(peft_type="ADALORA", total_step=10, use_dora=True),
    ],
    ids=str,
)
def test_variants_that_peft_does_not_combine_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument, match="does not go with"):
        parsed(**changes)


@pytest.mark.parametrize(
    "value",
    [
        True,
        {"nblocks": 0},
        {"nblocks": True},
        {"nblocks": 10**9},
        {"target_modules_bd_a": "q_proj"},
        {"nblocks": 2, "from_the_future": 1},
    ],
    ids=str,
)
def test_hostile_blocks_are_refused_by_name(value: object) -> None:
    with pytest.raises(InvalidArgument, match=r"^use_bdlora: "):
        parsed(use_bdlora=value)


@pytest.mark.parametrize(
    "value", [{"a.lora_E": 3}, {"a.lora_E": [1, 0]}, {"a.lora_E": [True] * 100_000}, [True]], ids=len
)
def test_hostile_ranks_of_adalora_are_refused_by_name(value: object) -> None:
    with pytest.raises(InvalidArgument, match=r"^rank_pattern"):
        parsed(peft_type="ADALORA", rank_pattern=value)


def test_default_targets_are_pefts() -> None:
    theirs = {
        LORA: constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
        ADALORA: constants.TRANSFORMERS_MODELS_TO_ADALORA_TARGET_MODULES_MAPPING,
    }
    for method, table in theirs.items():
        # Encoders and models of other code aside, and one whose modules are an expression.
        decoders = {
            family: targets
            for family, targets in table.items()
            if family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and isinstance(targets, list)
        }
        missing = decoders.keys() - DEFAULT_TARGETS[method].keys()
        assert missing <= {"bart", "bert", "electra", "roberta", "rwkv", "xlm-roberta"}
        assert {family: list(targets) for family, targets in DEFAULT_TARGETS[method].items()} == {
            family: table[family] for family in DEFAULT_TARGETS[method]
        }


def test_a_base_without_default_targets_is_named() -> None:
    raw = {"peft_type": "LORA", "target_modules": None}
    assert AdapterConfig.parse(raw, LIMITS, "llama").target_modules == ("q_proj", "v_proj")
    with pytest.raises(InvalidArgument, match=r"^target_modules: .*'phi3'"):
        AdapterConfig.parse(raw, LIMITS, "phi3")
