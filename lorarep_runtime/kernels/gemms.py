"""Which GEMMs multiply with packed weights: the one place that knows what each device has."""

from __future__ import annotations

import os
from typing import Literal, NamedTuple

import torch

from lorarep_runtime.errors import InvalidArgument

VARIABLE = "LORAREP_GEMMS"
"""Variable of the environment that names slower GEMMs than the device has: `portable` or `library`."""
HOPPER = 9
"""Major compute capability that the CUDA sources are for. Later devices have no wgmma."""
LEAST = (8, 0)
"""Compute capability from which on kernels run: they need asynchronous copies, and tensor cores that take bf16."""

Kind = Literal["hopper", "portable", "library"]
KINDS: tuple[Kind, ...] = ("hopper", "portable", "library")
"""From the fastest to the slowest."""


class Gemms(NamedTuple):
    """The GEMMs of a device for activations of some dtype."""

    kind: Kind
    reason: str
    """Why it is no faster kind; empty for the fastest."""


def gemms_for(device: torch.device, dtype: torch.dtype) -> Gemms:
    """The fastest GEMMs that a device has, or slower ones if the environment names them.

    Args:
        dtype: of the activations.

    Raises:
        InvalidArgument: the variable of the environment names none.
    """
    own = _own(device, dtype)
    named = os.environ.get(VARIABLE)
    if not named:
        return own
    if named not in KINDS[1:]:
        raise InvalidArgument(f"{named!r} is neither {KINDS[1]!r} nor {KINDS[2]!r}", field=VARIABLE)
    slower = next(kind for kind in KINDS if kind == named)
    return own if KINDS.index(slower) <= KINDS.index(own.kind) else Gemms(slower, f"{VARIABLE} is {named!r}")


def too_old(device: torch.device) -> str | None:
    """Why no kernel runs on a GPU; None where they do."""
    capability = torch.cuda.get_device_capability(device)
    return f"compute capability {_dotted(capability)} is below {_dotted(LEAST)}" if capability < LEAST else None


def _own(device: torch.device, dtype: torch.dtype) -> Gemms:
    if device.type != "cuda":
        return Gemms("library", f"the device is a {device.type.upper()}")
    if (reason := too_old(device)) is not None:
        return Gemms("library", reason)
    capability = torch.cuda.get_device_capability(device)
    if dtype not in (torch.bfloat16, torch.float16):
        return Gemms("library", f"activations are {str(dtype).removeprefix('torch.')}, and not of 16 bits")
    if capability[0] != HOPPER:
        return Gemms("portable", f"compute capability {_dotted(capability)} is no Hopper's ({HOPPER})")
    if dtype != torch.bfloat16:
        return Gemms("portable", "activations are not bfloat16")
    return Gemms("hopper", "")


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"
