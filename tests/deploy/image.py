"""What the Dockerfile says of a container's process."""

from __future__ import annotations

import json
import signal
from pathlib import Path

from dockerfile_parse import DockerfileParser

ROOT = Path(__file__).parents[2]
PATH = "/usr/local/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"""Of the image that ours is built on."""


class Image:
    """As its last stage sets it."""

    def __init__(self) -> None:
        parser = DockerfileParser(str(ROOT / "Dockerfile"), parent_env={"PATH": PATH})
        said = {step["instruction"]: step["value"] for step in parser.structure}
        self.entrypoint: list[str] = json.loads(said["ENTRYPOINT"])
        self.stop_signal = signal.Signals[said["STOPSIGNAL"]]
        self.env: dict[str, str] = {"PATH": PATH, **parser.envs}
