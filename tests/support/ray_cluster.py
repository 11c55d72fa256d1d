"""A Ray cluster of this machine alone, which serves `deploy/ray/serve.yaml` until its standard input ends.

    python -m tests.support.ray_cluster FOLDER PORT ARGUMENTS

FOLDER is the cluster's own, PORT the one of HTTP, and ARGUMENTS those of `lorarep serve`, as a JSON list.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import ray
import yaml
from ray import serve
from ray._common.utils import import_attr
from ray.serve.schema import ServeDeploySchema

ATTEMPTS = 4
RAY = Path(__file__).parents[2] / "deploy" / "ray"


def start(folder: str) -> None:
    """Starts the cluster. Ray gives its own processes 30 s for that, which a busy machine may exceed."""
    for attempt in range(ATTEMPTS):
        try:
            ray.init(
                num_cpus=2,
                include_dashboard=False,
                namespace="serve",
                runtime_env={"working_dir": str(RAY)},
                _node_ip_address="127.0.0.1",
                _temp_dir=f"{folder}/{attempt}",
            )
            return
        except Exception:
            ray.shutdown()
            if attempt == ATTEMPTS - 1:
                raise


def main(folder: str, port: str, arguments: str) -> None:
    (application,) = ServeDeploySchema.model_validate(yaml.safe_load((RAY / "serve.yaml").read_text())).applications
    given: dict[str, Any] = {**application.args, "num_cpus": 1, "num_gpus": 0, "arguments": json.loads(arguments)}
    start(folder)
    serve.start(http_options={"host": "127.0.0.1", "port": int(port)})
    sys.path.insert(0, str(RAY))
    serve.run(import_attr(application.import_path)(given), name=application.name, route_prefix=application.route_prefix)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.read()
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
