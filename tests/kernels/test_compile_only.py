"""Triton's kernels compile for GPUs that are not here, and take no more than those have."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LEAST_SHARED = 99 << 10
"""Bytes of shared memory of a CTA of compute capability 8.6 (CUDA C++ Programming Guide)."""
COMMAND = f"""
import benchmarks.gpu.compile_only as command
assert command.SHARED_BYTES[86] == {LEAST_SHARED}
command.SHARED_BYTES[86] = 40_000
command.main()
"""


def test_a_portable_kernel_fits_the_least_device_and_what_does_not_fit_ends_the_command() -> None:
    """The largest one. All of them for all devices take minutes."""
    # In a process of its own, in which the interpreter takes no kernels.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    options = ["--dtypes", "bfloat16", "--rows", "64", "--capabilities", "86", "--only"]
    ended = subprocess.run(
        [sys.executable, "-c", COMMAND, *options, "portable, 4 bits, 64"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert ended.returncode == 1
    (line,) = [line for line in ended.stdout.splitlines() if "registers" in line]
    assert "DOES NOT FIT" in line
    assert "1 kernels do not fit" in ended.stderr
    assert " 0 of stack" in line, "registers are spilled"
    (shared,) = re.findall(r"([\d,]+) bytes", line)
    assert int(shared.replace(",", "")) <= LEAST_SHARED
