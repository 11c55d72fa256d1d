"""Attention of one new token a row over pages, whole and split, with all that surrounds it."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from lorarep_runtime.kernels.attention_config import Attention
from lorarep_runtime.kernels.decode import attention
from lorarep_runtime.kernels.decode.attention import BLOCKS, Cache, attend, attend_reference, attend_whole, chunks_of
from lorarep_runtime.kernels.decode.combine import Partials, combine_shrink, combine_shrink_reference
from lorarep_runtime.kernels.decode.store import store, store_reference
from tests.support.decode_rows import (
    CAPACITY,
    DEPTH,
    DEVICE,
    MULTIPLIED,
    PDL,
    POSITIONS,
    TOLERANCE,
    Batch,
    assert_shrunk,
    nan,
    randn,
)

PAGE = 16
LENGTHS = (150, 1, 1, 15, 16, 17)
WALKING = [row for row, position in enumerate(POSITIONS) if position >= 0]


class Sequences:
    """Rows amid pages: those and the places in them that hold no token are NaN."""

    def __init__(self, layer: Attention, dtype: torch.dtype, lengths: tuple[int, ...] = LENGTHS) -> None:
        self.layer = layer
        rows = len(lengths)
        n = -(-max(lengths) // PAGE)
        order = torch.randperm(rows * DEPTH * n + 7)[: rows * DEPTH * n]
        tables = order.view(rows, DEPTH, n).int().to(DEVICE)
        shape = (rows * DEPTH * n + 7, PAGE, layer.kv_heads, layer.head_dim)
        sequences = torch.arange(rows).int().to(DEVICE)
        self.cache = Cache(
            nan(*shape, dtype=dtype),
            nan(*shape, dtype=dtype),
            tables,
            sequences,
            torch.tensor(lengths).int().to(DEVICE),
        )
        for row, (length, position) in enumerate(zip(lengths, POSITIONS, strict=True)):
            for token in range(length - 1):
                page = tables[row, position, token // PAGE]
                for pages in self.cache[:2]:
                    pages[page, token % PAGE] = randn(*shape[2:], dtype=dtype)
        self.qkv = randn(rows, (layer.heads + 2 * layer.kv_heads) * layer.head_dim, dtype=dtype)
        angles = randn(rows, layer.head_dim // 2, scale=3).repeat(1, 2)
        self.cos, self.sin = angles.cos().to(dtype), angles.sin().to(dtype)

    def theirs(self, row: int, position: int) -> Tensor:
        """What torch and `transformers` compute for a row, whose new token is not in its page yet."""
        layer, cache, length = self.layer, self.cache, int(self.cache.lengths[row])
        q, k, v = self.qkv[row].view(-1, layer.head_dim).split([layer.heads, layer.kv_heads, layer.kv_heads])
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = (_qwen_norm(x, w, layer.eps) for x, w in ((q, layer.q_norm), (k, layer.k_norm)))
        q, k = (x[0] for x in apply_rotary_pos_emb(q[None], k[None], self.cos[row][None], self.sin[row][None], 1))
        tables = cache.tables[row, position].long()
        keys, values = (p[tables].flatten(0, 1)[: length - 1] for p in cache[:2])
        keys, values = torch.cat([keys, k[None]]), torch.cat([values, v[None]])
        seen = torch.arange(length, device=DEVICE) >= length - (layer.window or length)
        q, k, v = q[None, :, None], keys.transpose(0, 1)[None], values.transpose(0, 1)[None]
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=seen[None], scale=layer.scale, enable_gqa=True
        ).flatten()


def _qwen_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    norm = Qwen3RMSNorm(len(weight), eps).to(DEVICE)
    norm.weight.data = weight
    return norm(x)


def check(
    layer: Attention,
    dtype: torch.dtype,
    *,
    splits: int = 1,
    parts: int = 2,
    whole: bool = False,
    stored: bool = False,
    chunked: bool = False,
) -> tuple[Tensor, Tensor]:
    """Runs kernels and references over the same rows, and compares what they wrote: all of it.

    Returns:
        The kernels' out and shrunk.
    """
    sequences = Sequences(layer, dtype)
    width = layer.heads * layer.head_dim
    batch = Batch({"q": (8, 8), "o": (8, width)}, dtype)
    shape = 6, layer.heads, splits, layer.head_dim
    ours, reference = (Partials(*(p.fill_(torch.nan) for p in Partials.empty(*shape, DEVICE))) for _ in range(2))
    out, shrunk = nan(6, width, dtype=dtype), nan(6, parts, 1, CAPACITY)
    out_reference, low_reference = out.clone(), shrunk.clone()
    pages = Cache(sequences.cache.key_pages.clone(), sequences.cache.value_pages.clone(), *sequences.cache[2:])
    theirs = [sequences.theirs(row, POSITIONS[row]) for row in WALKING]

    given = layer, sequences.qkv, sequences.cos, sequences.sin
    if stored:
        store(*given, sequences.cache, batch.rows, pdl=PDL)
        before = Cache(pages.key_pages.clone(), pages.value_pages.clone(), *pages[2:])
        store_reference(*given, before, batch.plain)
        for one, other in zip(sequences.cache[:2], before[:2], strict=True):
            assert_close(one, other, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype], equal_nan=True)
    if whole:
        attend_whole(*given, sequences.cache, out, shrunk, batch.rows, 1, stored=stored, pdl=PDL)
    else:
        attend(*given, sequences.cache, ours, batch.rows, stored=stored, chunked=chunked, pdl=PDL)
        combine_shrink(ours, out, shrunk, batch.rows, 1, pdl=PDL)
    attend_reference(*given, pages, reference, batch.plain)
    combine_shrink_reference(reference, out_reference, low_reference, batch.plain, 1)

    tolerance = dict(rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype], equal_nan=True)
    assert_close(sequences.cache.key_pages, pages.key_pages, **tolerance)
    assert_close(sequences.cache.value_pages, pages.value_pages, rtol=0, atol=0, equal_nan=True)
    assert_close(out, out_reference, **tolerance)
    assert_shrunk(
        shrunk.sum(1, keepdim=True) if whole else shrunk, out, batch, 1
    )  # where parts begin is the kernel's affair
    assert_close(out[WALKING], torch.stack(theirs), **tolerance)

    if whole:
        return out, shrunk
    # The reference merges what the kernel left in the splits to the same.
    combine_shrink_reference(ours, out_reference, low_reference, batch.plain, 1)
    assert_close(out, out_reference, **tolerance)
    return out, shrunk


def layer(heads: int = 4, kv_heads: int = 2, head_dim: int = 64, **options: object) -> Attention:
    return Attention(heads, kv_heads, head_dim, scale=1.5 * head_dim**-0.5, **options)


@pytest.mark.parametrize("dtype", MULTIPLIED)
@pytest.mark.parametrize("whole", [False, True])
def test_keys_and_values_are_stored_before_any_row_attends(dtype: torch.dtype, whole: bool) -> None:
    torch.manual_seed(0)
    check(
        layer(6, 2, 16, k_norm=randn(16, dtype=dtype), q_norm=randn(16, dtype=dtype)), dtype, whole=whole, stored=True
    )


@pytest.mark.parametrize(("rows", "whole"), [(128, True), (128, False), (64, True)])
def test_blocks_of_many_rows(rows: int, whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(attention, "BLOCKS", {0: BLOCKS[rows]})
    check(layer(), MULTIPLIED[-1], splits=1 if whole else 4, whole=whole)


@pytest.mark.parametrize("dtype", MULTIPLIED)
@pytest.mark.parametrize("splits", [1, 4])
def test_splits(dtype: torch.dtype, splits: int) -> None:
    torch.manual_seed(0)
    check(layer(), dtype, splits=splits)


@pytest.mark.parametrize(("window", "dtype"), [(None, MULTIPLIED[-1]), (17, MULTIPLIED[0]), (140, MULTIPLIED[-1])])
def test_chunks_give_the_same_bits_for_any_splits(window: int | None, dtype: torch.dtype) -> None:
    """The longest row has two chunks, or one where its window is short: of one program each, or all of one program."""
    results = []
    for splits, stored in ((1, True), (chunks_of(150), False), (chunks_of(4097), True)):
        torch.manual_seed(0)
        results.append(check(layer(window=window), dtype, splits=splits, stored=stored, chunked=True))
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert_close(one, two, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "window", "dtype"),
    [
        (4, 2, 64, None, MULTIPLIED[0]),
        (6, 2, 16, 17, MULTIPLIED[-1]),
        (8, 1, 80, 17, MULTIPLIED[0]),
        (2, 2, 16, None, MULTIPLIED[-1]),
    ],
)
def test_whole_sequences(heads: int, kv_heads: int, head_dim: int, window: int | None, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    check(layer(heads, kv_heads, head_dim, window=window), dtype, parts=kv_heads, whole=True)


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2), (8, 2), (8, 1)])
def test_grouped_heads(heads: int, kv_heads: int) -> None:
    torch.manual_seed(0)
    check(layer(heads, kv_heads, 16), torch.float32, splits=2)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_head_dims(head_dim: int) -> None:
    torch.manual_seed(0)
    check(layer(2, 1, head_dim), torch.float32, splits=2, parts=3)


@pytest.mark.parametrize(("window", "splits"), [(w, 3) for w in (1, 2, 15, 16, 17, 33, 149, 150, 151)] + [(33, 1)])
def test_windows(window: int, splits: int) -> None:
    torch.manual_seed(0)
    check(layer(2, 1, 16, window=window), torch.float32, splits=splits)


@pytest.mark.parametrize("dtype", MULTIPLIED)
def test_norms_of_queries_and_keys(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    norms = dict(q_norm=randn(80, dtype=dtype), k_norm=randn(80, dtype=dtype))
    check(layer(head_dim=80, **norms), dtype, splits=2)
