"""Schemas of custom resources, which Kubernetes' own schemas lack: only the fields that the overlays use.

Written by hand from the Gateway API's v1 and the Inference Extension's v1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

Name = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=63)]
Port = Annotated[int, Field(ge=1, le=65535)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, alias_generator=to_camel)


class Metadata(Strict):
    name: Name
    namespace: Name


class Reference(Strict):
    """A reference to an object in the same namespace."""

    name: Name


class ListenerTls(Strict):
    mode: Literal["Terminate", "Passthrough"]
    certificate_refs: Annotated[list[Reference], Field(min_length=1, max_length=64)]


class Listener(Strict):
    name: Name
    port: Port
    protocol: Literal["HTTP", "HTTPS", "TCP", "TLS", "UDP"]
    tls: ListenerTls


class GatewaySpec(Strict):
    gateway_class_name: Name
    listeners: Annotated[list[Listener], Field(min_length=1, max_length=64)]


class Gateway(Strict):
    api_version: Literal["gateway.networking.k8s.io/v1"]
    kind: Literal["Gateway"]
    metadata: Metadata
    spec: GatewaySpec


class PathMatch(Strict):
    type: Literal["Exact", "PathPrefix", "RegularExpression"]
    value: Annotated[str, Field(pattern="^/", max_length=1024)]


class Match(Strict):
    path: PathMatch


class PoolReference(Strict):
    """A backend that is an InferencePool. The default group and kind are those of a Service."""

    group: Literal["inference.networking.k8s.io"]
    kind: Literal["InferencePool"]
    name: Name


class Timeouts(Strict):
    request: Annotated[str, Field(pattern=r"^([0-9]{1,5}(h|m|s|ms)){1,4}$")]


class Rule(Strict):
    matches: Annotated[list[Match], Field(min_length=1, max_length=64)]
    backend_refs: Annotated[list[PoolReference], Field(min_length=1, max_length=16)]
    timeouts: Timeouts


class HTTPRouteSpec(Strict):
    parent_refs: Annotated[list[Reference], Field(min_length=1, max_length=32)]
    rules: Annotated[list[Rule], Field(min_length=1, max_length=16)]


class HTTPRoute(Strict):
    api_version: Literal["gateway.networking.k8s.io/v1"]
    kind: Literal["HTTPRoute"]
    metadata: Metadata
    spec: HTTPRouteSpec


class TargetPort(Strict):
    number: Port


class LabelSelector(Strict):
    match_labels: Annotated[dict[str, str], Field(min_length=1, max_length=64)]


class EndpointPickerRef(Strict):
    """A reference to a Service, the default kind; it needs a port."""

    name: Name
    port: TargetPort
    failure_mode: Literal["FailOpen", "FailClose"]


class InferencePoolSpec(Strict):
    selector: LabelSelector
    target_ports: Annotated[list[TargetPort], Field(min_length=1, max_length=8)]
    endpoint_picker_ref: EndpointPickerRef


class InferencePool(Strict):
    api_version: Literal["inference.networking.k8s.io/v1"]
    kind: Literal["InferencePool"]
    metadata: Metadata
    spec: InferencePoolSpec


class Plugin(Strict):
    type: Literal[
        "kv-cache-utilization-scorer",
        "lora-affinity-scorer",
        "max-score-picker",
        "queue-scorer",
        "single-profile-handler",
    ]


class PluginReference(Strict):
    plugin_ref: str
    weight: Annotated[int, Field(ge=1)] | None = None


class SchedulingProfile(Strict):
    name: Name
    plugins: list[PluginReference]


class EndpointPickerConfig(Strict):
    """The configuration file of the endpoint picker."""

    api_version: Literal["inference.networking.x-k8s.io/v1alpha1"]
    kind: Literal["EndpointPickerConfig"]
    plugins: list[Plugin]
    scheduling_profiles: Annotated[list[SchedulingProfile], Field(min_length=1)]


MODELS: Mapping[str, type[Strict]] = {model.__name__: model for model in (Gateway, HTTPRoute, InferencePool)}


def validate(thing: Mapping[str, Any]) -> bool:
    """Whether an object is of a known kind. A known object with other fields or values raises ValidationError."""
    if model := MODELS.get(thing["kind"]):
        model.model_validate(thing)
    return model is not None
