"""Attention of prompts: what FlashAttention is asked for is what pages without it give."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from lorarep_runtime.kernels.eager import attention
from lorarep_runtime.kernels.eager.attention import Scores
from lorarep_runtime.model.attention import attend_pages
from lorarep_runtime.model.batch import Batch, Span
from lorarep_runtime.model.kv_cache import KVShape, PagePool, PageTable

CASES = {"parts": ((6, 30), (1, 40), (17, 0), (3, 16)), "whole": ((6, 0), (1, 0), (17, 0))}
"""Rows and contexts of sequences."""


def flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_starts: Tensor,
    k_starts: Tensor,
    most_q: int,
    most_k: int,
    *,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    scale: float,
    window_size_left: int,
    window_size_right: int,
) -> tuple[Tensor, ...]:
    """FlashAttention as it is documented: of each sequence, the last query is at the last key, and a query sees so many
    keys to each side."""
    assert most_q == max(stop - start for start, stop in pairwise(q_starts.tolist()))
    assert most_k == max(stop - start for start, stop in pairwise(k_starts.tolist()))
    assert q_starts.dtype == k_starts.dtype == torch.int32
    assert dropout_p == 0
    assert not return_debug_mask
    left, right = window_size_left, window_size_right
    assert is_causal == ((left, right) == (-1, 0))
    out = torch.full_like(q, torch.nan)
    spans = zip(pairwise(q_starts.tolist()), pairwise(k_starts.tolist()), strict=True)
    for (q_start, q_stop), (k_start, k_stop) in spans:
        rows, length = q_stop - q_start, k_stop - k_start
        at, key = torch.arange(length - rows, length).unsqueeze(1), torch.arange(length)
        seen = (key <= at + right) & ((left < 0) | (key >= at - left))
        keys, values = (x[k_start:k_stop].repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[q_start:q_stop], keys) * scale
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        out[q_start:q_stop] = torch.einsum("hqk,khd->qhd", weights, values)
    return out, weights


@pytest.mark.parametrize("window", [None, 1, 3, 16, 31, 60])
@pytest.mark.parametrize("case", CASES)
def test_flash_attention_sees_the_tokens_that_pages_show(
    case: str, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of several sequences at once: of some a part of the tokens is in the cache already, or of none."""
    torch.manual_seed(0)
    pool = PagePool(40, KVShape(2, 8, 8), dtype=torch.float32, device=torch.device("cpu"))
    for pages in pool.tensors:
        pages.normal_()
    spans = []
    for rows, context in CASES[case]:
        spans.append(Span([0] * rows, context, (0,), None, PageTable(pool, 1)))
        assert spans[-1].table.grow(rows + context)
    batch = Batch(spans, torch.device("cpu"))
    rows = int(batch.starts[-1])
    k, v = (pages.flatten(0, 1)[batch.slots[0]] for pages in pool.tensors)
    given = batch.view((True,)), torch.randn(rows, 4, 8), (k, v), *pool.tensors, batch.tables[0]
    expected = attend_pages(*given, Scores(0.3, window))
    monkeypatch.setattr("lorarep_runtime.model.attention.has_flash", lambda *_: True)
    monkeypatch.setattr(attention, "flash_forward", flash)
    torch.testing.assert_close(attend_pages(*given, Scores(0.3, window)), expected)
