"""Has a base's family compared with `transformers` before the base is loaded, in a process with limits of its own."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch
import transformers
from huggingface_hub import constants
from transformers import PretrainedConfig

from lorarep_runtime.device.process import end_process, start_process
from lorarep_runtime.errors import FailedPrecondition
from lorarep_runtime.model import family_process

log = logging.getLogger(__name__)

COMPARED = frozenset({"llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3"})
"""Model types that lorarep's tests compare with PEFT."""
COMPARED_FIELDS = frozenset(
    {
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"),
        *("num_attention_heads", "num_key_value_heads", "tie_word_embeddings", "rms_norm_eps"),
        *("max_position_embeddings", "original_max_position_embeddings", "rope_parameters"),
        *("sliding_window", "use_sliding_window", "max_window_layers", "layer_types", "_sliding_window_pattern"),
        *("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"),
        *("bos_token_id", "eos_token_id", "pad_token_id"),
        # Without effect on logits.
        *("architectures", "dtype", "quantization_config", "transformers_version", "_name_or_path", "use_cache"),
        *("auto_map", "cache_implementation", "torch_dtype"),
        *("initializer_range", "attention_dropout", "embd_pdrop", "resid_pdrop"),
    }
)
"""Fields of their configs that those bases differ in."""
CHECK_SECONDS = 30.0
"""Most processor time of a comparison; most take a second."""
CHECK_BYTES = 3 << 30
"""Most memory of a comparison, libraries aside."""
PROCESS_SECONDS = 300.0
"""Longest time of the process: it imports its libraries first, and others may have the processors."""


def check_family(folder: Path, config: PretrainedConfig, cache_dir: Path | None) -> None:
    """Checks that lorarep computes what `transformers` computes for bases of a config.

    A good verdict is kept in the cache, for this config, this code and these versions of torch and `transformers`.

    Args:
        folder: has the config's file.
        config: of the whole base.
        cache_dir: Hub cache; None is huggingface_hub's default.

    Raises:
        FailedPrecondition: the logits differ, or one of the two cannot compute them, or no small model can be made.
    """
    if is_compared(config):
        return
    verdict = _verdict_file(config, cache_dir)
    if os.path.exists(verdict):  # Path.exists raises where the folder cannot be read
        return
    start = time.perf_counter()
    if refusal := _judged(folder):
        raise FailedPrecondition(
            f"a base of type {config.model_type!r} cannot be served exactly: {refusal}", field="base"
        )
    log.info("%s: compared with transformers in %.1f s", config.model_type, time.perf_counter() - start)
    with suppress(OSError):  # a cache that cannot be written to
        verdict.parent.mkdir(parents=True, exist_ok=True)
        verdict.touch()


def is_compared(config: PretrainedConfig) -> bool:
    """Whether lorarep's tests compare bases like one of a config, so that it does not have to be.

    Any other field may change what the layers compute: `is_causal`, which every family of `transformers` has, does.
    """
    if config.model_type not in COMPARED:
        return False
    usual, own = type(config)().to_dict(), config.to_dict()
    return all(name in COMPARED_FIELDS or (name in usual and usual[name] == value) for name, value in own.items())


def _verdict_file(config: PretrainedConfig, cache_dir: Path | None) -> Path:
    """The file that exists once a config has been found good."""
    versions = (transformers.__version__, str(torch.__version__), _code())
    key = "\n".join((config.to_json_string(use_diff=False), *versions))
    # The Hub's clients take every other folder there for a repository.
    folder = Path(cache_dir or constants.HF_HUB_CACHE, ".locks", "lorarep-families")
    return folder / hashlib.sha256(key.encode()).hexdigest()


@cache
def _code() -> str:
    """SHA-256 of the runtime's code: nearly all of it takes part in a verdict."""
    folder = Path(__file__).parents[1]
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in sorted(folder.rglob("*.py")))).hexdigest()


def _judged(folder: Path) -> str:
    """Why a process that compares a base refuses it; empty where it does not."""
    # A GPU, and threads for a model so small, would only take time.
    process = start_process(family_process.__name__, "compare", {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"})
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(
            json.dumps([str(folder.absolute()), PROCESS_SECONDS, CHECK_SECONDS, CHECK_BYTES]).encode() + b"\n"
        )
        process.stdin.flush()
        answer = process.stdout.readline()
        process.wait()
    except OSError:
        answer = b""  # it has ended before it has read all
    finally:
        end_process(process)
    if answer.endswith(b"\n"):
        return str(json.loads(answer))
    return why_ended(process.returncode)


def why_ended(status: int | None) -> str:
    """Why a process that ended with a status has no verdict."""
    if status == -signal.SIGPROF:
        return f"a small model of it computes for over {CHECK_SECONDS:g} s"
    if status == -signal.SIGALRM:
        return f"comparing a small model of it takes over {PROCESS_SECONDS:g} s"
    return f"computing a small model of it ends a process with status {status}"
