"""Benchmarks are run by command; that what they use is still there is seen here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
IMPORT = "import runpy, sys; [runpy.run_path(file, run_name='imported') for file in sys.argv[1:]]"


def test_every_benchmark_can_be_imported() -> None:
    files = sorted(map(str, FOLDER.glob("*.py")))
    assert files
    # In a process of its own: they set variables of the environment.
    ended = subprocess.run([sys.executable, "-c", IMPORT, *files], capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
