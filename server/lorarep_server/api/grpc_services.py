"""All gRPC services of the main port, registered on a server and listed by reflection."""

from __future__ import annotations

import grpc
from fmaas import generation_pb2 as fmaas_pb2
from fmaas import generation_pb2_grpc as fmaas_pb2_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2
from lorarep.v1 import (
    adapters_pb2,
    adapters_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
)

from lorarep_server.api.grpc_adapters import AdapterService
from lorarep_server.api.grpc_fmaas import FmaasService
from lorarep_server.api.grpc_generation import GenerationService
from lorarep_server.api.grpc_model import ModelService
from lorarep_server.auth import check_roles
from lorarep_server.loading.load_queue import LoadQueue
from lorarep_server.loading.reconciler import Reconciler
from lorarep_server.requests.frontend import Frontend

OWN_PROTOS = (generation_pb2, adapters_pb2, model_pb2, fmaas_pb2)
PROTOS = (*OWN_PROTOS, health_pb2, reflection_pb2)
OWN_SERVICES = tuple(
    service.full_name for proto in OWN_PROTOS for service in proto.DESCRIPTOR.services_by_name.values()
)
"""Full names of lorarep.v1's and fmaas' services."""


def add_services(
    server: grpc.aio.Server,
    frontend: Frontend,
    load_queue: LoadQueue,
    reconciler: Reconciler,
    health: health_pb2_grpc.HealthServicer,
) -> None:
    """Registers lorarep.v1's and fmaas' services, health and reflection.

    Raises:
        NotImplementedError: an RPC has no role in `auth.ROLES`.
    """
    generation_pb2_grpc.add_GenerationServiceServicer_to_server(GenerationService(frontend), server)
    fmaas_pb2_grpc.add_GenerationServiceServicer_to_server(FmaasService(frontend), server)
    adapters = AdapterService(frontend.engine, load_queue, reconciler)
    adapters_pb2_grpc.add_AdapterServiceServicer_to_server(adapters, server)
    model_pb2_grpc.add_ModelServiceServicer_to_server(ModelService(frontend.engine), server)
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    services = [service for proto in PROTOS for service in proto.DESCRIPTOR.services_by_name.values()]
    check_roles(services)
    reflection.enable_server_reflection([service.full_name for service in services], server)
