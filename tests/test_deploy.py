"""The kustomize base renders, and its server would accept the configuration it is given."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from lorarep_server.access import check_exposure
from lorarep_server.adapters_file import read_adapters
from lorarep_server.config import ServerConfig
from lorarep_server.serve import serve

DEPLOY = Path(__file__).parents[1] / "deploy"


def test_the_configuration_is_one_that_serve_takes() -> None:
    given = serve.make_context("serve", ["--config", str(DEPLOY / "lorarep.yaml")]).params
    assert (given["quantization"], given["allow_repository"]) == ("nf4", ("abacusai/*",))
    assert read_adapters(DEPLOY / given["adapters_file"].name).keys() == {"metamath"}
    check_exposure(ServerConfig(**{name: given[name] for name in ("listen", "metrics_listen", "token_file")}))


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
def test_kubectl_renders_it() -> None:
    rendered = subprocess.run(["kubectl", "kustomize", str(DEPLOY)], capture_output=True, check=True, text=True).stdout
    things = list(yaml.safe_load_all(rendered))
    maps = [thing for thing in things if thing["kind"] == "ConfigMap"]
    objects = {thing["kind"]: thing for thing in things}
    assert objects.keys() == {"ConfigMap", "Deployment", "PersistentVolumeClaim", "Service"}
    pod = objects["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["grpc"]["port"] == 50051
    # Each mounted thing is there under the name that the renderer gave it.
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes.keys()
    contents = {thing["metadata"]["name"]: thing["data"] for thing in maps}
    config, adapters = (contents.pop(volumes[name]["configMap"]["name"]) for name in ("config", "adapters"))
    assert not contents
    assert volumes["adapters"]["configMap"]["name"] == "lorarep-adapters"  # no other name for another content
    assert (
        volumes["cache"]["persistentVolumeClaim"]["claimName"] == objects["PersistentVolumeClaim"]["metadata"]["name"]
    )
    settings = yaml.safe_load(config["lorarep.yaml"])
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert Path(settings["token_file"]).parent == Path(mounts["tokens"])
    assert "secret" in volumes["tokens"]
    assert Path(settings["adapters_file"]).parent == Path(mounts["adapters"])
    assert Path(settings["adapters_file"]).name in adapters
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert settings["listen"].endswith(f":{ports['grpc']}")
    assert settings["metrics_listen"].endswith(f":{ports['metrics']}")
    assert pod["terminationGracePeriodSeconds"] > settings["grace_seconds"]
