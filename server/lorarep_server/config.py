"""What a server is started with, beside the engine's own configuration."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lorarep_server.sources import AdapterSource


@dataclass(frozen=True)
class ServerConfig:
    """The server's own part."""

    listen: str = "127.0.0.1:50051"
    """Where gRPC is served."""
    metrics_listen: str = "127.0.0.1:9095"
    """Where Prometheus metrics are served over HTTP."""
    health_listen: str | None = None
    """Where grpc.health.v1 is served once more, alone and in plain text, for probes that speak no TLS."""
    openai_listen: str | None = None
    """Where OpenAI's HTTP API and the page are served, with the tokens and the TLS of gRPC; unset, nowhere."""
    traces_endpoint: str | None = None
    """Collector that traces are sent to, as OTLP over gRPC, such as "http://collector:4317"; unset, there are none."""
    tls_certificate: Path | None = None
    """PEM file of the chain that callers are shown; unset, gRPC is in plain text..."""
    tls_key: Path | None = None
    """...and of its key."""
    tls_client_ca: Path | None = None
    """PEM file of the authorities one of which has to have signed a caller's own certificate."""
    token_file: Path | None = None
    """Bearer tokens and their roles; unset, nobody needs one."""
    insecure: bool = False
    """Allows other machines to call with neither."""
    adapters: tuple[AdapterSource, ...] = ()
    """Loaded before the server is ready, from anywhere."""
    adapters_file: Path | None = None
    """YAML file of adapters that are kept loaded, and as the file says, while the server runs."""
    grace_seconds: float = 30.0
    """Seconds that calls under way have to finish when the server is told to end."""
    max_calls: int = 4096
    """Most calls at a time; one more is refused."""
    max_unread: int = 1024
    """Events of a stream that may wait for its reader..."""
    max_unread_seconds: float = 10.0
    """...and for how long there may be more, or a write to it may take, before that stream ends."""
