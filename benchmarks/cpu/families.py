"""Which families of `transformers` lorarep serves: each causal family's default config, in small, on the CPU.

    python -m benchmarks.cpu.families [--write docs/compatibility.md] [family ...]

Each family is compared with `transformers` as before a base of it is loaded. A base may have another config than the
default one, and so another verdict. `--write` puts the table between its two marks in a file.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from lorarep_runtime.errors import FailedPrecondition, first_line
from lorarep_runtime.model import family_check
from lorarep_runtime.model.model_config import read_model_config
from lorarep_runtime.model.transformers_attention import register_attention

BEGIN, END = "<!-- families: begin -->\n", "<!-- families: end -->"
MOST_SHOWN = 110
"""Characters of a reason in the table."""


@dataclass(frozen=True)
class Verdict:
    """What a base of a family's default config meets."""

    family: str
    refusal: str
    """Why it is refused; empty where it is served."""


def verdicts_of_all(only: Collection[str] = ()) -> Iterator[Verdict]:
    """The verdict on each family, or only on some.

    A family without a default config is left out: nothing is known of it before there is a base.
    """
    register_attention()
    with mock.patch.object(family_check, "COMPARED", frozenset()):
        for kind in sorted(MODEL_FOR_CAUSAL_LM_MAPPING, key=lambda kind: kind.model_type):
            family = kind.model_type
            if only and family not in only:
                continue
            with tempfile.TemporaryDirectory() as folder:
                try:
                    kind().save_pretrained(folder)
                except Exception:
                    continue
                try:
                    family_check.check_family(read_model_config(Path(folder)), Path(folder))
                except FailedPrecondition as error:
                    yield Verdict(family, error.message)
                else:
                    yield Verdict(family, "")


def table(verdicts: Collection[Verdict]) -> str:
    """The verdicts in Markdown: those served in a line, the others with their reasons."""
    served = ", ".join(verdict.family for verdict in verdicts if not verdict.refusal)
    rows = [f"| {verdict.family} | {_reason(verdict)} |" for verdict in verdicts if verdict.refusal]
    return f"Served: {served}.\n\n" + "\n".join(["| refused | why |", "|---|---|", *rows]) + "\n"


def _reason(verdict: Verdict) -> str:
    reason = verdict.refusal.partition("cannot be served exactly: ")[2] or verdict.refusal
    return first_line(ValueError(reason))[:MOST_SHOWN].replace("|", "\\|")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="only these")
    parser.add_argument("--write", type=Path, help="file with the two marks")
    arguments = parser.parse_args()
    verdicts = []
    for verdict in verdicts_of_all(arguments.families):
        print(f"{verdict.family:28}{verdict.refusal or 'served'}", flush=True)
        verdicts.append(verdict)
    if arguments.write:
        text = arguments.write.read_text()
        before, _, rest = text.partition(BEGIN)
        after = rest.partition(END)[2]
        arguments.write.write_text(f"{before}{BEGIN}\n{table(verdicts)}\n{END}{after}")


if __name__ == "__main__":
    main()
