"""The runtime for KServe and a service that uses it: the resources are valid, and a server takes the arguments."""

from __future__ import annotations

import re
import shutil
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
from pydantic import ValidationError

from tests.deploy.test_manifests import DEPLOY, OLDEST, Objects, render
from tests.support.crds import InferenceService, ServingRuntime
from tests.support.models import save_adapter, save_base
from tests.support.servers import SECONDS, Server, serving


@pytest.fixture(scope="module")
def objects() -> Objects:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed")
    return render(DEPLOY / "kserve")


@pytest.fixture(scope="module")
def runtime(objects: Objects) -> ServingRuntime:
    return ServingRuntime.model_validate(objects["ServingRuntime", "lorarep"])


@pytest.fixture(scope="module")
def service(objects: Objects) -> InferenceService:
    return InferenceService.model_validate(objects["InferenceService", "lorarep"])


@pytest.fixture(scope="module")
def container(runtime: ServingRuntime, service: InferenceService) -> dict[str, Any]:
    """The container as KServe starts it: the service's arguments follow the runtime's, and its resources are taken."""
    (container,) = runtime.spec.containers
    model = service.spec.predictor.model
    return {**container, "args": [*container["args"], *model.args], "resources": model.resources}


def test_a_field_that_is_not_known_is_found(objects: Objects) -> None:
    assert set(objects) == {("ServingRuntime", "lorarep"), ("InferenceService", "lorarep")}
    for model, field in ((ServingRuntime, "containerz"), (InferenceService, "predictorz")):
        thing = objects[model.__name__, "lorarep"]
        with pytest.raises(ValidationError, match=field):
            model.model_validate({**thing, "spec": {**thing["spec"], field: {}}})


def test_the_pod_is_in_kubernetes_schemas(
    runtime: ServingRuntime, service: InferenceService, container: dict[str, Any]
) -> None:
    predictor = service.spec.predictor
    spec = {
        "containers": [container],
        "volumes": runtime.spec.volumes,
        "securityContext": predictor.security_context,
        "terminationGracePeriodSeconds": predictor.termination_grace_period_seconds,
    }
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "lorarep"}, "spec": spec}
    for version in (OLDEST, kubernetes_validate.latest_version()):
        kubernetes_validate.validate(pod, version, strict=True)
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in runtime.spec.volumes}


def test_the_service_finds_its_runtime_and_the_folders_that_it_names(
    runtime: ServingRuntime, service: InferenceService, container: dict[str, Any]
) -> None:
    model, storage = service.spec.predictor.model, service.spec.predictor.storage_uris
    assert model.runtime == runtime.metadata.name
    assert model.model_format.name in {known.name for known in runtime.spec.supported_model_formats}
    named = re.findall(r"/mnt/models/[\w-]+", " ".join(container["args"]))
    assert sorted(named) == sorted(uri.mount_path for uri in storage)
    assert container["name"] == "kserve-container"  # the one that KServe looks for
    (grace,) = (int(value) for value in re.findall("--grace-seconds=([0-9]+)", " ".join(container["args"])))
    hook = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert service.spec.predictor.termination_grace_period_seconds == hook + grace + 10


def test_ports_are_those_that_the_server_listens_on(runtime: ServingRuntime, container: dict[str, Any]) -> None:
    listens = dict(re.findall(r"--(\w+)-listen=0\.0\.0\.0:([0-9]+)", " ".join(container["args"])))
    (port,) = container["ports"]
    assert str(port["containerPort"]) == listens["openai"] == "8000"
    assert runtime.spec.annotations["prometheus.kserve.io/port"] == listens["metrics"]
    for probe in ("startupProbe", "readinessProbe"):
        assert container[probe]["httpGet"] == {"path": "/health", "port": port["name"]}
    assert container["livenessProbe"]["grpc"] == {"port": int(listens["health"]), "service": "liveness"}


def test_a_server_takes_the_arguments_and_answers_by_the_adapters_name(
    container: dict[str, Any], tmp_path: Path
) -> None:
    base = save_base("mistral", tmp_path / "base")
    save_adapter(base, tmp_path / "metamath", r=4, target_modules=["q_proj"], layer_replication=[[0, 4], [2, 5]])
    (tmp_path / "tokens").write_text("generate secret\n")
    places = {"/mnt/models": str(tmp_path), "/run/secrets/lorarep": str(tmp_path)}
    arguments = [re.sub(r"=0\.0\.0\.0:[0-9]+", "=127.0.0.1:0", argument) for argument in container["args"][1:]]
    for there, here in places.items():
        arguments = [argument.replace(there, here) for argument in arguments]
    env = {variable["name"]: variable["value"] for variable in container["env"] if "value" in variable}

    def probed(server: Server) -> int:
        """The status of the probe of readiness, as the kubelet sends it: by the pod's address, without a token."""
        path = container["readinessProbe"]["httpGet"]["path"]
        url = f"http://127.0.0.1:{server.openai_port}{path}"
        asked = urllib.request.Request(url, headers={"Host": "10.0.0.9:8000", "User-Agent": "kube-probe/1.35"})
        try:
            with urllib.request.urlopen(asked, timeout=SECONDS) as response:
                return int(response.status)
        except urllib.error.HTTPError as error:
            with error:
                return error.code

    with serving([*arguments, "--kv-bytes=4MiB"], env) as server:
        assert probed(server) == 503  # the port is open, and the base is not loaded
        server.wait_ready()
        assert probed(server) == 200
        client = server.openai(api_key="secret")
        assert {"metamath", "base"} <= {model.id for model in client.models.list()}
        assert client.completions.create(model="metamath", prompt="Hello", max_tokens=3).usage.completion_tokens <= 3
        with urllib.request.urlopen(server.metrics_url, timeout=SECONDS) as response:
            assert b'lorarep_lora_adapter_loaded{adapter_name="metamath"' in response.read()
