"""Descriptions of a server: model, stacks, ledger, health, reflection, metrics."""

from __future__ import annotations

from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from lorarep.v1 import model_pb2 as pb

from tests.support.callers import request
from tests.support.servers import Server

SERVICES = {"lorarep.v1.GenerationService", "lorarep.v1.AdapterService", "lorarep.v1.ModelService"}
METRICS = {
    "requests_running",
    "requests_waiting",
    "requests_finished_total{reason=length}",
    "preemptions_total",
    "prompt_tokens_total",
    "completion_tokens_total",
    "time_to_first_token_seconds_count",
    "time_per_output_token_seconds_count",
    "request_seconds_count",
    "queue_seconds_count",
    "prefill_seconds_count",
    "decode_seconds_count",
    "step_rows_count",
    "step_adapters_count",
    "prefix_cache_queries_total",
    "prefix_cache_hits_total",
    "kv_pages",
    "kv_pages_used",
    "kv_usage_ratio",
    "memory_bytes{category=base_weights}",
    "memory_bytes{category=quantization_constants}",
    "memory_bytes{category=embeddings_and_head}",
    "memory_bytes{category=adapters}",
    "memory_bytes{category=kv_cache}",
    "memory_bytes{category=workspace}",
    "adapter_memory_bytes{adapter=lora}",
    "adapters_loaded{tier=device}",
    "adapters_loaded{tier=host}",
    "adapters_loaded{tier=disk}",
    "adapters_desired{state=loaded}",
    "adapters_desired{state=loading}",
    "adapters_desired{state=failed}",
    "adapter_load_seconds_count{outcome=ok}{source=hub}",
    "adapter_evictions_total",
    "lora_adapter_load_seconds_count{transition=load}",
}


def test_base_and_limits(server: Server) -> None:
    model = server.model.GetModel(pb.GetModelRequest())
    assert (model.base.repository, model.base.model_type, model.base.layers) == ("org/base", "llama", 6)
    assert (model.base.quantization, model.base.dtype) == (pb.QUANTIZATION_NONE, "float32")
    assert (model.limits.max_sequence_tokens, list(model.limits.allowed_repositories)) == (512, ["org/*"])
    assert list(model.tokenizer.eos_token_ids) == [258]


def test_stacks(server: Server) -> None:
    stacks = {s.name: tuple(s.layers) for s in server.model.ListStacks(pb.ListStacksRequest()).stacks}
    assert stacks == {"base": (0, 1, 2, 3, 4, 5), "deep": (0, 1, 2, 3, 2, 3, 4, 5)}


def test_ledger_adds_up(server: Server) -> None:
    ledger = server.model.GetLedger(pb.GetLedgerRequest())
    categories = ("base_weights", "quantization_constants", "embeddings_and_head", "adapters", "kv_cache", "workspace")
    assert ledger.total == sum(getattr(ledger, name) for name in categories)
    assert ledger.adapters == sum(ledger.adapter_bytes.values())
    assert {"lora", "dora"} <= set(ledger.adapter_bytes)
    assert ledger.peft_bytes > ledger.total - ledger.kv_cache


def test_health_of_every_service(server: Server) -> None:
    stub = health_pb2_grpc.HealthStub(server.channel)
    for service in ("", "liveness", "readiness"):
        response = stub.Check(health_pb2.HealthCheckRequest(service=service))
        assert response.status == health_pb2.HealthCheckResponse.SERVING


def test_reflection_tells_every_service_and_message(server: Server) -> None:
    database = ProtoReflectionDescriptorDatabase(server.channel)
    assert SERVICES | {"grpc.health.v1.Health"} <= set(database.get_services())
    file = database.FindFileContainingSymbol("lorarep.v1.GenerateRequest")
    message = next(m for m in file.message_type if m.name == "GenerateRequest")
    fields = ["prompt", "adapters", "stack", "sampling", "stopping", "logprobs", "cache_salt"]
    assert {*fields, "prompt_logprobs", "structured_output"} <= {f.name for f in message.field}


def test_metrics_have_every_name(server: Server) -> None:
    server.generation.Generate(request("abc", "lora", new_tokens=4))
    samples = server.metrics()
    assert {f"lorarep_{name}" for name in METRICS} <= set(samples)
    assert sum(name.startswith("lorarep_lora_requests_info") for name in samples) == 1
    before = samples["lorarep_completion_tokens_total"]
    server.generation.Generate(request("abc", "lora", new_tokens=7))
    assert server.metrics()["lorarep_completion_tokens_total"] == before + 7
