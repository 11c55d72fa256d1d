"""Has a base's family compared with `transformers` before the base is loaded, in a process with limits of its own."""

from __future__ import annotations

import hashlib
import json
import logging
import signal
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

import transformers
from huggingface_hub import constants
from transformers import PretrainedConfig

from lorarep_runtime.device.process import end_process, start_process
from lorarep_runtime.errors import FailedPrecondition
from lorarep_runtime.model import family_process

log = logging.getLogger(__name__)

COMPARED = frozenset({"llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3"})
"""Model types that lorarep's tests compare with PEFT, so that no base of theirs has to be."""
CHECK_SECONDS = 30.0
"""Most processor time of a comparison; most take a second."""
CHECK_BYTES = 3 << 30
"""Most memory of a comparison, libraries aside."""
PROCESS_SECONDS = 300.0
"""Longest time of the process: it imports its libraries first, and others may have the processors."""


def check_family(folder: Path, config: PretrainedConfig, cache_dir: Path | None) -> None:
    """Checks that lorarep computes what `transformers` computes for bases of a config.

    A good verdict is kept in the cache, for this config, this code and this version of `transformers`.

    Args:
        folder: has the config's file.
        config: of the whole base.
        cache_dir: Hub cache; None is huggingface_hub's default.

    Raises:
        FailedPrecondition: the logits differ, or one of the two cannot compute them, or no small model can be made.
    """
    if config.model_type in COMPARED:
        return
    verdict = _verdict_file(config, cache_dir)
    if verdict.exists():
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
