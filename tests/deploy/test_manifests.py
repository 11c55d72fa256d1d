"""Each overlay renders to valid Kubernetes resources, and a server accepts its configuration."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from lorarep_server.app import LAST_WRITES
from lorarep_server.auth import check_exposure
from lorarep_server.cli.serve import serve
from lorarep_server.config import ServerConfig
from lorarep_server.loading.adapters_file import read_adapters

from lorarep_runtime.config import SchedulerConfig
from tests.support import crds

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
CONFIGURED = {"base": "metamath", "overlays/cpu": "shout", "overlays/air-gapped": "metamath"}
"""The overlays, and an adapter of each."""
DEMO = Path("/opt/lorarep/demo")
"""The folder of the package's models in the image."""
LISTENS = {"listen": "grpc", "openai_listen": "openai", "metrics_listen": "metrics", "health_listen": "health"}
"""The manifests' names of the ports, by the configuration's."""
OLDEST = "1.30"
"""Oldest version of Kubernetes whose kubelet has the `sleep` hook by default."""

Objects = dict[tuple[str, str], dict[str, Any]]


@pytest.fixture(scope="module", params=["cpu", "gpu", "air-gapped", "tensor-parallel", "gateway"])
def overlay(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def objects(overlay: str) -> Objects:
    """The resources that `kubectl apply -k` would send, by kind and name."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed")
    return render(DEPLOY / "overlays" / overlay)


def render(folder: Path) -> Objects:
    rendered = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, check=True, text=True).stdout
    return {(thing["kind"], thing["metadata"]["name"]): thing for thing in yaml.safe_load_all(rendered)}


@pytest.fixture
def pod(objects: Objects) -> dict[str, Any]:
    return objects["StatefulSet", "lorarep"]["spec"]["template"]["spec"]


def test_a_pod_has_a_gpu_and_shared_memory_for_each_rank(overlay: str, objects: Objects, pod: dict[str, Any]) -> None:
    (config,) = (thing["data"] for thing in objects.values() if "lorarep.yaml" in thing.get("data", {}))
    ranks = yaml.safe_load(config["lorarep.yaml"]).get("tensor_parallel", 1)
    (container,) = pod["containers"]
    assert container["resources"]["limits"].get("nvidia.com/gpu", "1") == str(ranks)
    shared = [mount["name"] for mount in container["volumeMounts"] if mount["mountPath"] == "/dev/shm"]
    assert len(shared) == (ranks > 1) == (overlay == "tensor-parallel")
    for name in shared:
        (volume,) = (volume for volume in pod["volumes"] if volume["name"] == name)
        assert volume["emptyDir"]["medium"] == "Memory"


@pytest.mark.parametrize(("folder", "adapter"), CONFIGURED.items())
def test_the_configuration_is_one_that_serve_takes(folder: str, adapter: str) -> None:
    given = serve.make_context("serve", ["--config", str(DEPLOY / folder / "lorarep.yaml")]).params
    assert given["quantization"] == "nf4"
    assert adapter in read_adapters(DEPLOY / folder / given["adapters_file"].name)
    check_exposure(ServerConfig(**{name: given[name] for name in (*LISTENS, "token_file")}))


def test_the_cpu_overlay_serves_what_the_image_holds() -> None:
    folder = DEPLOY / "overlays" / "cpu"
    adapters = yaml.safe_load((folder / "adapters.yaml").read_text())
    sources = [adapter["repository"] for adapter in adapters.values()]
    sources.append(yaml.safe_load((folder / "lorarep.yaml").read_text())["base"])
    for source in sources:
        assert (ROOT / "server" / "lorarep_server" / "demo" / "models" / Path(source).relative_to(DEMO)).is_dir()
    assert f"lorarep_server/demo/models {DEMO}\n" in (ROOT / "Dockerfile").read_text()


def test_everything_is_in_the_schemas_of_kubernetes(objects: Objects) -> None:
    for thing in objects.values():
        if crds.validate(thing):
            continue
        for version in (OLDEST, kubernetes_validate.latest_version()):
            kubernetes_validate.validate(thing, version, strict=True)


def test_a_field_that_kubernetes_does_not_know_is_found(objects: Objects) -> None:
    stateful = objects["StatefulSet", "lorarep"]
    unknown = {**stateful, "spec": {**stateful["spec"], "replica": 1}}
    with pytest.raises(kubernetes_validate.ValidationError, match="replica"):
        kubernetes_validate.validate(unknown, OLDEST, strict=True)


def test_the_folder_itself_is_the_gpu_overlay(overlay: str, objects: Objects) -> None:
    assert (render(DEPLOY) == objects) == (overlay == "gpu")


def test_everything_finds_the_pods(overlay: str, objects: Objects) -> None:
    kinds = ["ConfigMap", "ConfigMap", "NetworkPolicy", "PodDisruptionBudget", "Service", "Service", "StatefulSet"]
    scaled = [] if overlay == "cpu" else ["HorizontalPodAutoscaler"]
    routed = [*crds.MODELS, "ClusterRoleBinding", "Deployment", "Role", "RoleBinding", "Service", "ServiceAccount"]
    assert sorted(kind for kind, _ in objects) == sorted(kinds + scaled + routed * (overlay == "gateway"))
    stateful = objects["StatefulSet", "lorarep"]["spec"]
    labels = stateful["selector"]["matchLabels"]
    assert labels.items() <= stateful["template"]["metadata"]["labels"].items()
    assert labels
    for name in ("lorarep", stateful["serviceName"]):
        assert objects["Service", name]["spec"]["selector"] == labels
    assert objects["Service", stateful["serviceName"]]["spec"]["clusterIP"] == "None"
    assert objects["PodDisruptionBudget", "lorarep"]["spec"]["selector"]["matchLabels"] == labels
    assert objects["NetworkPolicy", "lorarep"]["spec"]["podSelector"]["matchLabels"] == labels
    if scaled:
        target = objects["HorizontalPodAutoscaler", "lorarep"]["spec"]["scaleTargetRef"]
        assert (target["kind"], target["name"]) in objects
        assert "replicas" not in stateful  # each `kubectl apply` would reset the autoscaler's replicas


def test_what_the_pod_mounts_is_there(objects: Objects, pod: dict[str, Any]) -> None:
    (container,) = pod["containers"]
    # Each mounted object exists under the name that the renderer gave it.
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    claims = {claim["metadata"]["name"] for claim in objects["StatefulSet", "lorarep"]["spec"]["volumeClaimTemplates"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes.keys() | claims
    contents = {name: thing["data"] for (kind, name), thing in objects.items() if kind == "ConfigMap"}
    config, adapters = (contents.pop(volumes[name]["configMap"]["name"]) for name in ("config", "adapters"))
    assert not contents
    assert volumes["adapters"]["configMap"]["name"] == "lorarep-adapters"  # the name does not depend on the content
    settings = yaml.safe_load(config["lorarep.yaml"])
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert Path(settings["token_file"]).parent == Path(mounts["tokens"])
    assert "secret" in volumes["tokens"]
    assert Path(settings["adapters_file"]).parent == Path(mounts["adapters"])
    assert Path(settings["adapters_file"]).name in adapters
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert {name: settings[key] for key, name in LISTENS.items()} == {
        name: f"0.0.0.0:{port}" for name, port in ports.items()
    }
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["grpc"]["port"] == ports["health"]


def test_the_pod_is_not_killed_for_a_late_answer(pod: dict[str, Any]) -> None:
    (container,) = pod["containers"]
    assert container["livenessProbe"]["timeoutSeconds"] >= 30


def test_services_and_policy_name_the_ports_of_the_pod(objects: Objects, pod: dict[str, Any]) -> None:
    (container,) = pod["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    service = {port["targetPort"]: port["port"] for port in objects["Service", "lorarep"]["spec"]["ports"]}
    assert service == {name: port for name, port in ports.items() if name != "health"}
    callers, *others = objects["NetworkPolicy", "lorarep"]["spec"]["ingress"]
    assert [port["port"] for port in callers["ports"]] == ["grpc", "openai"]
    assert {port["port"] for rule in others for port in rule["ports"]} == {"metrics"}


def test_the_grace_period_holds_all_that_ending_takes(objects: Objects, pod: dict[str, Any]) -> None:
    (config,) = (thing["data"] for thing in objects.values() if "lorarep.yaml" in thing.get("data", ()))
    (container,) = pod["containers"]
    hook = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    grace = yaml.safe_load(config["lorarep.yaml"])["grace_seconds"]
    assert pod["terminationGracePeriodSeconds"] == hook + grace + 10
    assert 3 * LAST_WRITES < 10


def test_the_pod_may_do_nothing_but_serve(pod: dict[str, Any]) -> None:
    """The pod meets the "restricted" Pod Security Standard, and more."""
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    (container,) = pod["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    writable = {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
    assert writable - {"/dev/shm"} == {"/cache", "/tmp"}


def settings_of(objects: Objects) -> dict[str, Any]:
    (config,) = (thing["data"] for thing in objects.values() if "lorarep.yaml" in thing.get("data", ()))
    return yaml.safe_load(config["lorarep.yaml"])


def gibibytes(size: str) -> float:
    """Of a quantity of Kubernetes or a size of lorarep's."""
    return float(size.removesuffix("B").removesuffix("Gi"))


def test_where_callers_choose_adapters_each_tier_has_a_budget_that_fits(objects: Objects, pod: dict[str, Any]) -> None:
    settings = settings_of(objects)
    budgets = {name: settings.get(f"adapter_{name}") for name in ("bytes", "host_bytes", "disk_bytes")}
    if "allow_repository" not in settings:
        assert set(budgets.values()) == {None}  # the operator's own adapters are as many as the file says
        return
    (container,) = pod["containers"]
    (claim,) = objects["StatefulSet", "lorarep"]["spec"]["volumeClaimTemplates"]
    assert gibibytes(budgets["bytes"]) > 0
    assert settings["max_queued_per_adapter"] <= SchedulerConfig.max_queued / 2, "a flood for one leaves others room"
    assert gibibytes(budgets["host_bytes"]) <= gibibytes(container["resources"]["limits"]["memory"]) / 2
    assert gibibytes(budgets["disk_bytes"]) + 30 <= gibibytes(claim["spec"]["resources"]["requests"]["storage"])


def test_replicas_that_leave_leave_no_volume_and_do_not_share_a_node(objects: Objects, pod: dict[str, Any]) -> None:
    stateful = objects["StatefulSet", "lorarep"]["spec"]
    assert stateful["persistentVolumeClaimRetentionPolicy"] == {"whenDeleted": "Retain", "whenScaled": "Delete"}
    (spread,) = pod["topologySpreadConstraints"]
    assert (spread["maxSkew"], spread["topologyKey"]) == (1, "kubernetes.io/hostname")
    assert spread["labelSelector"] == stateful["selector"]


def test_the_pod_asks_for_the_disk_and_the_threads_that_it_uses(pod: dict[str, Any]) -> None:
    (container,) = pod["containers"]
    requests = container["resources"]["requests"]
    (tmp,) = (volume["emptyDir"] for volume in pod["volumes"] if volume["name"] == "tmp")
    assert gibibytes(requests["ephemeral-storage"]) > gibibytes(tmp["sizeLimit"])
    (threads,) = (variable for variable in container["env"] if variable["name"] == "OMP_NUM_THREADS")
    field = threads["valueFrom"]["resourceFieldRef"]
    assert field == {"resource": "requests.cpu", "divisor": "1"}
    assert int(requests["cpu"]) >= 1


def images_of(objects: Objects) -> list[str]:
    """The images of all pods, also of those that KServe makes."""
    things = [thing for thing in objects.values() if "spec" in thing]
    specs = [thing["spec"].get("template", thing)["spec"] for thing in things]
    return [container["image"] for spec in specs for container in spec.get("containers", ())]


@pytest.mark.parametrize("folder", ["overlays/gpu", "overlays/gateway", "overlays/tensor-parallel", "kserve"])
def test_the_component_names_every_image_by_digest(folder: str, tmp_path: Path) -> None:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed")
    included = {"resources": folder, "components": "components/digest"}
    site = {name: [os.path.relpath(DEPLOY / path, tmp_path)] for name, path in included.items()}
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(site))
    pinned, loose = render(tmp_path), render(DEPLOY / folder)
    names = {image.split(":")[0] for image in images_of(loose)}
    assert names
    assert all(re.fullmatch(r"[\w-]+@sha256:[0-9a-f]{64}", image) for image in images_of(pinned))
    assert {image.split("@")[0] for image in images_of(pinned)} == names
    # Nothing else differs, and nothing else is there.
    text = json.dumps(list(loose.values()))
    for by_tag, by_digest in zip(images_of(loose), images_of(pinned), strict=True):
        text = text.replace(f'"{by_tag}"', f'"{by_digest}"')
    assert json.loads(text) == list(pinned.values())


def test_an_air_gapped_pod_reaches_nothing(overlay: str, objects: Objects) -> None:
    policy = objects["NetworkPolicy", "lorarep"]["spec"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    assert (not policy["egress"]) == (overlay == "air-gapped")
