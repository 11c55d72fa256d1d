"""Prompts on a GPU: a forward pass through layers of the Llama kind that is launched a few visits of its plan at a
time, so that decode steps run between. A weight is read once for all rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lorarep_runtime.device.staging import moved
from lorarep_runtime.gpu.fused_layer import FusedLayer
from lorarep_runtime.kernels.eager.attention import Scores
from lorarep_runtime.kernels.prefill.adapt_segments import TILE_ROWS, SegmentTiles
from lorarep_runtime.model.attention import attend_pages
from lorarep_runtime.model.batch import Batch, View
from lorarep_runtime.model.kv_cache import PagePool
from lorarep_runtime.model.plan import Visit

if TYPE_CHECKING:
    from lorarep_runtime.model.base import Base


class Prefill:
    """One forward pass over prompts. All that its batch points at must stay until its last visit is launched."""

    def __init__(self, base: Base, pool: PagePool, layers: Sequence[FusedLayer], batch: Batch) -> None:
        self._base, self._pool, self._layers, self._batch = base, pool, layers, batch
        self._done = 0
        """Visits that have been launched."""
        self._view_rotary: dict[View, tuple[Tensor, Tensor]] = {}
        """Rotary embeddings of the rows of a view, where those are not all."""
        self._view_tiles: dict[View, _PlanTiles] = {}
        decoder: Any = base.model.get_decoder()
        with torch.inference_mode():
            self._h: Tensor = base.model.get_input_embeddings()(batch.token_ids)
            cos, sin = decoder.rotary_emb(self._h, batch.token_places.unsqueeze(0))
        self._rotary: tuple[Tensor, Tensor] = cos[0], sin[0]

    @property
    def left(self) -> int:
        """Visits that have not been launched."""
        return len(self._batch.plan.visits) - self._done

    @torch.inference_mode()
    def advance(self, visits: int) -> None:
        """Launches the next visits of the plan, as many as are left at most."""
        for _ in range(min(visits, self.left)):
            self._visit(self._done)
            self._done += 1

    @torch.inference_mode()
    def logits(self, rows: Tensor) -> Tensor:
        """The fp32 logits (n, vocab) of some rows, after the last visit.

        Args:
            rows: (n) int64 on the CPU, of the batch.
        """
        model = self._base.model
        decoder: Any = model.get_decoder()
        logits: Tensor = model.get_output_embeddings()(decoder.norm(self._h[moved(rows, self._batch.device)]))
        return logits.float()

    def _visit(self, index: int) -> None:
        batch = self._batch
        visit = batch.plan.visits[index]
        view = batch.view(tuple(position is not None for position in visit.positions))
        slots, tables = batch.slots[index], batch.tables[index]
        h, rotary = self._h, self._rotary
        if view.rows is not None:
            # Rows whose stack has no position here pass through.
            h, slots, tables = h[view.rows], slots[view.rows], tables[view.spans]
            if view not in self._view_rotary:
                self._view_rotary[view] = rotary[0][view.rows], rotary[1][view.rows]
            rotary = self._view_rotary[view]
        layer, pages = self._layers[visit.layer], self._pool.tensors

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            a = layer.attention
            return attend_pages(view, q, (k, v), *pages, tables, Scores(a.scale, a.window))

        layer.prefill(h, *rotary, *pages, slots, attend, self._tiles(view, index))
        if view.rows is not None:
            self._h.index_copy_(0, view.rows, h)

    def _tiles(self, view: View, index: int) -> SegmentTiles | None:
        """The rows of a view that have adapters, at a visit; None where there are none."""
        if not view.segments:
            return None
        if view not in self._view_tiles:
            self._view_tiles[view] = _PlanTiles(view, self._batch.plan.visits, self._batch.device)
        return self._view_tiles[view].at(index, len(self._base.modules))


class _PlanTiles:
    """The tiles of a view's rows at every visit of a plan, on the device."""

    def __init__(self, view: View, visits: Sequence[Visit], device: torch.device) -> None:
        tiles = [
            (start, min(start + TILE_ROWS, segment.stop), segment)
            for segment in view.segments
            for start in range(segment.start, segment.stop, TILE_ROWS)
        ]
        at = [[visit.positions[segment.stack] for *_, segment in tiles] for visit in visits]
        positions = np.array([[-1 if p is None else p for p in row] for row in at], dtype=np.int32)
        tables = [0 if segment.adapter.table is None else segment.adapter.table.data_ptr() for *_, segment in tiles]
        self._bounds = moved(torch.tensor([tile[:2] for tile in tiles], dtype=torch.int32), device)
        self._adapters = moved(torch.tensor(tables, dtype=torch.int64), device)
        self._positions = moved(torch.from_numpy(positions), device)
        self._ranks = max(segment.adapter.rank for segment in view.segments)

    def at(self, index: int, modules: int) -> SegmentTiles:
        """The tiles at a visit. modules: number of modules in an entry table."""
        return SegmentTiles(self._bounds, self._adapters, self._positions[index], self._ranks, modules)
