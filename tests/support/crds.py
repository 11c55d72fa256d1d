"""Schemas of resources that Kubernetes' own schemas lack: the fields that the manifests use, and their neighbours.

They state what the public definitions say:

- `Gateway`, `HTTPRoute`: the Gateway API's v1.6.1, standard channel.
- `InferencePool`: the Gateway API Inference Extension's v1.6.0.
- `ServingRuntime`, `InferenceService`: KServe's v0.20. Their containers and volumes are those of Kubernetes' pods.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

LABEL = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
Label = Annotated[str, Field(pattern=rf"^{LABEL}$", max_length=63)]
Subdomain = Annotated[str, Field(pattern=rf"^{LABEL}(\.{LABEL})*$", max_length=253)]
Name = Annotated[str, Field(min_length=1, max_length=253)]
Port = Annotated[int, Field(ge=1, le=65535)]
Duration = Annotated[str, Field(pattern=r"^([0-9]{1,5}(h|m|s|ms)){1,4}$")]
"""Of the Gateway API (GEP-2257)."""


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, alias_generator=to_camel)


class Metadata(Strict):
    name: Subdomain
    namespace: Label | None = None
    annotations: dict[str, str] = {}


class Reference(Strict):
    """A reference to an object in the same namespace, of the kind that is the field's default."""

    name: Name


# The Gateway API.


class ListenerTls(Strict):
    mode: Literal["Terminate", "Passthrough"] = "Terminate"
    certificate_refs: Annotated[list[Reference], Field(min_length=1, max_length=64)]


class Listener(Strict):
    name: Subdomain
    hostname: Subdomain | None = None
    port: Port
    protocol: Literal["HTTP", "HTTPS", "TCP", "TLS", "UDP"]
    tls: ListenerTls | None = None


class GatewaySpec(Strict):
    gateway_class_name: Name
    listeners: Annotated[list[Listener], Field(min_length=1, max_length=64)]


class Gateway(Strict):
    api_version: Literal["gateway.networking.k8s.io/v1"]
    kind: Literal["Gateway"]
    metadata: Metadata
    spec: GatewaySpec


class PathMatch(Strict):
    type: Literal["Exact", "PathPrefix", "RegularExpression"] = "PathPrefix"
    value: Annotated[str, Field(pattern="^/", max_length=1024)] = "/"


class Match(Strict):
    path: PathMatch


class PoolReference(Strict):
    """A backend that is an InferencePool. The default group and kind are those of a Service."""

    group: Literal["inference.networking.k8s.io"]
    kind: Literal["InferencePool"]
    name: Name
    weight: Annotated[int, Field(ge=0, le=1_000_000)] = 1


class Timeouts(Strict):
    request: Duration | None = None
    backend_request: Duration | None = None


class Rule(Strict):
    matches: Annotated[list[Match], Field(min_length=1, max_length=64)]
    backend_refs: Annotated[list[PoolReference], Field(min_length=1, max_length=16)]
    timeouts: Timeouts | None = None


class HTTPRouteSpec(Strict):
    parent_refs: Annotated[list[Reference], Field(min_length=1, max_length=32)]
    rules: Annotated[list[Rule], Field(min_length=1, max_length=16)]


class HTTPRoute(Strict):
    api_version: Literal["gateway.networking.k8s.io/v1"]
    kind: Literal["HTTPRoute"]
    metadata: Metadata
    spec: HTTPRouteSpec


# The Inference Extension.


class PortNumber(Strict):
    number: Port


class LabelSelector(Strict):
    match_labels: Annotated[dict[str, str], Field(min_length=1, max_length=64)]


class EndpointPickerRef(Strict):
    """A reference to a Service, the default kind; for that it needs a port."""

    name: Name
    port: PortNumber
    failure_mode: Literal["FailOpen", "FailClose"] = "FailClose"


class InferencePoolSpec(Strict):
    selector: LabelSelector
    target_ports: Annotated[list[PortNumber], Field(min_length=1, max_length=8)]
    app_protocol: Literal["http", "kubernetes.io/h2c"] = "http"
    endpoint_picker_ref: EndpointPickerRef | None = None


class InferencePool(Strict):
    api_version: Literal["inference.networking.k8s.io/v1"]
    kind: Literal["InferencePool"]
    metadata: Metadata
    spec: InferencePoolSpec


# KServe.


class ModelFormat(Strict):
    name: str
    version: str | None = None


class SupportedModelFormat(ModelFormat):
    auto_select: bool = False
    priority: Annotated[int, Field(ge=1)] | None = None


class ServingRuntimeSpec(Strict):
    supported_model_formats: list[SupportedModelFormat]
    protocol_versions: list[str] = []
    annotations: dict[str, str] = {}
    labels: dict[str, str] = {}
    containers: Annotated[list[dict[str, Any]], Field(min_length=1)]
    volumes: list[dict[str, Any]] = []


class ServingRuntime(Strict):
    api_version: Literal["serving.kserve.io/v1alpha1"]
    kind: Literal["ServingRuntime"]
    metadata: Metadata
    spec: ServingRuntimeSpec


class StorageUri(Strict):
    uri: Annotated[str, Field(pattern=r"^(hf|pvc|s3|gs|https?|oci)://.+")]
    mount_path: Annotated[str, Field(pattern=r"^/[^.]+$", max_length=255)] = "/mnt/models"


class PredictorModel(Strict):
    """What a service adds to its runtime's container. Its arguments follow the runtime's."""

    runtime: str | None = None
    model_format: ModelFormat
    args: list[str] = []
    resources: dict[str, Any] = {}


class Predictor(Strict):
    min_replicas: Annotated[int, Field(ge=0)] = 1
    max_replicas: Annotated[int, Field(ge=0)] | None = None
    termination_grace_period_seconds: int | None = None
    security_context: dict[str, Any] = {}
    storage_uris: Annotated[list[StorageUri], Field(min_length=1)]
    model: PredictorModel


class InferenceServiceSpec(Strict):
    predictor: Predictor


class InferenceService(Strict):
    api_version: Literal["serving.kserve.io/v1beta1"]
    kind: Literal["InferenceService"]
    metadata: Metadata
    spec: InferenceServiceSpec


MODELS: Mapping[str, type[Strict]] = {model.__name__: model for model in (Gateway, HTTPRoute, InferencePool)}


def validate(thing: Mapping[str, Any]) -> bool:
    """Whether an object is of a known kind. A known object with other fields or values raises ValidationError."""
    if model := MODELS.get(thing["kind"]):
        model.model_validate(thing)
    return model is not None
