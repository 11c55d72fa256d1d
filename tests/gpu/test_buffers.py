"""Memory of decode steps: every step fits, and its addresses stay as long as the process."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lorarep_runtime.gpu.buffers import LONG_SEQUENCE, StepMemory, depth_for, rank_classes, ranks_for
from lorarep_runtime.gpu.warm_up import warm_up
from lorarep_runtime.kernels.attention_config import Attention
from lorarep_runtime.model.packed import PACKED_MODULES

OUTPUTS = ([64, 32, 32], [64], [128, 128], [64])
INPUTS = (64, 64, 64, 128)


def memory(max_pages: int = 2 * LONG_SEQUENCE // 16) -> StepMemory:
    """Of a layer of four heads of 16, and two of keys and values; for up to six rows."""
    base: Any = SimpleNamespace(
        config=SimpleNamespace(get_text_config=lambda: SimpleNamespace(hidden_size=64)),
        held_modules={
            name: (out, width)
            for names, outputs, width in zip(PACKED_MODULES, OUTPUTS, INPUTS, strict=True)
            for name, out in zip(names, outputs, strict=True)
        },
        vocab_size=10,
        shard=None,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    return StepMemory(base, Attention(heads=4, kv_heads=2, head_dim=16, scale=0.25), 6, 2 * LONG_SEQUENCE, max_pages)


@pytest.mark.parametrize("rank", [1, 8, 9, 64])
@pytest.mark.parametrize("tokens", [1, LONG_SEQUENCE, LONG_SEQUENCE + 1])
def test_every_step_has_room(rank: int, tokens: int) -> None:
    held = memory()
    assert held.buckets == [1, 2, 4, 8]
    for rows in range(1, 7):
        found = held.views(rows, rank, tokens, 20)
        n, ranks, splits, _ = found.shape
        assert n in held.buckets
        assert n >= rows
        assert ranks >= rank
        assert found.tables.shape == (8, depth_for(20), held.max_tokens // 16)
        assert [len(view) for view in (found.tokens, found.lengths, found.adapters, found.logits)] == [n] * 4
        assert found.layers.partials.values.shape == (n, 4, splits, 16)
        for names, shrunk in zip(PACKED_MODULES, found.layers.shrunk, strict=True):
            assert (shrunk.shape[0], *shrunk.shape[2:]) == (n, len(names), ranks)
            assert shrunk.is_contiguous()


def test_prompts_have_more_rows_than_there_are_sequences() -> None:
    held = memory()
    assert held.prompt_buckets == [16, 32, 64, 128]
    for rows in (2, 17, 128):
        found = held.views(rows, 8, 1, 20, shares_sequences=True)
        assert found.shape.shares_sequences
        assert len(found.sequences) == found.shape.rows in held.prompt_buckets
        assert found.tables is held.views(1, 8, 1, 20).tables
        assert len(found.logits) == len(found.ends) == min(found.shape.rows, 8)
        assert found is not held.views(found.shape.rows, 8, 1, 20)


def test_what_a_layer_writes_and_reads_at_once_does_not_overlap() -> None:
    b = memory().views(128, 8, 1, 2, shares_sequences=True).layers
    attended = [b.qkv, b.out, *b.partials]
    for together in ([b.h, b.x, b.gated, *attended], [b.h, b.x, b.gated, b.gate_up]):
        ranges = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in together)
        assert all(end <= begin for (_, end), (begin, _) in pairwise(ranges))
        assert all(begin % 16 == 0 for begin, _ in ranges)


def test_sizes_come_in_few_classes() -> None:
    assert [ranks_for(rank) for rank in (1, 8, 9, 64, 65, 513, 4608)] == [8, 8, 64, 64, 512, 1024, 8192]
    assert [rank_classes(rank) for rank in (8, 40, 64, 512)] == [[8], [8, 64], [8, 64], [8, 64, 512]]
    assert [depth_for(depth) for depth in (1, 16, 17, 64)] == [16, 16, 32, 64]
    assert all(ranks_for(ranks_for(rank)) == ranks_for(rank) for rank in range(1, 200))


def test_a_shape_has_the_same_memory_again_and_all_shapes_share_it() -> None:
    held = memory()
    first = held.views(3, 5, 1, 2)
    held.views(6, 100, held.max_tokens, 40)
    assert held.views(4, 8, 1, 16) is first
    wider = held.views(8, 5, 1, 2)
    assert wider.tokens.data_ptr() == first.tokens.data_ptr()
    assert wider.layers.h.data_ptr() == first.layers.h.data_ptr()
    assert wider.tables is first.tables
    counted = {tensor.untyped_storage().data_ptr() for tensor in held.tensors}
    layers = wider.layers
    for view in (wider.logits, wider.tables, layers.gated, *layers.shrunk, *layers.partials):
        assert view.untyped_storage().data_ptr() in counted


def test_page_tables_have_room_for_the_longest_sequence_and_for_no_more() -> None:
    assert memory(max_pages=70).views(4, 8, 1, 300).tables.shape == (8, 512, 70)


def test_kernels_of_every_rank_are_compiled_before_the_server_is_ready() -> None:
    """And for every number of rows and of parts: streams would wait for seconds for the first adapter of a rank."""
    held, compiled, captured = memory(), set(), []
    graphs = SimpleNamespace(
        compile=lambda buffers: compiled.add(buffers.shape),
        graph=lambda plan, buffers: captured.append((plan.stacks, buffers.shape)),
    )
    decoder: Any = SimpleNamespace(base=held._base, memory=held, graphs=graphs)
    warm_up(decoder, [(0, 1), (0, 1, 1)], 512)
    assert compiled == {
        held.views(rows, rank, tokens, 2, shares_sequences=shares).shape
        for shares, most in ((False, 6), (True, 128))
        for rows in range(1, most + 1)
        for rank in range(1, 513)
        for tokens in (1, LONG_SEQUENCE, LONG_SEQUENCE + 1)
    }
    assert len(captured) == 2 * (len(held.buckets) + len(held.prompt_buckets))
    assert {shape for _, shape in captured} <= compiled
