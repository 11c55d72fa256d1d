"""Each overlay's pod from start to end, without a cluster: as another user, on a root it cannot write to."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OWN = ("--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc")
"""Namespaces in which the manifest's ports are free, and nothing is reached but what is in them."""


@pytest.fixture(scope="module")
def unshare() -> list[str]:
    """The command that runs another in namespaces of its own, as root or as what passes for root in there."""
    said = []
    # The second needs no privilege, where the kernel and a container's profile let users have namespaces.
    for command in (["unshare", *OWN], ["unshare", "--user", "--map-root-user", *OWN]):
        tried = subprocess.run([*command, "true"], capture_output=True, text=True)
        if tried.returncode == 0:
            return command
        said.append(f"{' '.join(command)}: {tried.stderr.strip()}")
    pytest.fail("pods need namespaces, and there are none to be had here:\n" + "\n".join(said))


@pytest.mark.parametrize("overlay", ["cpu", "gpu", "air-gapped"])
def test_a_pod_serves_and_leaves_as_its_manifest_says(overlay: str, unshare: list[str], tmp_path: Path) -> None:
    if shutil.which("kubectl") is None and not os.environ.get("CI"):
        pytest.skip("kubectl is not installed")
    pytest_there = [sys.executable, "-m", "pytest", "-o", "addopts=", "-p", "no:cacheprovider", "-vv"]
    test = f"tests/deploy/pod.py::test_serves_and_leaves[{overlay}]"
    ended = subprocess.run(
        [*unshare, *pytest_there, f"--basetemp={tmp_path / 'pod'}", test],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
    )
    if ended.returncode != 0 or "1 passed" not in ended.stdout:
        pytest.fail(ended.stdout, pytrace=False)
