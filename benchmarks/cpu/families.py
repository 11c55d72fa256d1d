"""Which families of `transformers` lorarep serves: each causal family's default config, in small, on the CPU.

    python -m benchmarks.cpu.families [--write docs/compatibility.md] [family ...]

Each family is compared with `transformers` as before a base of it is loaded, in a process of its own, with the same
limits. Models of texts and images are compared on texts. A base may have another config than the default one, and so
another verdict. `--write` puts the table between its two marks in a file. Where families are named, those that are not
keep what the file says.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import tempfile
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path

import torch
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from lorarep_runtime.errors import FailedPrecondition, first_line
from lorarep_runtime.model.family_check import CHECK_BYTES, CHECK_SECONDS, PROCESS_SECONDS, why_ended
from lorarep_runtime.model.family_comparison import refusal
from lorarep_runtime.model.family_process import limit_comparison
from lorarep_runtime.model.model_config import read_model_config
from lorarep_runtime.model.transformers_attention import register_attention

BEGIN, END = "<!-- families: begin -->\n", "<!-- families: end -->"
MOST_SHOWN = 150
"""Characters of a reason in the table."""
ROPE = dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.5, mrope_section=[8, 12, 12])
"""GLM-4.1V's."""
FIELDS: dict[str, dict[str, object]] = {
    "deepseek_v2": {"num_experts_per_tok": 6, "n_routed_experts": 64},
    "dots1": {"n_routed_experts": 128, "num_experts_per_tok": 6, "n_group": 1, "topk_group": 1, "n_shared_experts": 2},
    "glm46v": {"text_config": {"rope_parameters": ROPE}},
    "glm4v": {"text_config": {"rope_parameters": ROPE}},
    "glm4v_moe": {"text_config": {"rope_parameters": ROPE, "head_dim": 128}},
    "glmga": {"text_config": {"rope_parameters": ROPE}},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "ministral": {"head_dim": 128},
    "nemotron": {"head_dim": 128, "num_key_value_heads": 8},
}
"""Fields that published configs have, and without which `transformers` computes nothing."""


@dataclass(frozen=True)
class Verdict:
    """What a base of a family's default config meets."""

    family: str
    refusal: str
    """Why it is refused; empty where it is served."""


def families() -> list[str]:
    """Types of all configs that `transformers` has a causal model for, or a model of texts and images."""
    names = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}
    return sorted({CONFIG_MAPPING[name].model_type for name in names})


def verdicts_of(names: Sequence[str]) -> Iterator[Verdict]:
    """The verdict on each family.

    A family without a default config is left out: nothing is known of it before there is a base.
    """
    context = get_context("forkserver")  # which imports libraries once
    context.set_forkserver_preload([refusal.__module__, "transformers.modeling_utils"])
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for verdict in pool.map(lambda name: _in_process(name, context), names):
            if verdict is not None:
                yield verdict


def _in_process(family: str, context: ForkServerContext) -> Verdict | None:
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_judge, args=(family, theirs))
    process.start()
    theirs.close()
    try:
        why: str | None = ours.recv()
    except EOFError:
        process.join()
        why = why_ended(process.exitcode)
    process.join()
    return None if why is None else Verdict(family, why)


def _judge(family: str, answer: Connection) -> None:
    """Sends why a family is refused, "" where it is served, and None where it has no default config."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # warnings of `transformers`
    torch.set_num_threads(1)
    register_attention()
    limit_comparison(CHECK_SECONDS, CHECK_BYTES)
    signal.setitimer(signal.ITIMER_REAL, PROCESS_SECONDS)  # its signal ends the process
    answer.send(verdict_on(family))


def verdict_on(family: str, **fields: object) -> str | None:
    """Why a family is refused, "" where it is served, and None where it has no default config.

    Args:
        fields: of its config that differ from the default one's.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            CONFIG_MAPPING[family](**{**FIELDS.get(family, {}), **fields}).save_pretrained(folder)
        except Exception:  # of any class
            return None
        try:
            return refusal(read_model_config(Path(folder)))
        except FailedPrecondition as error:
            return error.message


def table(verdicts: Collection[Verdict]) -> str:
    """The verdicts in Markdown: those served in a line, the others with their reasons."""
    images = set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES) - set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    served = [verdict.family for verdict in verdicts if not verdict.refusal]
    lines = [
        f"Served: {', '.join(family for family in served if family not in images)}.\n",
        f"Served, texts alone: {', '.join(family for family in served if family in images)}.\n",
    ]
    rows = [f"| {verdict.family} | {_reason(verdict)} |" for verdict in verdicts if verdict.refusal]
    return "\n".join([*lines, "| refused | why |", "|---|---|", *rows]) + "\n"


def verdicts_in(text: str) -> list[Verdict]:
    """The verdicts of a table, with their reasons as they are shown."""
    served = re.findall(r"^Served.*?: (.*)\.$", text, re.MULTILINE)
    refused = re.findall(r"^\| (\S+) \| (.*) \|$", text, re.MULTILINE)
    rows = [Verdict(family, why.replace("\\|", "|")) for family, why in refused if family != "refused"]
    return [*(Verdict(family, "") for line in served for family in line.split(", ")), *rows]


def _reason(verdict: Verdict) -> str:
    return first_line(ValueError(verdict.refusal))[:MOST_SHOWN].replace("|", "\\|")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="only these")
    parser.add_argument("--write", type=Path, help="file with the two marks")
    arguments = parser.parse_args()
    verdicts = []
    for verdict in verdicts_of(arguments.families or families()):
        print(f"{verdict.family:28}{verdict.refusal or 'served'}", flush=True)
        verdicts.append(verdict)
    print(f"{sum(not verdict.refusal for verdict in verdicts)} of {len(verdicts)} served")
    if arguments.write:
        text = arguments.write.read_text()
        before, _, rest = text.partition(BEGIN)
        old, _, after = rest.partition(END)
        if arguments.families:
            verdicts += [one for one in verdicts_in(old) if one.family not in arguments.families]
            verdicts.sort(key=lambda one: one.family)
        arguments.write.write_text(f"{before}{BEGIN}\n{table(verdicts)}\n{END}{after}")


if __name__ == "__main__":
    main()
