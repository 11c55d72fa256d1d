"""Attention of prompts: what FlashAttention is asked for is what pages without it give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lorarep_runtime.kernels.eager import attention
from lorarep_runtime.kernels.eager.attention import Scores, paged_attention, prompt_attention

LENGTH, ROWS, PAGE = 13, 6, 4


def flash(q: Tensor, k: Tensor, v: Tensor, *bounds: Any, scale: float, window_size: tuple[int, int]) -> Tensor:
    """FlashAttention as it is documented: the last query is at the last key, and sees so many keys to each side."""
    (left, right), at = window_size, torch.arange(len(k) - len(q), len(k)).unsqueeze(1)
    key = torch.arange(len(k))
    seen = (key <= at + right) & ((left < 0) | (key >= at - left))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize("window", [None, 1, 3, LENGTH - 1, LENGTH + 5])
def test_flash_attention_sees_the_tokens_that_pages_show(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(ROWS, 4, 8, generator=generator)
    keys, values = (torch.randn(6, PAGE, 2, 8, generator=generator) for _ in range(2))
    table, bounds = torch.tensor([3, 0, 5, 1]), torch.tensor([[0, ROWS], [0, LENGTH]], dtype=torch.int32)
    one = queries.unsqueeze(0), keys, values, table.unsqueeze(0), torch.tensor([LENGTH])
    expected = paged_attention(*one, Scores(0.3, window))[0]
    monkeypatch.setattr(attention, "_has_flash", lambda queries: True)
    monkeypatch.setattr(attention, "varlen_attention", lambda: flash)
    got = prompt_attention(queries, keys, values, table, LENGTH, bounds, Scores(0.3, window))
    torch.testing.assert_close(got, expected)
