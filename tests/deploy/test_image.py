"""The image installs the locked dependencies by hash, and the built image agrees with the Dockerfile."""

from __future__ import annotations

import json
import os
import re
import subprocess
import tomllib

import pytest
from lorarep_server.auth import check_exposure
from lorarep_server.cli.serve import serve
from lorarep_server.config import ServerConfig
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support.image import ROOT, Image, built

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def locked() -> dict[str, list[str]]:
    """The locked versions, by name. Several versions of a package are for different versions of Python."""
    versions: dict[str, list[str]] = {}
    pinned = r"^(\S+)==(\S+)(?: ; [^\\\n]+)? \\\n(?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+"
    rest = re.sub(r"^ *#.*\n", "", (ROOT / "requirements.lock").read_text(), flags=re.MULTILINE)
    for name, version in re.findall(pinned, rest, re.MULTILINE):
        versions.setdefault(name, []).append(version)
    assert not re.sub(pinned, "", rest, flags=re.MULTILINE)
    return versions


@pytest.mark.parametrize("dependency", PROJECT["dependencies"])
def test_what_is_locked_is_in_its_range(dependency: str, locked: dict[str, list[str]]) -> None:
    wanted = Requirement(dependency)
    versions = locked[canonicalize_name(wanted.name)]
    assert all(version in wanted.specifier for version in versions)


def test_one_torch_everywhere(locked: dict[str, list[str]]) -> None:
    (version,) = locked["torch"]
    for name in ("Dockerfile", "Makefile"):
        assert set(re.findall(r"torch==([\d.]*\d)", (ROOT / name).read_text())) == {version}


def test_labels_say_what_the_project_says() -> None:
    labels = Image().labels
    said = {name.removeprefix("org.opencontainers.image."): value for name, value in labels.items()}
    assert said == {
        "title": PROJECT["name"],
        "description": PROJECT["description"],
        "version": PROJECT["version"],
        "licenses": PROJECT["license"],
    }


def test_the_command_is_one_that_serve_takes() -> None:
    image = Image()
    assert image.entrypoint == ["lorarep"]
    assert image.command[0] == "serve"
    given = serve.make_context("serve", [*image.command[1:], "--base=any"]).params
    listens = {name: given[name] for name in ("listen", "openai_listen", "metrics_listen")}
    assert image.ports == {int(listen.rpartition(":")[2]) for listen in listens.values()}
    check_exposure(ServerConfig(**listens, token_file=given["token_file"]))


def test_what_is_built_is_what_the_dockerfile_says() -> None:
    if (folder := built()) is None:
        if os.environ.get("CI"):
            pytest.fail("no image has been built")
        pytest.skip("no image has been built: deploy/with-image")
    image, config = Image(), json.loads((folder / "image.json").read_text())["Docker"]["config"]
    assert (config["Entrypoint"], config["Cmd"]) == (image.entrypoint, image.command)
    assert config["Healthcheck"]["Test"] == ["CMD", *image.healthcheck]
    assert config["StopSignal"] == image.stop_signal.name
    assert config["User"] == image.user == "10001"
    assert dict(variable.split("=", 1) for variable in config["Env"]) == image.env
    assert image.labels.items() <= config["Labels"].items()
    assert set(config["ExposedPorts"]) == {f"{port}/tcp" for port in image.ports}
    # Even with a writable root, the server's user can write only to its own two folders.
    kinds = ["(", "-type", "f", "-or", "-type", "d", "-not", "-perm", "-o+t", ")"]
    writable = ["(", "-uid", image.user, "-or", "-perm", "-o+w", ")"]
    find = ["find", f"{folder}/root/", "-xdev", *kinds, *writable, "-printf", "/%P\n"]
    found = subprocess.run(find, stdout=subprocess.PIPE, text=True, check=True).stdout.split()
    assert {path for path in found if not path.startswith("/home/lorarep/")} == {"/cache", "/home/lorarep"}
