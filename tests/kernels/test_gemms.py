"""Which GEMMs a device has, and why no faster ones."""

from __future__ import annotations

import pytest
import torch

from lorarep_runtime.errors import InvalidArgument
from lorarep_runtime.kernels.gemms import VARIABLE, gemms_for, too_old

CUDA = torch.device("cuda")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize(
    ("capability", "dtype", "kind", "reason"),
    [
        ((9, 0), BF16, "hopper", ""),
        ((9, 0), FP16, "portable", "not bfloat16"),
        ((8, 0), BF16, "portable", "8.0 is no Hopper"),
        ((8, 6), FP16, "portable", "8.6 is no Hopper"),
        ((10, 0), BF16, "portable", "10.0 is no Hopper"),
        ((12, 0), BF16, "portable", "12.0 is no Hopper"),
        ((7, 5), FP16, "library", "7.5 is below 8.0"),
        ((8, 9), FP32, "library", "float32"),
    ],
)
def test_a_device_has_the_fastest_that_it_can_run(
    capability: tuple[int, int], dtype: torch.dtype, kind: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    gemms = gemms_for(CUDA, dtype)
    assert gemms.kind == kind
    assert reason in gemms.reason
    assert bool(gemms.reason) == bool(reason)


def test_the_environment_names_slower_ones_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setenv(VARIABLE, "portable")
    assert gemms_for(CUDA, BF16) == ("portable", f"{VARIABLE} is 'portable'")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert gemms_for(CUDA, BF16).kind == "library"
    assert "7.5" in gemms_for(CUDA, BF16).reason
    monkeypatch.setenv(VARIABLE, "hopper")
    with pytest.raises(InvalidArgument, match="'hopper' is neither 'portable' nor 'library'"):
        gemms_for(CUDA, BF16)
    monkeypatch.setenv(VARIABLE, "portable")
    assert gemms_for(torch.device("cpu"), BF16) == ("library", "the device is a CPU")


def test_no_kernel_runs_before_ampere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert too_old(CUDA) == "compute capability 7.5 is below 8.0"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert too_old(CUDA) is None
