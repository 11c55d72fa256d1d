"""Rotated queries, and keys and values in their pages."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from lorarep_runtime.kernels.attention_config import Attention
from lorarep_runtime.kernels.prefill.rotate_store import rotate_store, rotate_store_reference
from tests.support.decode_rows import DEVICE, DTYPES, TOLERANCE, nan, randn

ROWS, PAGES, PAGE = 5, 4, 16


def check(layer: Attention, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    qkv = randn(ROWS, (layer.heads + 2 * layer.kv_heads) * layer.head_dim, dtype=dtype)
    angles = randn(ROWS, layer.head_dim // 2, scale=3).repeat(1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    slots = torch.randperm(PAGES * PAGE)[:ROWS].to(DEVICE)
    shape = PAGES, PAGE, layer.kv_heads, layer.head_dim
    ours, theirs = ([nan(*shape, dtype=dtype) for _ in range(2)] for _ in range(2))
    q, k, v = rotate_store(layer, qkv, cos, sin, ours[0], ours[1], slots)
    expected = rotate_store_reference(layer, qkv, cos, sin, theirs[0], theirs[1], slots)
    tolerance = dict(rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype], equal_nan=True)
    assert_close((q, k, v), expected, **tolerance)
    assert_close(ours[0], theirs[0], **tolerance)
    assert_close(ours[1], theirs[1], rtol=0, atol=0, equal_nan=True)
    if layer.q_norm is None:
        heads = qkv.view(ROWS, -1, layer.head_dim).transpose(0, 1)[None]
        rotated = apply_rotary_pos_emb(*heads.split([layer.heads, layer.kv_heads, layer.kv_heads], 1)[:2], cos, sin, 0)
        assert_close(q, rotated[0][0].transpose(0, 1), **tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 2, 64), (6, 3, 80), (2, 1, 16)])
def test_heads(dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int) -> None:
    check(Attention(heads, kv_heads, head_dim, scale=1.0), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    norms = {name: (1 + randn(80, scale=0.2)).to(dtype) for name in ("q_norm", "k_norm")}
    check(Attention(4, 2, 80, scale=1.0, **norms), dtype)
