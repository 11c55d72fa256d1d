"""Capturing steps as CUDA graphs. Without a GPU nothing is captured."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from lorarep_runtime.gpu.graphs import StepGraphs, _captured

if torch.cuda.is_available():

    def test_a_thread_may_capture_before_it_has_multiplied_anything() -> None:
        a = torch.randn(64, 64, device="cuda", dtype=torch.bfloat16)
        out, stream, memory = torch.empty_like(a), torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        with ThreadPoolExecutor(1) as pool:
            replay = pool.submit(_captured, lambda: out.copy_(a @ a), stream, memory).result()
        replay()
        torch.testing.assert_close(out, a @ a)

    def test_a_capture_that_fails_spoils_no_later_one() -> None:
        a = torch.randn(64, 64, device="cuda")
        out, stream = torch.empty_like(a), torch.cuda.Stream()
        graphs = StepGraphs(SimpleNamespace(device=a.device), SimpleNamespace(), [], SimpleNamespace())

        def fails() -> None:
            torch.empty_like(a).copy_(a)
            float(a.sum())  # waits for the device, which invalidates the capture

        for _ in range(2):
            with pytest.raises(RuntimeError, match="captur"):
                graphs._captured(fails, stream)
        graphs._captured(lambda: out.copy_(a + 1), stream)()
        torch.testing.assert_close(out, a + 1)
        pool = torch.cuda.MemPool()
        with torch.cuda.use_mem_pool(pool):
            a = torch.empty_like(a)
        del a, pool  # which ends the process where a capture is thought to go on
