"""Decoding on a GPU: a step of one new token for each row is one captured graph, from the tokens to the next ones.

A graph belongs to a plan, a number of rows, a largest rank and the parts that sequences are split into. Which rows walk
which of the plan's stacks, with which adapters and on which pages, is data that it reads: rows without a position at a
step pass through. It takes the tokens that it chose itself, so the next step can be launched before anybody has read
them; when a sequence has grown so long that it is better split into more parts, that step is another graph's.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lorarep_runtime.config import PAGE_TOKENS
from lorarep_runtime.device.staging import moved, staged
from lorarep_runtime.gpu.fused_layer import (
    FAMILIES,
    Buffers,
    FusedLayer,
    GroupProduct,
    attention_shrinks,
    fuse,
    parts_for,
    splits_for,
)
from lorarep_runtime.gpu.prefill import Prefill
from lorarep_runtime.kernels.decode.attention import Cache
from lorarep_runtime.kernels.decode.combine import Partials
from lorarep_runtime.kernels.entry_table import FIELDS, DecodeRows
from lorarep_runtime.kernels.hopper import prefill_gemm
from lorarep_runtime.kernels.hopper.decode_gemm import compile_products
from lorarep_runtime.kernels.prefill.adapt_segments import SegmentTiles, adapt_segments
from lorarep_runtime.model.batch import Batch, Span
from lorarep_runtime.model.kv_cache import PagePool, PageTable, pages_of
from lorarep_runtime.model.packed import PACKED_MODULES
from lorarep_runtime.model.plan import Plan, merge
from lorarep_runtime.model.stack import Stack
from lorarep_runtime.progress import Progress

if TYPE_CHECKING:
    from lorarep_runtime.model.base import Base

MOST_GRAPHS = 64
"""Captured at a time; the least recently used goes first."""
LEAST_RANKS = 8
"""Of shrunk. A batch with larger ranks takes eight times as many, or sixty-four times: few sizes, so few graphs."""
LEAST_DEPTH = 16
"""Of page tables; deeper ones have a power of two."""
SILU = {"silu", "swish"}
"""`hidden_act`s that the kernels compute."""
CHANGING_ROTARY = {"dynamic", "longrope"}
"""`rope_type`s whose frequencies depend on the length."""


def can_decode(base: Base) -> bool:
    """Whether there are kernels for a base's layers."""
    config = base.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    return (
        config.model_type in FAMILIES
        and config.hidden_act in SILU
        and rope.get("rope_type", "default") not in CHANGING_ROTARY
        and set(base.modules) == {name for group in PACKED_MODULES for name in group}
    )


class Shape(NamedTuple):
    """What kernels are launched for."""

    rows: int
    ranks: int
    splits: int


@dataclass(frozen=True)
class Graph:
    """A captured step."""

    shape: Shape
    replay: Callable[[], None]
    positions: Tensor
    """int32 (steps, rows)"""
    tables: Tensor
    """int32 (most rows, positions, pages)"""


class Decoder:
    """The rows of the step under way. The engine's thread alone touches it."""

    def __init__(self, base: Base, pool: PagePool, max_rows: int, max_tokens: int) -> None:
        self._base, self._pool = base, pool
        self._config = base.config.get_text_config()
        modules = list(base.modules)
        self._layers: Sequence[FusedLayer] = [
            fuse(layer, weights, modules, self._config)
            for layer, weights in zip(base.walk.layers, base.weights, strict=True)
        ]
        self._modules = len(modules)
        self._max_rows = 1 << (max_rows - 1).bit_length()
        self._pages = pages_of(max_tokens)
        self._spans: list[Span] = []
        self._known_pages: list[int] = []
        """By row, how many pages of each position the device has."""
        self._longest = 0
        """Tokens of the longest sequence in the next step."""
        self._plan: Plan
        self._graph: Graph
        self._graphs: OrderedDict[tuple[Plan, Shape], Graph] = OrderedDict()
        self._compiled: set[Shape] = set()
        # What is captured keeps its stream's priority: steps go before what prepares adapters.
        self._capturing = torch.cuda.Stream(base.device, priority=-1) if base.device.type == "cuda" else None
        # One step runs at a time and leaves nothing there, so all graphs share what they need besides.
        self._besides = None if self._capturing is None else torch.cuda.graph_pool_handle()
        # Captured graphs hold addresses: what is here stays, and what they want besides is made beside it.
        self._shrunk_buffers: dict[int, Sequence[Tensor]] = {}
        """By ranks, of each of GROUPS."""
        self._tables: dict[int, Tensor] = {}
        """By depth."""
        rows, config, attention, widths = self._max_rows, self._config, self._layers[0].attention, base.modules
        outputs = [sum(widths[name][0] for name in group) for group in PACKED_MODULES]
        splits = max(shape.rows * shape.splits for shape in self._shapes(LEAST_RANKS))
        self._buffers = Buffers(
            h=self._zeros(rows, config.hidden_size),
            x=self._zeros(rows, config.hidden_size),
            qkv=self._zeros(rows, outputs[0]),
            out=self._zeros(rows, attention.heads * attention.head_dim),
            gate_up=self._zeros(rows, outputs[2]),
            gated=self._zeros(rows, widths[PACKED_MODULES[3][0]][1]),
            shrunk=(),
            partials=Partials.empty(1, attention.heads, splits, attention.head_dim, base.device),
        )
        self._tokens = self._zeros(rows, dtype=torch.int64)
        self._lengths = self._zeros(rows, dtype=torch.int32)
        self._adapters = self._zeros(rows, dtype=torch.int64)
        self._logits = self._zeros(rows, base.vocab_size, dtype=torch.float32)

    def _zeros(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.zeros(shape, dtype=dtype or self._base.dtype, device=self._base.device)

    def _shrunk(self, ranks: int) -> Sequence[Tensor]:
        if ranks not in self._shrunk_buffers:
            parts = [[shape.rows * count for count in self._parts(shape)] for shape in self._shapes(ranks)]
            self._shrunk_buffers[ranks] = [
                self._zeros(1, max(counts), len(group), ranks, dtype=torch.float32)
                for counts, group in zip(zip(*parts, strict=True), PACKED_MODULES, strict=True)
            ]
        return self._shrunk_buffers[ranks]

    def _parts(self, shape: Shape) -> list[int]:
        """Of shrunk, of each of GROUPS."""
        parts = [parts_for(shape.rows, self._base.modules[group[0]][1]) for group in PACKED_MODULES]
        kv_heads = self._layers[0].attention.kv_heads
        if attention_shrinks(shape.splits, kv_heads, shape.ranks):
            parts[1] = kv_heads
        return parts

    def _table(self, depth: int) -> Tensor:
        depth = max(LEAST_DEPTH, 1 << (depth - 1).bit_length())
        if depth not in self._tables:
            self._tables[depth] = self._zeros(self._max_rows, depth, self._pages, dtype=torch.int32)
        return self._tables[depth]

    @property
    def _most_tokens(self) -> int:
        return self._pages * PAGE_TOKENS

    def _buckets(self) -> list[int]:
        return [1 << power for power in range(self._max_rows.bit_length())]

    def _shapes(self, ranks: int) -> list[Shape]:
        """All there are: sequences are split as short or as long ones are."""
        return [Shape(n, ranks, self._splits(n, t)) for n in self._buckets() for t in (1, self._most_tokens)]

    def _splits(self, rows: int, tokens: int) -> int:
        return splits_for(rows, self._layers[0].attention.kv_heads, tokens)

    def tensors(self) -> list[Tensor]:
        """All memory that is held for steps."""
        b = self._buffers
        held = [b.h, b.x, b.qkv, b.out, b.gate_up, b.gated, *b.partials, *list(self._tables.values())]
        shrunk = [tensor for group in list(self._shrunk_buffers.values()) for tensor in group]
        graphs = [graph.positions for graph in list(self._graphs.values())]
        return [*held, *shrunk, self._tokens, self._lengths, self._adapters, self._logits, *graphs]

    def warm_up(self, stacks: Collection[Stack], progress: Progress | None = None) -> None:
        """Compiles the kernels and captures stacks for every number of rows, so that no request waits for it: the first
        ones, if there are too many."""
        if self._base.device.type == "cuda":
            from lorarep_runtime.kernels.hopper.nvrtc import prefer_shared_memory

            products = [product for layer in self._layers for product in layer.products]
            bits = {product.group.bits for product in products if isinstance(product, GroupProduct)}
            compile_products(bits)
            self._warm_up_prompts(bits)
            if bits == {4}:  # more bits are loaded by so much at once that they need the L1 cache
                prefer_shared_memory()
        todo = [(stack, rows) for stack in stacks for rows in self._buckets()][:MOST_GRAPHS]
        for done, (stack, rows) in enumerate(todo, 1):
            self._compile(Shape(rows, LEAST_RANKS, self._splits(rows, self._most_tokens)))
            self._graph_for(merge((stack,)), Shape(rows, LEAST_RANKS, self._splits(rows, 1)))
            if progress is not None:
                progress("capture", done, len(todo))

    def _warm_up_prompts(self, bits: Collection[int]) -> None:
        """Has the kernels of prompts compiled and loaded, by one of two tokens through one layer."""
        device = self._base.device
        if 4 in bits:
            prefill_gemm.load()
        table = PageTable(self._pool, 1)
        table.grow(2)
        self.prefill(Batch([Span([0, 0], 0, (0,), None, table)], device)).advance(1)
        table.release()
        entries = torch.zeros(self._modules * FIELDS, dtype=torch.int64, device=device)
        none = torch.zeros(1, 2, dtype=torch.int32, device=device)
        tiles = SegmentTiles(
            none, torch.tensor([entries.data_ptr()], device=device), none[0, :1], LEAST_RANKS, self._modules
        )
        b = self._buffers
        adapt_segments(b.x, b.out, [b.out.shape[1]], tiles, 0)
        torch.cuda.synchronize(device)  # before the entries go

    def set_rows(self, spans: Sequence[Span]) -> None:
        """Says what the next step is for: the next token of each span, which has one."""
        self._longest = max(span.length for span in spans)
        if [(span.table, span.context) for span in spans] == [(span.table, span.length) for span in self._spans]:
            # The same sequences go on. Their lengths are right: each step adds to them.
            self._spans = list(spans)
            self.set_pages()
            self._put(self._tokens[: len(spans)], np.array([span.tokens[0] for span in spans]))
            return
        ranks, most = LEAST_RANKS, max((span.adapter.rank for span in spans if span.adapter is not None), default=1)
        while ranks < most:
            ranks *= 8
        self._spans = list(spans)
        rows = 1 << (len(spans) - 1).bit_length()
        self._plan = plan = merge(tuple(sorted({span.stack for span in spans})))
        self._graph = self._graph_for(plan, Shape(rows, ranks, self._splits(rows, self._longest)))
        index = {stack: i for i, stack in enumerate(plan.stacks)}
        walked = np.array([[-1 if p is None else p for p in step.positions] for step in plan.visits], dtype=np.int32)
        positions = np.full((len(plan.visits), rows), -1, dtype=np.int32)
        positions[:, : len(spans)] = walked[:, [index[span.stack] for span in spans]]
        self._put(self._graph.positions, positions)
        tokens, lengths, adapters = (np.zeros(rows, dtype=t) for t in (np.int64, np.int32, np.int64))
        for i, span in enumerate(spans):
            tokens[i], lengths[i] = span.tokens[0], span.context
            adapters[i] = 0 if span.adapter is None or span.adapter.table is None else span.adapter.table.data_ptr()
        self._put(self._tokens[:rows], tokens)
        self._put(self._lengths[:rows], lengths)
        self._put(self._adapters[:rows], adapters)
        self._set_all_pages()

    def set_pages(self) -> None:
        """Takes note of the pages that sequences have got since their rows were set."""
        new = [
            (row, column, span.table.pages[:, column])
            for row, span in enumerate(self._spans)
            for column in range(self._known_pages[row], span.table.pages.shape[1])
        ]
        if not new:
            return
        depth = max(len(pages) for _, _, pages in new)
        entries = np.zeros((len(new), 2 + depth), dtype=np.int64)
        for entry, (row, column, pages) in zip(entries, new, strict=True):
            entry[:2] = row, column
            entry[2 : 2 + len(pages)] = pages  # what is beyond a sequence's depth is never read
        rows, columns, pages = moved(torch.from_numpy(entries), self._base.device).split([1, 1, depth], 1)
        self._graph.tables[rows[:, 0], :depth, columns[:, 0]] = pages.int()
        self._known_pages = [span.table.pages.shape[1] for span in self._spans]

    def _set_all_pages(self) -> None:
        tables = [span.table.pages for span in self._spans]
        shape = [max(sizes) for sizes in zip(*(pages.shape for pages in tables), strict=True)]
        whole = np.zeros((len(tables), *shape), dtype=np.int32)
        for row, pages in zip(whole, tables, strict=True):
            row[: pages.shape[0], : pages.shape[1]] = pages
        self._put(self._graph.tables[: len(tables), : shape[0], : shape[1]], whole)
        self._known_pages = [pages.shape[1] for pages in tables]

    @staticmethod
    def _put(to: Tensor, values: Any) -> None:
        # In the stream's order: the step in flight still reads what was there before.
        to.copy_(staged(torch.from_numpy(np.ascontiguousarray(values)), to.device), non_blocking=True)

    def step(self) -> tuple[Tensor, Tensor]:
        """Launches a step for the rows' tokens, each one longer than the last.

        Returns:
            (rows) int64, the likeliest next tokens, which the next step takes, or what has been written there
            meanwhile; and logits (rows, vocab) in fp32. Both are overwritten by the next step.
        """
        rows, ranks, splits = self._graph.shape
        if splits != (now := self._splits(rows, self._longest)):
            positions, self._graph = self._graph.positions, self._graph_for(self._plan, Shape(rows, ranks, now))
            self._graph.positions.copy_(positions)
        self._graph.replay()
        self._longest += 1
        return self._tokens[: len(self._spans)], self._logits[: len(self._spans)]

    def prefill(self, batch: Batch) -> Prefill:
        """A forward pass over prompts, beside the steps."""
        return Prefill(self._base, self._pool, self._layers, batch)

    def _graph_for(self, plan: Plan, shape: Shape) -> Graph:
        key = (plan, shape)
        if key in self._graphs:
            self._graphs.move_to_end(key)
            return self._graphs[key]
        while len(self._graphs) >= MOST_GRAPHS:
            self._graphs.popitem(last=False)
        self._compile(shape)
        tables = self._table(max(len(stack) for stack in plan.stacks))
        positions = self._no_positions(plan, shape)
        forward = self._forward(plan, shape, positions, tables)
        replay = forward if self._capturing is None else _captured(forward, self._capturing, self._besides)
        self._graphs[key] = Graph(shape, replay, positions, tables)
        return self._graphs[key]

    def _compile(self, shape: Shape) -> None:
        """Has the kernels compiled and loaded, which cannot be while they are captured."""
        if self._capturing is None or shape in self._compiled:
            return
        plan = merge((tuple(range(self._base.layers)),))
        # A sequence may be amid its answer. No row has a position, so that kernels write nothing of it.
        tokens, lengths = self._tokens.clone(), self._lengths.clone()
        self._forward(plan, shape, self._no_positions(plan, shape), self._table(self._base.layers))()
        self._tokens.copy_(tokens)
        self._lengths.copy_(lengths)
        self._compiled.add(shape)

    def _no_positions(self, plan: Plan, shape: Shape) -> Tensor:
        return torch.full((len(plan.visits), shape.rows), -1, dtype=torch.int32, device=self._base.device)

    def _forward(self, plan: Plan, shape: Shape, positions: Tensor, tables: Tensor) -> Callable[[], None]:
        n, model = shape.rows, self._base.model
        decoder: Any = model.get_decoder()
        buffers = self._buffers.narrowed(n, shape.splits, self._shrunk(shape.ranks), self._parts(shape))
        tokens, lengths, logits = self._tokens[:n], self._lengths[:n], self._logits[:n]
        cache = Cache(*self._pool.tensors, tables[:n], lengths)
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()

        @torch.inference_mode()
        def forward() -> None:
            buffers.h.copy_(embedding(tokens))
            cos, sin = decoder.rotary_emb(buffers.h, lengths.unsqueeze(0))
            lengths.add_(1)
            for step, row_positions in zip(plan.visits, positions, strict=True):
                rows = DecodeRows(row_positions, self._adapters[:n], self._modules)
                self._layers[step.layer].forward(buffers, cos[0], sin[0], cache, rows)
            logits.copy_(head(decoder.norm(buffers.h)))
            torch.argmax(logits, 1, out=tokens)

        return forward


def _captured(forward: Callable[[], None], stream: torch.cuda.Stream, memory: Any) -> Callable[[], None]:
    """A graph of what a step launches, which takes memory out of a pool (`torch.cuda.graph_pool_handle`).

    Not by `torch.cuda.graph`: that first waits for the device and gives all the memory back that torch keeps for later,
    of the device and pinned, while streams wait.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        graph.capture_begin(memory, capture_error_mode="thread_local")
        try:
            forward()
        finally:
            graph.capture_end()
    return graph.replay
