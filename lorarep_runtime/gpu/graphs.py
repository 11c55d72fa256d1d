"""Decode steps as captured CUDA graphs, from the tokens to the next ones, and the cache that keeps them.

A graph belongs to a plan and a shape: a number of rows, the ranks of shrunk = A x, and the parts that sequences are
split into. Which rows walk which of the plan's stacks, with which adapters and on which pages, is data that the graph
reads. Where there is no GPU a step is not captured but launched kernel by kernel.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lorarep_runtime.gpu.buffers import StepBuffers, StepShape
from lorarep_runtime.gpu.fused_layer import FusedLayer
from lorarep_runtime.gpu.step_ends import StepEnds
from lorarep_runtime.kernels.decode.attention import Cache
from lorarep_runtime.kernels.entry_table import DecodeRows
from lorarep_runtime.model.kv_cache import PagePool
from lorarep_runtime.model.plan import Plan, merge

if TYPE_CHECKING:
    from lorarep_runtime.model.base import Base

MOST_GRAPHS = 64
"""Graphs that are kept at a time; the least recently used goes first."""


@dataclass(frozen=True)
class StepGraph:
    """One decode step, captured as a CUDA graph, with the buffers that it reads and writes."""

    replay: Callable[[], None]
    """Launches the step on the current stream."""
    positions: Tensor
    """int32 (visits, rows), the position of each row at each visit of the plan; -1 is none."""
    buffers: StepBuffers
    """All else that the step reads and writes."""


class StepGraphs:
    """The cache of captured steps. The engine's thread alone asks it for graphs; any thread may count its tensors."""

    def __init__(self, base: Base, pool: PagePool, layers: Sequence[FusedLayer], ends: StepEnds) -> None:
        self._base, self._pool, self._layers, self._ends = base, pool, layers, ends
        self._graphs: OrderedDict[tuple[Plan, StepShape], StepGraph] = OrderedDict()
        self._compiled: set[StepShape] = set()
        # A graph keeps the priority of the stream that it was captured on: steps go before work that prepares adapters.
        self._stream = torch.cuda.Stream(base.device, priority=-1) if base.device.type == "cuda" else None
        # One step runs at a time and leaves nothing there, so all graphs share the memory that torch takes for them.
        self._memory = None if self._stream is None else torch.cuda.graph_pool_handle()

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors that belong to graphs alone, also while another thread adds to them."""
        return [graph.positions for graph in list(self._graphs.values())]

    def graph(self, plan: Plan, buffers: StepBuffers) -> StepGraph:
        """The graph of a plan over some buffers, captured if it is not there. No row has a position in a new one."""
        key = plan, buffers.shape
        if key in self._graphs:
            self._graphs.move_to_end(key)
            return self._graphs[key]
        while len(self._graphs) >= MOST_GRAPHS:
            self._graphs.popitem(last=False)
        self.compile(buffers)
        positions = self._no_positions(plan, buffers.shape)
        forward = self._forward(plan, positions, buffers)
        replay = forward if self._stream is None else self._captured(forward, self._stream)
        self._graphs[key] = StepGraph(replay, positions, buffers)
        return self._graphs[key]

    def _captured(self, forward: Callable[[], None], stream: torch.cuda.Stream) -> Callable[[], None]:
        try:
            return _captured(forward, stream, self._memory)
        except BaseException:
            self._memory = torch.cuda.graph_pool_handle()
            raise

    def compile(self, buffers: StepBuffers) -> None:
        """Has the kernels for a shape compiled and loaded, which cannot be while they are captured."""
        if self._stream is None or buffers.shape in self._compiled:
            return
        plan = merge((tuple(range(self._base.layers)),))
        # Sequences may be between two steps. No row has a position, so kernels write nothing of theirs.
        kept = buffers.tokens, buffers.lengths, buffers.ends
        values = [tensor.clone() for tensor in kept]
        buffers.ends.zero_()  # the last step may have had more rows
        self._forward(plan, self._no_positions(plan, buffers.shape), buffers)()
        for tensor, value in zip(kept, values, strict=True):
            tensor.copy_(value)
        self._compiled.add(buffers.shape)

    def _no_positions(self, plan: Plan, shape: StepShape) -> Tensor:
        return torch.full((len(plan.visits), shape.rows), -1, dtype=torch.int32, device=self._base.device)

    def _forward(self, plan: Plan, positions: Tensor, buffers: StepBuffers) -> Callable[[], None]:
        """A step over a plan: reads tokens and lengths, writes logits, the likeliest tokens and lengths + 1."""
        modules, ends = len(self._base.modules), self._ends
        decoder: Any = self._base.model.get_decoder()
        tokens, lengths, h = buffers.tokens, buffers.lengths, buffers.layers.h
        cache = Cache(*self._pool.tensors, buffers.tables, buffers.sequences, lengths)

        @torch.inference_mode()
        def forward() -> None:
            ends.embed(tokens, h)
            cos, sin = decoder.rotary_emb(h, lengths.unsqueeze(0))
            lengths.add_(1)
            for visit, row_positions in zip(plan.visits, positions, strict=True):
                rows = DecodeRows(row_positions, buffers.adapters, modules)
                self._layers[visit.layer].forward(buffers.layers, cos[0], sin[0], cache, rows)
            last = h[buffers.ends] if buffers.shape.shares_sequences else h
            alike = buffers.layers.deterministic
            ends.choose(last, buffers.logits, tokens[: len(last)], deterministic=alike)

        return forward


def _captured(forward: Callable[[], None], stream: torch.cuda.Stream, memory: Any) -> Callable[[], None]:
    """A graph of all that a step launches, which takes memory out of a pool (`torch.cuda.graph_pool_handle`).

    Where it fails, torch allows no later capture to take memory out of the same pool.

    Not by `torch.cuda.graph`: that first waits for the device and gives back all the memory, of the device and pinned,
    that torch keeps for later, while streams wait.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        torch.cuda.current_blas_handle()  # a thread's first one, which cannot be made while it captures
        graph.capture_begin(memory, capture_error_mode="thread_local")
        try:
            forward()
        except BaseException:
            with suppress(RuntimeError):  # as the capture is invalid
                graph.capture_end()
            with suppress(RuntimeError):  # which did not come so far; else the allocator gives back no memory of pools
                torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), memory)
            raise
        graph.capture_end()
    return graph.replay
