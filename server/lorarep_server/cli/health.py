"""`lorarep health`: a probe of a running server."""

from __future__ import annotations

import click

from lorarep_server.cli.connection import Connection, with_connection
from lorarep_server.cli.options import option


@click.command()
@click.argument("service", type=click.Choice(("liveness", "readiness")), default="readiness")
@option("--timeout", type=click.FloatRange(min=0, min_open=True), default=5.0, help="Seconds to wait for the answer.")
@with_connection
def health(connection: Connection, service: str, timeout: float) -> None:
    """Ask a server for its health; the exit status is 0 if it serves.

    A probe for servers with TLS, which Kubernetes' own gRPC probes do not speak.
    """
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    with connection.channel() as channel:
        asked = health_pb2.HealthCheckRequest(service=service)
        status = health_pb2_grpc.HealthStub(channel).Check(asked, timeout=timeout).status
    click.echo(health_pb2.HealthCheckResponse.ServingStatus.Name(status))
    if status != health_pb2.HealthCheckResponse.SERVING:
        raise SystemExit(1)
