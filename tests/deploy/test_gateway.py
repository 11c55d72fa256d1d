"""The gateway's overlay: its parts refer to each other, and to the server's ports and metrics, correctly."""

from __future__ import annotations

import shutil
from typing import Any, TypeVar

import pytest
import yaml
from pydantic import ValidationError

from tests.deploy.test_manifests import DEPLOY, Objects, render
from tests.server.test_endpoint_picker import KV_USAGE, LORA_INFO, QUEUED, RUNNING
from tests.support import crds
from tests.support.picker_config import EndpointPickerConfig, Extractor, Source

P = TypeVar("P")
ENGINE = "llm-d.ai/engine-type"
"""The pods' label by which the picker finds the names of their metrics."""


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


@pytest.fixture
def config(flags: dict[str, str]) -> EndpointPickerConfig:
    return EndpointPickerConfig.model_validate(yaml.safe_load(flags["config-text"]))


def the(kind: type[P], config: EndpointPickerConfig) -> P:
    """The only plugin of a kind."""
    (plugin,) = (plugin for plugin in config.plugins if isinstance(plugin, kind))
    return plugin


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
    labels = stateful["spec"]["template"]["metadata"]["labels"]
    assert pool["spec"]["selector"]["matchLabels"] == {name: labels[name] for name in labels if name != ENGINE}
    assert pool["spec"]["targetPorts"] == [{"number": ports["openai"]}]
    namespaces = {kind: thing["metadata"].get("namespace") for (kind, _), thing in objects.items()}
    assert namespaces.pop("ClusterRoleBinding") is None
    assert set(namespaces.values()) == {"default"}


def test_the_pool_finds_the_picker_and_no_service_else(objects: Objects, picker: dict[str, Any]) -> None:
    reference = objects["InferencePool", "lorarep"]["spec"]["endpointPickerRef"]
    service = objects["Service", reference["name"]]["spec"]
    named = {port["name"]: port["containerPort"] for port in picker["ports"]}
    assert {port["port"]: named[port["targetPort"]] for port in service["ports"]} == {
        reference["port"]["number"]: 9002,
        9090: 9090,
    }  # the picker's default ports, of calls and of its metrics
    assert (
        picker["readinessProbe"]["grpc"]["port"] == picker["livenessProbe"]["grpc"]["port"] == named["health"] == 9003
    )
    deployment = objects["Deployment", "lorarep-picker"]["spec"]
    labels = deployment["template"]["metadata"]["labels"]
    assert service["selector"] == deployment["selector"]["matchLabels"] == labels
    server = objects["StatefulSet", "lorarep"]["spec"]["template"]["metadata"]["labels"]
    assert not labels.items() & server.items()  # equal labels would send the server's calls to the picker


def test_the_picker_may_read_what_it_needs(objects: Objects) -> None:
    for kind in ("RoleBinding", "ClusterRoleBinding"):
        (subject,) = objects[kind, "lorarep-picker"]["subjects"]
        assert subject == {"kind": "ServiceAccount", "name": "lorarep-picker", "namespace": "default"}
    assert ("ServiceAccount", "lorarep-picker") in objects
    assert objects["RoleBinding", "lorarep-picker"]["roleRef"]["name"] == "lorarep-picker"
    # Kubernetes' own role for those who ask whose a token is, and what its owner may: the picker's metrics do.
    assert objects["ClusterRoleBinding", "lorarep-picker"]["roleRef"]["name"] == "system:auth-delegator"
    pod = objects["Deployment", "lorarep-picker"]["spec"]["template"]["spec"]
    assert pod["serviceAccountName"] == "lorarep-picker"
    rules = objects["Role", "lorarep-picker"]["rules"]
    objectives = {"inferenceobjectives", "inferencemodelrewrites"}
    assert {(group, resource) for rule in rules for group in rule["apiGroups"] for resource in rule["resources"]} == {
        ("", "pods"),
        ("inference.networking.k8s.io", "inferencepools"),
        *(("llm-d.ai", resource) for resource in objectives),
        *(("inference.networking.x-k8s.io", resource) for resource in objectives),
    }
    assert all(rule["verbs"] == ["get", "list", "watch"] for rule in rules)


def test_the_picker_reads_the_metrics_that_the_server_has(
    objects: Objects, ports: dict[str, int], flags: dict[str, str], config: EndpointPickerConfig
) -> None:
    assert set(flags) == {"pool-name", "pool-namespace", "tracing", "config-text"}  # metrics have no flags any more
    assert flags["pool-name"] == objects["InferencePool", "lorarep"]["metadata"]["name"]
    assert the(Source, config).parameters.port == ports["metrics"]
    extractor = the(Extractor, config).parameters
    (engine,) = extractor.engine_configs
    specs = (engine.queued_requests_spec, engine.running_requests_spec, engine.kv_usage_spec, engine.lora_spec)
    assert specs == (QUEUED, RUNNING, KV_USAGE, LORA_INFO)
    pods = objects["StatefulSet", "lorarep"]["spec"]["template"]["metadata"]["labels"]
    assert pods[extractor.engine_label_key] == extractor.default_engine == engine.name
    assert extractor.engine_label_key == ENGINE
    labels = objects["Deployment", "lorarep-picker"]["spec"]["template"]["metadata"]["labels"]
    rules = objects["NetworkPolicy", "lorarep"]["spec"]["ingress"]
    assert {
        "from": [{"podSelector": {"matchLabels": labels}}],
        "ports": [{"port": "metrics", "protocol": "TCP"}],
    } in rules


def test_the_picker_scores_by_adapter_first(config: EndpointPickerConfig) -> None:
    (profile,) = config.scheduling_profiles
    weights = {plugin.plugin_ref: plugin.weight for plugin in profile.plugins if plugin.plugin_ref.endswith("-scorer")}
    assert {plugin.type for plugin in config.plugins if plugin.type.endswith("-scorer")} == set(weights)
    assert max(weights, key=lambda name: weights[name] or 0) == "lora-affinity-scorer"


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        ("port: 9095", "ports: 9095", "ports"),
        ("port: 9095", "port: 95095", "port"),
        ("loraSpec:", "loraInfoSpec:", "loraInfoSpec"),
        ("lorarep_requests_waiting", "a metric", "queuedRequestsSpec"),
        ("defaultEngine: lorarep", "defaultEngine: lorareps", "defaultEngine"),
        ("- type: queue-scorer", "- type: queue-scorers", "queue-scorers"),
        ("- type: queue-scorer", "- {type: queue-scorer, parameters: {most: 3}}", "parameters"),
        ("{pluginRef: queue-scorer, weight: 1}", "{pluginRef: queue, weight: 1}", "pluginRef"),
        ("{pluginRef: queue-scorer, weight: 1}", "{pluginRef: queue-scorer, weight: heavy}", "weight"),
        ("llm-d.ai/v1alpha1", "inference.networking.k8s.io/v1", "apiVersion"),
    ],
)
def test_a_configuration_that_the_picker_would_not_start_with_is_found(
    flags: dict[str, str], old: str, new: str, error: str
) -> None:
    assert old in flags["config-text"]
    with pytest.raises(ValidationError, match=error):
        EndpointPickerConfig.model_validate(yaml.safe_load(flags["config-text"].replace(old, new)))


def test_what_serves_is_the_gpu_overlay(objects: Objects) -> None:
    gpu = render(DEPLOY / "overlays" / "gpu")
    serving, alone = (overlay["StatefulSet", "lorarep"]["spec"] for overlay in (objects, gpu))
    alone["template"]["metadata"]["labels"][ENGINE] = "lorarep"
    assert serving == alone
    scaler = objects["HorizontalPodAutoscaler", "lorarep"]["spec"]
    assert scaler["maxReplicas"] > scaler["minReplicas"] > 1
