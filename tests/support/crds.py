"""Schemas of resources that Kubernetes' own schemas lack: the fields that the overlays use, and their neighbours.

They state what the public definitions say, and what those who read the resources check beyond them:

- `Gateway`, `HTTPRoute`: the Gateway API's v1.6.1, standard channel.
- `InferencePool`: the Gateway API Inference Extension's v1.6.0.
- `EndpointPickerConfig`: `apix/config/v1alpha1`, the loader and the plugins of llm-d-router v0.10.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
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
    namespace: Label


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


# llm-d-router's endpoint picker.

MetricSpec = Annotated[str, Field(pattern=r'^([a-zA-Z_:][a-zA-Z0-9_:]*(\{(\w+="?[^",}]*"?,?)*\})?)?$')]
"""A metric, and labels that its sample has; nothing is a metric that the engine lacks."""
ENGINES = frozenset({"vllm", "sglang", "trtllm-serve", "triton-tensorrt-llm", "triton"})
"""Those that the extractor knows by itself."""


class Engine(Strict):
    """Names of an engine's metrics. The extractor skips what has none."""

    name: Annotated[str, Field(min_length=1)]
    queued_requests_spec: MetricSpec = ""
    running_requests_spec: MetricSpec = ""
    kv_usage_spec: MetricSpec = Field("", alias="kvUsageSpec")
    lora_spec: MetricSpec = ""
    cache_info_spec: MetricSpec = ""


class ExtractorParameters(Strict):
    engine_label_key: str = "llm-d.ai/engine-type"
    default_engine: str = "vllm"
    engine_configs: list[Engine] = []

    @model_validator(mode="after")
    def _default_is_known(self) -> ExtractorParameters:
        names = [engine.name for engine in self.engine_configs]
        if len(set(names)) < len(names) or "default" in names:
            raise ValueError(f"engines {names} have a name twice, or the reserved one")
        if self.default_engine not in ENGINES.union(names):
            raise ValueError(f"defaultEngine {self.default_engine!r} is none of engineConfigs")
        return self


class SourceParameters(Strict):
    scheme: Literal["http", "https"] = "http"
    path: str = "/metrics"
    port: Port | None = None
    interval: Annotated[str, Field(pattern=r"^([0-9.]+(ms|s|m|h))*$")] = ""
    insecure_skip_verify: bool = True


class Source(Strict):
    name: str | None = None
    type: Literal["metrics-data-source"]
    parameters: SourceParameters = SourceParameters()


class Extractor(Strict):
    name: str | None = None
    type: Literal["core-metrics-extractor"]
    parameters: ExtractorParameters = ExtractorParameters()


class PlainPlugin(Strict):
    """A plugin without parameters."""

    name: str | None = None
    type: Literal[
        "kv-cache-utilization-scorer",
        "lora-affinity-scorer",
        "max-score-picker",
        "openai-parser",
        "passthrough-parser",
        "queue-scorer",
        "single-profile-handler",
    ]


Plugin = Annotated[Source | Extractor | PlainPlugin, Field(discriminator="type")]


class PluginReference(Strict):
    plugin_ref: str
    weight: float | None = None


class SchedulingProfile(Strict):
    name: Annotated[str, Field(min_length=1)]
    plugins: list[PluginReference]


class ParserReference(Strict):
    plugin_ref: str


class RequestHandler(Strict):
    parsers: list[ParserReference] = []


class EndpointPickerConfig(Strict):
    """The configuration of the endpoint picker, which decodes it strictly and ends where it does not fit."""

    api_version: Literal["llm-d.ai/v1alpha1"]
    kind: Literal["EndpointPickerConfig"]
    plugins: list[Plugin]
    scheduling_profiles: Annotated[list[SchedulingProfile], Field(min_length=1, max_length=1)]
    """`single-profile-handler` knows one alone."""
    request_handler: RequestHandler = RequestHandler()

    @model_validator(mode="after")
    def _references_are_defined(self) -> EndpointPickerConfig:
        names = [plugin.name or plugin.type for plugin in self.plugins]
        if len(set(names)) < len(names):
            raise ValueError(f"plugins {names} have a name twice")
        used = [reference.plugin_ref for profile in self.scheduling_profiles for reference in profile.plugins]
        parsers = [reference.plugin_ref for reference in self.request_handler.parsers]
        if lost := {*used, *parsers}.difference(names):
            raise ValueError(f"pluginRef {sorted(lost)} is none of the plugins")
        return self


MODELS: Mapping[str, type[Strict]] = {model.__name__: model for model in (Gateway, HTTPRoute, InferencePool)}


def validate(thing: Mapping[str, Any]) -> bool:
    """Whether an object is of a known kind. A known object with other fields or values raises ValidationError."""
    if model := MODELS.get(thing["kind"]):
        model.model_validate(thing)
    return model is not None
