"""The prefill GEMM: its launch configs, and on a GPU its results."""

from __future__ import annotations

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor

from lorarep_runtime.integers import ceil_div, round_up
from lorarep_runtime.kernels.hopper import prefill_gemm
from lorarep_runtime.kernels.hopper.launch_config import CTA_BYTES, SHARED_BYTES
from lorarep_runtime.kernels.hopper.nf4 import CHUNK, arrange
from lorarep_runtime.kernels.hopper.prefill_gemm import CONFIGS, matmul

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


def test_memory_of_a_cta_holds_what_its_cluster_sums() -> None:
    for config in CONFIGS:
        assert config.shared <= SHARED_BYTES - CTA_BYTES
        stages = config.shared - (63 << 10)
        assert stages >= 3 * config.rows * CHUNK * 2
        finished = round_up(ceil_div(config.rows // 8, config.cluster), 2)  # eights of rows are stored by twos
        assert config.cluster == 1 or stages >= config.cluster * config.warps * finished * 32 * 16
        assert stages >= config.warps // 4 * config.rows * 128, "outputs are transposed there"


@pytest.mark.parametrize(
    ("rows", "out", "into", "launch"),
    [
        (48, 28672, 4096, (64, 16, 1)),  # as measured on an H200: the fastest of all
        (64, 6144, 4096, (64, 16, 4)),
        (128, 6144, 4096, (128, 8, 2)),
        (128, 28672, 4096, (128, 16, 1)),
        (256, 4096, 4096, (128, 8, 2)),
        (256, 6144, 4096, (256, 8, 2)),
        (512, 4096, 4096, (256, 8, 2)),
        (2048, 28672, 4096, (256, 8, 1)),
    ],
)
def test_launch_configs_are_the_fastest_measured(rows: int, out: int, into: int, launch: tuple[int, int, int]) -> None:
    assert prefill_gemm._launch_config(rows, out // 16, into // CHUNK) == launch


if HOPPER:

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    @pytest.mark.parametrize("rows", [1, 64, 130, 300, 513])
    @pytest.mark.parametrize(("out", "into"), [(48, 192), (256, 128), (368, 64), (1024, 1408), (1024, 14336)])
    def test_matmul(out: int, into: int, rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
        generator = torch.Generator("cuda").manual_seed(out)
        weight, wide = (
            torch.randn(shape, generator=generator, device="cuda").bfloat16()
            for shape in ((out, into), (rows, into + 64))
        )
        packed, state = bnb.functional.quantize_4bit(weight, quant_type="nf4")
        dense: Tensor = bnb.functional.dequantize_4bit(packed, state)
        x = wide[:, 64:]
        expected = x.float() @ dense.float().T
        for launch in CONFIGS:
            monkeypatch.setattr(prefill_gemm, "_launch_config", lambda *_, launch=launch: launch)
            y = torch.full((rows, out + 16), torch.nan, dtype=dtype, device="cuda")
            matmul(*arrange(packed, state.absmax, (out, into)), x, y[:, :out])
            assert y[:, out:].isnan().all()
            errors = (y[:, :out].float() - expected).norm(dim=1) / expected.norm(dim=1)
            assert errors.max() < 6e-3, launch
