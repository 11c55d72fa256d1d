"""The gateway's overlay: its parts refer to each other, and to the server's ports and metrics, correctly."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from tests.deploy.test_manifests import DEPLOY, Objects, render
from tests.server.test_endpoint_picker import KV_USAGE, LORA_INFO, QUEUED
from tests.support import crds


@pytest.fixture(scope="module")
def objects() -> Objects:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed")
    return render(DEPLOY / "overlays" / "gateway")


@pytest.fixture
def ports(objects: Objects) -> dict[str, int]:
    """The labels of the server's pods."""
    (container,) = objects["StatefulSet", "lorarep"]["spec"]["template"]["spec"]["containers"]
    return {port["name"]: port["containerPort"] for port in container["ports"]}


@pytest.fixture
def picker(objects: Objects) -> dict[str, Any]:
    (container,) = objects["Deployment", "lorarep-picker"]["spec"]["template"]["spec"]["containers"]
    return container


@pytest.fixture
def flags(picker: dict[str, Any]) -> dict[str, str]:
    return dict(argument.removeprefix("--").split("=", 1) for argument in picker["args"])


@pytest.mark.parametrize("kind", crds.MODELS)
def test_a_field_that_is_not_known_is_found(kind: str, objects: Objects) -> None:
    thing = objects[kind, "lorarep"]
    assert crds.validate(thing)
    with pytest.raises(ValidationError, match="listenerz"):
        crds.validate({**thing, "spec": {**thing["spec"], "listenerz": []}})


def test_the_route_leads_from_the_gateway_to_the_pods(objects: Objects, ports: dict[str, int]) -> None:
    gateway, route, pool = (objects[kind, "lorarep"] for kind in crds.MODELS)
    assert route["spec"]["parentRefs"] == [{"name": gateway["metadata"]["name"]}]
    (rule,) = route["spec"]["rules"]
    assert [backend["name"] for backend in rule["backendRefs"]] == [pool["metadata"]["name"]]
    stateful = objects["StatefulSet", "lorarep"]
    assert pool["spec"]["selector"]["matchLabels"] == stateful["spec"]["template"]["metadata"]["labels"]
    assert pool["spec"]["targetPorts"] == [{"number": ports["openai"]}]
    assert {thing["metadata"]["namespace"] for thing in objects.values()} == {"default"}


def test_the_pool_finds_the_picker_and_no_service_else(objects: Objects, picker: dict[str, Any]) -> None:
    reference = objects["InferencePool", "lorarep"]["spec"]["endpointPickerRef"]
    service = objects["Service", reference["name"]]["spec"]
    (port,) = service["ports"]
    assert port["port"] == reference["port"]["number"]
    named = {port["name"]: port["containerPort"] for port in picker["ports"]}
    assert named[port["targetPort"]] == 9002  # the picker's default port
    assert (
        picker["readinessProbe"]["grpc"]["port"] == picker["livenessProbe"]["grpc"]["port"] == named["health"] == 9003
    )
    deployment = objects["Deployment", "lorarep-picker"]["spec"]
    labels = deployment["template"]["metadata"]["labels"]
    assert service["selector"] == deployment["selector"]["matchLabels"] == labels
    server = objects["StatefulSet", "lorarep"]["spec"]["template"]["metadata"]["labels"]
    assert not labels.items() & server.items()  # equal labels would send the server's calls to the picker


def test_the_picker_may_read_what_it_needs(objects: Objects) -> None:
    (subject,) = objects["RoleBinding", "lorarep-picker"]["subjects"]
    assert subject == {"kind": "ServiceAccount", "name": "lorarep-picker", "namespace": "default"}
    assert ("ServiceAccount", "lorarep-picker") in objects
    assert objects["RoleBinding", "lorarep-picker"]["roleRef"]["name"] == "lorarep-picker"
    pod = objects["Deployment", "lorarep-picker"]["spec"]["template"]["spec"]
    assert pod["serviceAccountName"] == "lorarep-picker"
    rules = objects["Role", "lorarep-picker"]["rules"]
    assert {resource for rule in rules for resource in rule["resources"]} >= {"pods", "inferencepools"}
    assert all(rule["verbs"] == ["get", "list", "watch"] for rule in rules)


def test_the_picker_reads_the_metrics_that_the_server_has(
    objects: Objects, ports: dict[str, int], flags: dict[str, str]
) -> None:
    assert flags["pool-name"] == objects["InferencePool", "lorarep"]["metadata"]["name"]
    assert int(flags["model-server-metrics-port"]) == ports["metrics"]
    assert flags["total-queued-requests-metric"] == QUEUED
    assert flags["kv-cache-usage-percentage-metric"] == KV_USAGE
    assert flags["lora-info-metric"] == LORA_INFO
    labels = objects["Deployment", "lorarep-picker"]["spec"]["template"]["metadata"]["labels"]
    rules = objects["NetworkPolicy", "lorarep"]["spec"]["ingress"]
    assert {
        "from": [{"podSelector": {"matchLabels": labels}}],
        "ports": [{"port": "metrics", "protocol": "TCP"}],
    } in rules


def test_the_picker_scores_by_adapter_first(flags: dict[str, str]) -> None:
    config = crds.EndpointPickerConfig.model_validate(yaml.safe_load(flags["config-text"]))
    (profile,) = config.scheduling_profiles
    used = {plugin.plugin_ref: plugin.weight for plugin in profile.plugins}
    assert used.keys() | {"single-profile-handler"} == {plugin.type for plugin in config.plugins}
    weights = {name: weight for name, weight in used.items() if name.endswith("-scorer")}
    assert max(weights, key=lambda name: weights[name] or 0) == "lora-affinity-scorer"


def test_what_serves_is_the_gpu_overlay(objects: Objects) -> None:
    gpu = render(DEPLOY / "overlays" / "gpu")
    assert objects["StatefulSet", "lorarep"]["spec"] == gpu["StatefulSet", "lorarep"]["spec"]
    scaler = objects["HorizontalPodAutoscaler", "lorarep"]["spec"]
    assert scaler["maxReplicas"] > scaler["minReplicas"] > 1
