"""The pod of each overlay from start to end, without a cluster: as another user, on a read-only root."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.image import built
from tests.support.models import save_adapter, save_base

ROOT = Path(__file__).parents[2]
OWN = ("--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc")
"""Namespaces in which the manifest's ports are free, and nothing outside can be reached."""


@pytest.fixture(scope="module")
def unshare() -> list[str]:
    """The prefix that runs a command in namespaces of its own, as root or as a user that is mapped to root."""
    built()  # first: later mounts are not visible in the namespaces
    said = []
    # The second command needs no privilege where user namespaces are allowed.
    for command in (["unshare", *OWN], ["unshare", "--user", "--map-root-user", *OWN]):
        tried = subprocess.run([*command, "true"], capture_output=True, text=True)
        if tried.returncode == 0:
            return command
        said.append(f"{' '.join(command)}: {tried.stderr.strip()}")
    pytest.fail("pods need namespaces, and there are none to be had here:\n" + "\n".join(said))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders named like the repositories that the base and the air-gapped overlay serve.

    They are made outside the namespaces, so that the process in there does not import torch.
    """
    folder = tmp_path_factory.mktemp("pods") / "models"
    base = save_base("mistral", folder / "Mistral-7B-v0.1")
    adapter = dict(r=4, target_modules=["q_proj", "v_proj"], layer_replication=[[0, 4], [2, 5]])
    save_adapter(base, folder / "Fewshot-Metamath-OrcaVicuna-Mistral-10B", **adapter)
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)  # weights are saved for their owner alone
    return folder


@pytest.mark.parametrize("overlay", ["cpu", "gpu", "air-gapped"])
def test_a_pod_serves_and_leaves_as_its_manifest_says(
    overlay: str, unshare: list[str], models: Path, tmp_path: Path
) -> None:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed")
    pytest_there = [sys.executable, "-m", "pytest", "-o", "addopts=", "-p", "no:cacheprovider", "-vv"]
    test = f"tests/support/pod.py::test_serves_and_leaves[{overlay}]"
    ended = subprocess.run(
        [*unshare, *pytest_there, f"--basetemp={tmp_path / 'pod'}", test],
        cwd=ROOT,
        env={**os.environ, "LORAREP_POD_MODELS": str(models)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
    )
    if ended.returncode != 0 or "1 passed" not in ended.stdout:
        pytest.fail(ended.stdout, pytrace=False)
