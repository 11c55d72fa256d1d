"""Draws mutations of the code at random and runs each against its module's tests: a mutation that lives wants a test.

    .venv/bin/uv run --no-project --with cosmic-ray tests/mutants.py --seed 1 --draws 30

A line is drawn first, then one of Cosmic Ray's mutations of it. `tests/faults/README.md` judges those that lived.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import os
import random
import shutil
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from cosmic_ray.commands.init import _all_work_items
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator
from cosmic_ray.work_item import MutationSpec

ROOT = Path(__file__).resolve().parents[1]
TESTS = {
    "lorarep_runtime/adapters": ["tests/adapters", "tests/parity", "tests/engine/test_ranks.py"],
    "lorarep_runtime/engine": ["tests/engine"],
    "lorarep_runtime/hub": ["tests/hub"],
    "lorarep_runtime/model": ["tests/model", "tests/engine/test_engine.py", "tests/parity"],
    "lorarep_runtime/text": ["tests/text"],
    "server/lorarep_server/api": ["tests/server"],
    "server/lorarep_server/loading": ["tests/server"],
    "server/lorarep_server/requests": ["tests/server", "tests/faults/test_admission.py"],
}
"""Tests by folder. Folders that need a GPU or Triton's interpreter are left out."""
SECONDS = 1800
"""Time of one mutation's tests; a mutation that takes longer counts as caught."""


@dataclass(frozen=True)
class Mutant:
    file: Path
    line: int
    text: str
    """The file's new content."""

    def diff(self) -> str:
        """The lines that it takes out and puts in."""
        lines = difflib.unified_diff(self.file.read_text().splitlines(), self.text.splitlines(), n=0, lineterm="")
        return "\n".join(line for line in lines if line[0] in "+-" and line[:3] not in ("+++", "---"))


class WithoutAnnotations(ast.NodeTransformer):
    """Takes out what never runs: annotations, which are strings here, and docstrings."""

    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.annotation = None
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        return self.generic_visit(node)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> ast.AST:
        node.returns = None
        return self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        node.annotation = ast.Name("Any")
        return self.generic_visit(node)


def meaning(text: str) -> str:
    """Two texts with the same meaning run alike. Raises SyntaxError."""
    return ast.dump(WithoutAnnotations().visit(ast.parse(text)))


def mutated(file: Path, mutation: MutationSpec) -> Mutant | None:
    """A file with one mutation; None if it runs as before, or cannot run."""
    text = file.read_text()
    new = mutate_code(text, get_operator(mutation.operator_name)(), mutation.occurrence)
    with suppress(SyntaxError):
        if new is not None and meaning(new) != meaning(text):
            return Mutant(file, mutation.start_pos[0], new)
    return None


def draw(folders: Sequence[str], draws: int, dice: random.Random) -> list[Mutant]:
    """So many mutations, each of another line: a line of code is as likely as any other."""
    files = [file for folder in folders for file in sorted((ROOT / folder).glob("*.py"))]
    lines: dict[tuple[Path, int], list[MutationSpec]] = defaultdict(list)
    for item in _all_work_items(files, {}):
        (mutation,) = item.mutations
        lines[Path(mutation.module_path), mutation.start_pos[0]].append(mutation)
    drawn: list[Mutant] = []
    for file, line in dice.sample(sorted(lines), len(lines)):
        possible = dice.sample(lines[file, line], len(lines[file, line]))
        drawn += islice(filter(None, (mutated(file, mutation) for mutation in possible)), 1)
        if len(drawn) == draws:
            break
    return drawn


def catcher(mutant: Mutant, copy: Path) -> str | None:
    """What of the tests of its folder fails first; None if all pass. The tests of the file's own name run first."""
    inside = mutant.file.relative_to(ROOT)
    tests = TESTS[str(inside.parent)]
    own = [str(file.relative_to(copy)) for file in sorted(copy.glob(f"tests/*/test_{inside.stem}.py"))]
    command = [str(ROOT / ".venv/bin/python"), "-m", "pytest", "-x", "-q", "-n0", "-p", "no:cacheprovider"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(str(copy / at) for at in ("", "server", "proto"))}
    env["PYTHONDONTWRITEBYTECODE"] = "1"  # a file of the same size, written in the same second, would be read as before
    (copy / inside).write_text(mutant.text)
    runs = dict(cwd=copy, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=SECONDS)
    try:
        for files in (own, tests):
            if files and (ended := subprocess.run([*command, *files], **runs)).returncode:
                lines = [line for line in ended.stdout.splitlines() if line.startswith(("FAILED", "ERROR tests"))]
                return lines[-1] if lines else f"status {ended.returncode}"
        return None
    except subprocess.TimeoutExpired:
        return f"over {SECONDS} s"
    finally:
        shutil.copy(mutant.file, copy / inside)


def main() -> None:
    """Prints each mutation, and what caught it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--draws", type=int, default=30)
    parser.add_argument("--skip", type=int, default=0, help="so many of the first ones")
    parser.add_argument("--folder", action="append", choices=TESTS, help="only these; all where none is said")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "copy")
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "__pycache__"))
        drawn = draw(asked.folder or list(TESTS), asked.draws, random.Random(asked.seed))
        for number, mutant in enumerate(drawn[asked.skip :], asked.skip):
            print(f"{number}: {mutant.file.relative_to(ROOT)}:{mutant.line}\n{mutant.diff()}", flush=True)
            print(catcher(mutant, copy) or "LIVES", flush=True)


if __name__ == "__main__":
    main()
