"""The configuration of the server. The engine has its own, in `lorarep_runtime.config`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lorarep_server.sources import AdapterSource

MAX_MESSAGE = 16 << 20
"""Most bytes of a request over gRPC, and of a body over HTTP."""
TOOL_CALL_PARSERS = ("hermes", "llama3_json", "mistral", "qwen3_coder")
"""Formats in which models call tools, by vLLM's names."""


@dataclass(frozen=True)
class ServerConfig:
    """Addresses, credentials, limits and adapters of one server. Addresses are HOST:PORT; port 0 is any free port."""

    listen: str = "127.0.0.1:50051"
    """Address of gRPC."""
    metrics_listen: str = "127.0.0.1:9095"
    """Address of Prometheus metrics, over HTTP."""
    health_listen: str | None = None
    """Second address of grpc.health.v1, in plain text, for probes without TLS. Unset: there is none."""
    openai_listen: str | None = None
    """Address of OpenAI's HTTP API and the status page, with the tokens and the TLS of gRPC. Unset: not served."""
    openai_metrics: bool = False
    """Whether metrics are at /metrics of that address, too. They need a token to generate there, if calls need any."""
    ignore_unknown_fields: bool = False
    """Whether unknown fields of requests to OpenAI's API are ignored, and logged, instead of refused."""
    traces_endpoint: str | None = None
    """URL of a collector of traces, OTLP over gRPC, such as "http://collector:4317". Unset: no traces."""
    tls_certificate: Path | None = None
    """PEM file of the server's certificate chain. Unset: gRPC is in plain text."""
    tls_key: Path | None = None
    """PEM file of the private key of the server's certificate."""
    tls_client_ca: Path | None = None
    """PEM file of certificate authorities; callers need a certificate signed by one of them."""
    token_file: Path | None = None
    """File of bearer tokens and their roles. Unset: calls need no token."""
    allow_hosts: tuple[str, ...] = ()
    """Further names of this machine that HTTP callers without credentials may ask for, where a port is on loopback."""
    insecure: bool = False
    """Whether other machines may call without token and client certificate."""
    adapters: tuple[AdapterSource, ...] = ()
    """Adapters to load before the server is ready. The allow-list does not apply to them."""
    adapters_file: Path | None = None
    """YAML file of the adapters to keep loaded while the server runs."""
    grace_seconds: float = 30.0
    """Seconds that running calls have to finish when the server is told to end."""
    stall_seconds: float = 30.0
    """Seconds without any progress of waiting requests after which the server is not ready, until there is some."""
    max_calls: int = 4096
    """Most concurrent calls; further calls are refused."""
    max_connections: int | None = None
    """Most connections to the port of OpenAI's API. None is 512, or fewer where calls or open files are fewer."""
    max_connections_per_address: int | None = None
    """Most of them from one address; None is half of them. Behind a proxy all callers have the proxy's address."""
    tool_call_parser: str | None = None
    """Format in which the model calls tools. Unset: what its chat template tells."""
    max_unread: int = 1024
    """Most events of a stream that may wait for a slow reader for any time."""
    max_unread_seconds: float = 10.0
    """Seconds for which more events may wait, or one write may take, before the stream is ended."""
