"""lorarep.v1.ModelService: the base, its stacks, and the memory ledger."""

# ruff: noqa: N802

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from lorarep.v1 import model_pb2, model_pb2_grpc

if TYPE_CHECKING:
    from lorarep_runtime.engine.engine import Engine

QUANTIZATIONS: Mapping[str, model_pb2.Quantization.ValueType] = {
    "none": model_pb2.QUANTIZATION_NONE,
    "nf4": model_pb2.QUANTIZATION_NF4,
    "int8": model_pb2.QUANTIZATION_INT8,
}


class ModelService(model_pb2_grpc.ModelServiceServicer):
    """The RPCs that describe the served model and its memory."""

    def __init__(self, engine: Callable[[], Engine]) -> None:
        self._engine = engine

    async def GetModel(self, request: model_pb2.GetModelRequest, context: Any) -> model_pb2.GetModelResponse:
        engine = self._engine()
        base, adapters, scheduler = engine.base, engine.config.adapters, engine.config.scheduler
        return model_pb2.GetModelResponse(
            base=model_pb2.Base(
                repository=base.repository,
                commit=base.commit,
                model_type=base.config.get_text_config().model_type,
                quantization=QUANTIZATIONS[base.quantization],
                dtype=str(base.dtype).removeprefix("torch."),
                device=str(base.device),
                layers=base.layers,
                vocab_size=base.vocab_size,
            ),
            tokenizer=model_pb2.Tokenizer(
                eos_token_ids=sorted(base.tokenizer.eos_ids), has_chat_template=base.tokenizer.has_chat_template
            ),
            limits=model_pb2.Limits(
                max_sequence_tokens=engine.max_tokens,
                max_sequences=engine.max_sequences,
                max_queued=scheduler.max_queued,
                max_positions=adapters.max_positions,
                max_rank=adapters.max_rank,
                allowed_repositories=adapters.allow_repositories,
            ),
        )

    async def ListStacks(self, request: model_pb2.ListStacksRequest, context: Any) -> model_pb2.ListStacksResponse:
        stacks = sorted(self._engine().stacks.items())
        return model_pb2.ListStacksResponse(
            stacks=[model_pb2.Stack(name=name, layers=layers) for name, layers in stacks]
        )

    async def GetLedger(self, request: model_pb2.GetLedgerRequest, context: Any) -> model_pb2.GetLedgerResponse:
        ledger = await asyncio.to_thread(self._engine().ledger)
        return model_pb2.GetLedgerResponse(
            total=ledger.total,
            **ledger.categories,
            adapter_bytes=ledger.adapters,
            peft_bytes=ledger.peft_bytes,
        )
