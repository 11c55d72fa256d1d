"""The settings of a container's process, read from the Dockerfile."""

from __future__ import annotations

import json
import os
import signal
import time
from functools import cache
from pathlib import Path

from dockerfile_parse import DockerfileParser
from dockerfile_parse.util import extract_key_values

ROOT = Path(__file__).parents[2]
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"""The PATH of the base image."""


@cache
def built() -> Path | None:
    """Waits until deploy/with-image has built the image, and returns its folder.

    None if LORAREP_IMAGE is unset: this machine's files then stand in for the image.
    """
    if "LORAREP_IMAGE" not in os.environ:
        return None
    folder = Path(os.environ["LORAREP_IMAGE"])
    while not (folder / "image.json").exists():
        assert not (folder / "failed").exists(), "the image could not be built"
        time.sleep(1)
    return folder


class Image:
    """The settings of all stages of the Dockerfile. Each setting is the same in every image."""

    def __init__(self) -> None:
        steps = [(step["instruction"], step["value"]) for step in DockerfileParser(str(ROOT / "Dockerfile")).structure]
        said = dict(steps)
        self.entrypoint: list[str] = json.loads(said["ENTRYPOINT"])
        self.command: list[str] = json.loads(said["CMD"])
        self.healthcheck: list[str] = json.loads(said["HEALTHCHECK"].partition("CMD ")[2])
        self.stop_signal = signal.Signals[said["STOPSIGNAL"]]
        self.user = said["USER"]
        self.ports = {int(port) for port in said["EXPOSE"].split()}
        self.env: dict[str, str] = {"PATH": PATH}
        self.labels: dict[str, str] = {}
        for instruction, value in steps:
            into = {"ENV": self.env, "LABEL": self.labels}.get(instruction)
            if into is not None:
                into.update(extract_key_values(env_replace=True, args={}, envs=self.env, instruction_value=value))
