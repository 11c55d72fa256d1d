"""Rotary embeddings (Su et al., 2021) of a prefill pass, and its keys and values in pages (Kwon et al., 2023)."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lorarep_runtime.kernels.attention_config import Attention
from lorarep_runtime.kernels.eager.attention import write_pages
from lorarep_runtime.kernels.launch import DirectLaunch
from lorarep_runtime.kernels.rotary import rotated, rotated_reference


def rotate_store(
    layer: Attention, qkv: Tensor, cos: Tensor, sin: Tensor, key_pages: Tensor, value_pages: Tensor, slots: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotates each row's query and key (Su et al., 2021), and stores its key and value.

    Rounds as `transformers` does. All tensors are contiguous and, but for the slots, of the activations' dtype.

    Args:
        qkv: (rows, (heads + 2 · kv_heads) · head_dim): queries, keys, values.
        cos, sin: (rows, head_dim).
        key_pages, value_pages: (pages, page_tokens, kv_heads, head_dim), written.
        slots: (rows) int64, page · page_tokens + offset.

    Returns:
        The rotated queries (rows, heads, head_dim) and keys (rows, kv_heads, head_dim), and the values (rows, kv_heads,
        head_dim), a view of `qkv`.
    """
    sizes = layer.heads, layer.kv_heads, layer.head_dim
    q, k = (qkv.new_empty(len(qkv), heads, layer.head_dim) for heads in (layer.heads, layer.kv_heads))
    _launch(
        (len(qkv), 1, 1),
        (qkv.dtype, sizes, layer.q_norm is None, layer.k_norm is None),
        *(qkv, layer.q_norm, layer.k_norm, cos, sin, q, k, key_pages, value_pages, slots, layer.eps),
        *(number for size in sizes for number in (size, triton.next_power_of_2(size))),
    )
    return q, k, qkv[:, -layer.kv_heads * layer.head_dim :].unflatten(1, k.shape[1:])


def rotate_store_reference(
    layer: Attention, qkv: Tensor, cos: Tensor, sin: Tensor, key_pages: Tensor, value_pages: Tensor, slots: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = qkv.view(len(qkv), -1, layer.head_dim).split([layer.heads, layer.kv_heads, layer.kv_heads], 1)
    cos, sin = cos[:, None], sin[:, None]
    k = rotated_reference(k, layer.k_norm, cos, sin, layer.eps)
    write_pages(k, v, key_pages, value_pages, slots)
    return rotated_reference(q, layer.q_norm, cos, sin, layer.eps), k, v


@triton.jit(do_not_specialize=["slots"])  # aligned or not: no reason to compile twice
def _rotate_store(
    qkv,
    q_norm,
    k_norm,
    cos,
    sin,
    q,
    k,
    key_pages,
    value_pages,
    slots,
    eps,
    HEADS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    BLOCK_KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    qkv += row * (HEADS + 2 * KV_HEADS) * DIM
    cos += row * DIM
    sin += row * DIM
    d = tl.arange(0, BLOCK_DIM)[None, :]
    head = tl.arange(0, BLOCK_HEADS)
    rotated_heads = rotated(qkv + head * DIM, q_norm, cos, sin, eps, head < HEADS, DIM, BLOCK_DIM)
    at = head[:, None] * DIM + d
    tl.store(q + row * HEADS * DIM + at, rotated_heads, mask=(head < HEADS)[:, None] & (d < DIM))
    head = tl.arange(0, BLOCK_KV_HEADS)
    rotated_heads = rotated(qkv + (HEADS + head) * DIM, k_norm, cos, sin, eps, head < KV_HEADS, DIM, BLOCK_DIM)
    at = head[:, None] * DIM + d
    inside = (head < KV_HEADS)[:, None] & (d < DIM)
    stored = tl.load(slots + row) * KV_HEADS * DIM + at
    tl.store(key_pages + stored, rotated_heads, mask=inside)
    tl.store(k + row * KV_HEADS * DIM + at, rotated_heads, mask=inside)
    tl.store(value_pages + stored, tl.load(qkv + (HEADS + KV_HEADS) * DIM + at, mask=inside), mask=inside)


_launch = DirectLaunch(_rotate_store)
