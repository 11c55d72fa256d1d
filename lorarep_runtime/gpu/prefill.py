"""Prompts on a GPU: a forward pass through layers of the Llama kind that is taken a few steps of its plan at a time, so
that decoding steps run between. A weight is read once for all rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lorarep_runtime.device.staging import moved
from lorarep_runtime.gpu.fused_layer import FusedLayer
from lorarep_runtime.kernels.prefill.adapt_segments import TILE_ROWS, SegmentTiles
from lorarep_runtime.model.base import Base
from lorarep_runtime.model.batch import Batch, View
from lorarep_runtime.model.kv_cache import PagePool
from lorarep_runtime.model.layer_walk import attend_pages
from lorarep_runtime.model.plan import Visit


class Prefill:
    """One forward pass. Nothing that its batch points at may go before its last step has been launched."""

    def __init__(self, base: Base, pool: PagePool, layers: Sequence[FusedLayer], batch: Batch) -> None:
        self._base, self._pool, self._layers, self._batch = base, pool, layers, batch
        self._done = 0
        self._narrowed: dict[View, tuple[Tensor, Tensor]] = {}
        self._segment_tiles_of: dict[View, _SegmentTiles] = {}
        decoder: Any = base.model.get_decoder()
        with torch.inference_mode():
            self._h: Tensor = base.model.get_input_embeddings()(batch.token_ids)
            cos, sin = decoder.rotary_emb(self._h, batch.token_places.unsqueeze(0))
        self._rotary: tuple[Tensor, Tensor] = cos[0], sin[0]

    @property
    def left(self) -> int:
        """Steps that have not been launched."""
        return len(self._batch.plan.visits) - self._done

    @torch.inference_mode()
    def advance(self, steps: int) -> None:
        """Launches the next steps of the plan."""
        for _ in range(min(steps, self.left)):
            self._step(self._done)
            self._done += 1

    @torch.inference_mode()
    def logits(self, rows: Tensor) -> Tensor:
        """After the last step: fp32 logits (n, vocab) of rows, (n) int64."""
        model = self._base.model
        decoder: Any = model.get_decoder()
        logits: Tensor = model.get_output_embeddings()(decoder.norm(self._h[rows]))
        return logits.float()

    def _tiles(self, view: View, index: int) -> SegmentTiles | None:
        """The rows of a view that have adapters, at a step."""
        if not view.segments:
            return None
        if view not in self._segment_tiles_of:
            self._segment_tiles_of[view] = _SegmentTiles(view, self._batch.plan.visits, self._batch.device)
        return self._segment_tiles_of[view].tiles(index, len(self._base.modules))

    def _step(self, index: int) -> None:
        batch = self._batch
        step = batch.plan.visits[index]
        view = batch.view(tuple(position is not None for position in step.positions))
        slots, tables = batch.slots[index], batch.tables[index]
        h, rotary = self._h, self._rotary
        if view.rows is not None:
            # Rows whose stack has no position here pass through.
            h, slots, tables = h[view.rows], slots[view.rows], tables[view.spans]
            if view not in self._narrowed:
                self._narrowed[view] = rotary[0][view.rows], rotary[1][view.rows]
            rotary = self._narrowed[view]
        layer, pages = self._layers[step.layer], self._pool.tensors

        def attend(q: Tensor) -> Tensor:
            a = layer.attention
            return attend_pages(view, q, *pages, tables, scale=a.scale, window=a.window, softcap=None)

        layer.prefill(h, *rotary, *pages, slots, attend, self._tiles(view, index))
        if view.rows is not None:
            self._h.index_copy_(0, view.rows, h)


class _SegmentTiles:
    """What tiles of a view's rows there are at any step of a plan, on the device."""

    def __init__(self, view: View, steps: Sequence[Visit], device: torch.device) -> None:
        tiles = [
            (start, min(start + TILE_ROWS, segment.stop), segment)
            for segment in view.segments
            for start in range(segment.start, segment.stop, TILE_ROWS)
        ]
        at = [[step.positions[segment.stack] for *_, segment in tiles] for step in steps]
        positions = np.array([[-1 if p is None else p for p in row] for row in at], dtype=np.int32)
        tables = [0 if segment.adapter.table is None else segment.adapter.table.data_ptr() for *_, segment in tiles]
        self._bounds = moved(torch.tensor([tile[:2] for tile in tiles], dtype=torch.int32), device)
        self._adapters = moved(torch.tensor(tables, dtype=torch.int64), device)
        self._positions = moved(torch.from_numpy(positions), device)
        self._ranks = max(segment.adapter.rank for segment in view.segments)

    def tiles(self, index: int, modules: int) -> SegmentTiles:
        return SegmentTiles(self._bounds, self._adapters, self._positions[index], self._ranks, modules)
