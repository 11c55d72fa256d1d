"""The engine of lorarep: replicated stacks and adapters over one quantized base. No gRPC here.

These names are its public face. `Engine` is imported when it is first asked for: it imports torch, which clients and a
server that has yet to open its port do without.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lorarep_runtime.config import AdapterLimits, BaseConfig, EngineConfig, SchedulerConfig
from lorarep_runtime.errors import (
    AlreadyExists,
    Cancelled,
    DataLoss,
    DeadlineExceeded,
    EngineFailure,
    Exhausted,
    FailedPrecondition,
    InvalidArgument,
    LorarepError,
    NotFound,
    PermissionDenied,
    Unavailable,
)
from lorarep_runtime.request import Finished, FinishReason, Output, Request, Sampling, Stopping

if TYPE_CHECKING:
    from lorarep_runtime.engine.engine import Engine

__all__ = [
    "AdapterLimits",
    "AlreadyExists",
    "BaseConfig",
    "Cancelled",
    "DataLoss",
    "DeadlineExceeded",
    "Engine",
    "EngineConfig",
    "EngineFailure",
    "Exhausted",
    "FailedPrecondition",
    "FinishReason",
    "Finished",
    "InvalidArgument",
    "LorarepError",
    "NotFound",
    "Output",
    "PermissionDenied",
    "Request",
    "Sampling",
    "SchedulerConfig",
    "Stopping",
    "Unavailable",
]


def __getattr__(name: str) -> Any:
    if name == "Engine":
        from lorarep_runtime.engine.engine import Engine

        return Engine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
