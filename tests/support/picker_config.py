"""The configuration of llm-d-router's endpoint picker: the parts that the gateway's overlay uses, and their neighbours.

They state what `apix/config/v1alpha1` of llm-d-router v0.10 says, what its loader checks, and what its plugins take.
The picker decodes all of it strictly, and does not start with anything else.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from tests.support.crds import Port, Strict

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
    engine_configs: list[Engine] = Field(default_factory=list)

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
    parsers: list[ParserReference] = Field(default_factory=list)


class EndpointPickerConfig(Strict):
    """The whole of it."""

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
