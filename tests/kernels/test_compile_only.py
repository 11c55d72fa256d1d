"""Triton's kernels compile for GPUs that are not here, and take no more than those have."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "benchmarks.gpu.compile_only", "--dtypes", "bfloat16", "--rows", "64"]


def run(*options: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own, in which the interpreter takes no kernels."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([*COMMAND, *options], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)


def test_portable_kernels_fit() -> None:
    """The largest ones, on the devices with the least shared memory. All of them for all devices take minutes."""
    ended = run("--capabilities", "86", "--only", "portable, 4 bits, 64")
    assert ended.returncode == 0, ended.stderr
    lines = [line for line in ended.stdout.splitlines() if "registers" in line]
    assert lines
    assert all(" 0 of stack" in line for line in lines), "registers are spilled"


def test_a_kernel_that_does_not_fit_ends_the_command() -> None:
    assert_that = "import benchmarks.gpu.compile_only as c; c.SHARED_BYTES[86] = 40_000; c.main()"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ended = subprocess.run(
        [sys.executable, "-c", assert_that, *COMMAND[3:], "--capabilities", "86", "--only", "portable, 4 bits, 64"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert ended.returncode == 1
    assert "DOES NOT FIT" in ended.stdout
    assert "1 kernels do not fit" in ended.stderr
