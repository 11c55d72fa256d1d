"""Decoding on a GPU: a step of one new token for each row is one captured graph, from the tokens to the next ones.

A graph belongs to a plan, a number of rows and a largest rank. Which rows walk which of the plan's stacks, with which
adapters and on which pages, is data that it reads: rows without a position at a step pass through. It takes the tokens
that it chose itself, so the next step can be launched before anybody has read them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lorarep_runtime.batch import Batch, Span
from lorarep_runtime.cache import PagePool, pages_of
from lorarep_runtime.fused import FAMILIES, Buffers, FusedLayer, fuse, parts_for, splits_for
from lorarep_runtime.hub import Progress
from lorarep_runtime.kernels.combine import Partials
from lorarep_runtime.kernels.decode_attention import Cache
from lorarep_runtime.kernels.rows import Rows
from lorarep_runtime.linear import GROUPS
from lorarep_runtime.prefill import Prefill
from lorarep_runtime.stack import Plan, merge
from lorarep_runtime.staging import staged

if TYPE_CHECKING:
    from lorarep_runtime.base import Base

MOST_GRAPHS = 64
"""Captured at a time; the least recently used goes first."""
LEAST_RANKS = 8
"""Of low. A batch with larger ranks takes eight times as many, or sixty-four times: few sizes, so few graphs."""
CHANGING_ROTARY = {"dynamic", "longrope"}
"""`rope_type`s whose frequencies depend on the length."""


def can_decode(base: Base) -> bool:
    """Whether there are kernels for a base's layers."""
    config = base.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    return (
        config.model_type in FAMILIES
        and rope.get("rope_type", "default") not in CHANGING_ROTARY
        and set(base.modules) == {name for group in GROUPS for name in group}
    )


@dataclass(frozen=True)
class Graph:
    """A captured step."""

    replay: Callable[[], None]
    positions: Tensor
    """int32 (steps, rows)"""


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
        self._ranks = self._most_ranks = LEAST_RANKS
        self._depth = base.layers
        self._graphs: OrderedDict[tuple[Plan, int, int], Graph] = OrderedDict()
        self._rows = 0
        self._spans: list[Span] = []
        self._known_pages: dict[int, tuple[int, ...]] = {}
        """By row, the shape of the page table that the device has."""
        self._allocate()

    def _allocate(self) -> None:
        """Buffers for the ranks and the depth in use. Captured graphs hold their addresses, so they go."""
        self._graphs.clear()
        rows, device, dtype = self._max_rows, self._base.device, self._base.dtype
        config, attention = self._config, self._layers[0].attention
        widths = self._base.modules

        def zeros(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        def outputs(group: Sequence[str]) -> int:
            return sum(widths[name][0] for name in group)

        def low(group: Sequence[str]) -> Tensor:
            parts = max(parts_for(n, widths[group[0]][1]) * n for n in self._buckets())
            return zeros(1, parts, len(group), self._most_ranks, dtype=torch.float32)

        splits = max(splits_for(n, attention.kv_heads) * n for n in self._buckets())
        heads = attention.heads
        self._buffers = Buffers(
            h=zeros(rows, config.hidden_size),
            x=zeros(rows, config.hidden_size),
            qkv=zeros(rows, outputs(GROUPS[0])),
            out=zeros(rows, heads * attention.head_dim),
            gate_up=zeros(rows, outputs(GROUPS[2])),
            gated=zeros(rows, widths[GROUPS[3][0]][1]),
            low=[low(group) for group in GROUPS],
            partials=Partials.empty(1, heads, splits, attention.head_dim, device),
        )
        self._tokens = zeros(rows, dtype=torch.int64)
        self._lengths = zeros(rows, dtype=torch.int32)
        self._adapters = zeros(rows, dtype=torch.int64)
        self._tables = zeros(rows, self._depth, self._pages, dtype=torch.int32)
        self._logits = zeros(rows, self._base.vocab_size, dtype=torch.float32)

    def _buckets(self) -> list[int]:
        return [1 << power for power in range(self._max_rows.bit_length())]

    def tensors(self) -> list[Tensor]:
        """All memory that is held for steps."""
        b = self._buffers
        held = [b.h, b.x, b.qkv, b.out, b.gate_up, b.gated, *b.low, *b.partials]
        graphs = [graph.positions for graph in self._graphs.values()]
        return [*held, self._tokens, self._lengths, self._adapters, self._tables, self._logits, *graphs]

    def warm_up(self, progress: Progress | None = None) -> None:
        """Compiles the kernels and captures the base's own order for every number of rows, so that no request waits."""
        plan = merge((tuple(range(self._base.layers)),))
        buckets = self._buckets()
        for done, rows in enumerate(buckets, 1):
            self._rows = rows
            self._graph_for(plan)
            if progress is not None:
                progress("capture", done, len(buckets))

    def set_rows(self, spans: Sequence[Span]) -> None:
        """Says what the next step is for: the next token of each span, which has one."""
        if [span.table for span in spans] == [span.table for span in self._spans]:
            # The same sequences go on. Their lengths are right: each step adds to them.
            for row, (old, new) in enumerate(zip(self._spans, spans, strict=True)):
                if old.length != new.context:
                    break
                if new.table.pages.shape != self._known_pages[row]:
                    self.set_pages(row)
            else:
                self._spans = list(spans)
                self._put(self._tokens[: len(spans)], np.array([span.tokens[0] for span in spans]))
                return
        ranks = max((span.adapter.rank for span in spans if span.adapter is not None), default=1)
        depth = max(len(span.stack) for span in spans)
        self._ranks = LEAST_RANKS
        while self._ranks < ranks:
            self._ranks *= 8
        if self._ranks > self._most_ranks or depth > self._depth:
            self._most_ranks, self._depth = max(self._most_ranks, self._ranks), max(self._depth, depth)
            self._allocate()
        self._spans = list(spans)
        self._rows = 1 << (len(spans) - 1).bit_length()
        plan = merge(tuple(sorted({span.stack for span in spans})))
        self._graph = self._graph_for(plan)
        index = {stack: i for i, stack in enumerate(plan.stacks)}
        walked = np.array([[-1 if p is None else p for p in step.positions] for step in plan.steps], dtype=np.int32)
        positions = np.full((len(plan.steps), self._rows), -1, dtype=np.int32)
        positions[:, : len(spans)] = walked[:, [index[span.stack] for span in spans]]
        self._put(self._graph.positions, positions)
        tokens, lengths, adapters = (np.zeros(self._rows, dtype=t) for t in (np.int64, np.int32, np.int64))
        for i, span in enumerate(spans):
            tokens[i], lengths[i] = span.tokens[0], span.context
            adapters[i] = 0 if span.adapter is None or span.adapter.table is None else span.adapter.table.data_ptr()
            self.set_pages(i)
        self._put(self._tokens[: self._rows], tokens)
        self._put(self._lengths[: self._rows], lengths)
        self._put(self._adapters[: self._rows], adapters)

    def set_pages(self, row: int) -> None:
        """Takes note of the pages that a row's sequence has by now."""
        pages = self._spans[row].table.pages
        self._known_pages[row] = pages.shape
        self._put(self._tables[row, : pages.shape[0], : pages.shape[1]], pages.astype(np.int32))

    @staticmethod
    def _put(to: Tensor, values: Any) -> None:
        # In the stream's order: the step in flight still reads what was there before.
        to.copy_(staged(torch.from_numpy(np.ascontiguousarray(values)), to.device), non_blocking=True)

    def step(self) -> tuple[Tensor, Tensor]:
        """Launches a step for the rows' tokens, each one longer than the last.

        Returns:
            (rows) int64, the likeliest next tokens, which the next step takes; and their logits (rows, vocab) in fp32.
            Both are overwritten by the next step.
        """
        self._graph.replay()
        return self._tokens[: len(self._spans)], self._logits[: len(self._spans)]

    def prefill(self, batch: Batch) -> Prefill:
        """A forward pass over prompts, beside the steps."""
        return Prefill(self._base, self._pool, self._layers, batch)

    def _graph_for(self, plan: Plan) -> Graph:
        key = (plan, self._rows, self._ranks)
        if key in self._graphs:
            self._graphs.move_to_end(key)
            return self._graphs[key]
        while len(self._graphs) >= MOST_GRAPHS:
            self._graphs.popitem(last=False)
        positions = torch.full((len(plan.steps), self._rows), -1, dtype=torch.int32, device=self._base.device)
        forward = self._forward(plan, positions)
        # Once beside the capture: kernels are compiled and loaded. No row has a position, so nothing is written.
        forward()
        replay = forward
        if self._base.device.type == "cuda":
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                forward()
            replay = graph.replay
        self._graphs[key] = Graph(replay, positions)
        return self._graphs[key]

    def _forward(self, plan: Plan, positions: Tensor) -> Callable[[], None]:
        n, model = self._rows, self._base.model
        decoder: Any = model.get_decoder()
        buffers = self._buffers.narrowed(n, splits_for(n, self._layers[0].attention.kv_heads), self._ranks)
        tokens, lengths, logits = self._tokens[:n], self._lengths[:n], self._logits[:n]
        cache = Cache(*self._pool.tensors, self._tables[:n], lengths)
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()

        @torch.inference_mode()
        def forward() -> None:
            buffers.h.copy_(embedding(tokens))
            cos, sin = decoder.rotary_emb(buffers.h, lengths.unsqueeze(0))
            lengths.add_(1)
            for step, row_positions in zip(plan.steps, positions, strict=True):
                rows = Rows(row_positions, self._adapters[:n], self._modules)
                self._layers[step.layer].forward(buffers, cos[0], sin[0], cache, rows)
            logits.copy_(head(decoder.norm(buffers.h)))
            torch.argmax(logits, 1, out=tokens)

        return forward
