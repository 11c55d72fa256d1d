"""Stand-ins for the decoder of a GPU, over the base's own layers, for engines on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise

import numpy as np
import torch
from torch import Tensor

from lorarep_runtime.engine.engine import Engine
from lorarep_runtime.model.batch import Batch, Span
from lorarep_runtime.model.kv_cache import PageTable
from lorarep_runtime.model.plan import Plan

MOST_ROWS = 160


class LayerDecoder:
    """A `StepDecoder` over the base's own layers.

    As the one for GPUs it knows only the rows and pages that it was told. It feeds its own tokens to the next step and
    overwrites its results there.
    """

    def __init__(self, engine: Engine, share: Callable[[Tensor], None] = lambda tokens: None) -> None:
        """
        Args:
            share: overwrites the tokens of a step with rank 0's.
        """
        self._engine = engine
        self._share = share
        self._tokens = torch.zeros(MOST_ROWS, dtype=torch.int64)
        self._logits = torch.zeros(16, engine.base.vocab_size)
        self._spans: list[Span] = []
        self._said: list[Span] = []
        self._tables: list[PageTable] = []
        self._plan: Plan
        self.steps = self.told = self.prompts = 0
        self.most_rows = 0
        """Most rows of steps with prompts."""

    def rows_with_prompts(self, decoding: int, /) -> int:
        return self.most_rows

    def set_rows(self, spans: Sequence[Span], plan: Plan, /) -> None:
        self.told += 1
        if [(span.table, span.context) for span in spans] != [(span.table, span.length) for span in self._said]:
            self._tables = [PageTable(self._engine.pool, len(span.stack)) for span in spans]
        self._spans = self._said = list(spans)
        self._plan = plan
        tokens = [token for span in spans for token in span.tokens]
        self.prompts += sum(len(span.tokens) > 1 for span in spans)
        self._tokens[: len(tokens)] = torch.tensor(tokens)
        self.set_pages()

    def keep_rows(self, kept: Sequence[int], /) -> None:
        self._spans, self._tables = [self._spans[row] for row in kept], [self._tables[row] for row in kept]
        self._tokens[: len(kept)] = self._tokens[list(kept)]

    def set_pages(self) -> None:
        for table, span in zip(self._tables, self._spans, strict=True):
            new = span.table.pages[:, table.pages.shape[1] :]
            table.pages = np.concatenate([table.pages, new], axis=1)

    def step(self) -> tuple[Tensor, Tensor]:
        self.steps += 1
        self._share(self._tokens)
        base = self._engine.base
        ends = list(accumulate((len(span.tokens) for span in self._spans), initial=0))
        tokens, count = self._tokens.tolist(), len(self._spans)
        told = zip(self._spans, pairwise(ends), self._tables, strict=True)
        spans = [replace(span, tokens=tokens[start:end], table=table) for span, (start, end), table in told]
        batch = Batch(spans, base.device, self._plan)
        logits = base.forward(batch, self._engine.pool, torch.from_numpy(batch.starts[1:] - 1))
        self._logits[batch.order, : logits.shape[1]] = logits
        self._tokens[:count] = self._logits[:count].argmax(-1)
        self._spans = [replace(span, context=span.length, tokens=[0]) for span in self._spans]
        return self._tokens[:count], self._logits[:count]

    def prefill(self, batch: Batch, /) -> LateForward:
        return LateForward(self._engine, batch)

    def tensors(self) -> list[Tensor]:
        return [self._tokens, self._logits]


class LateForward:
    """A `Forward` that writes all keys and values after its last visit."""

    def __init__(self, engine: Engine, batch: Batch) -> None:
        self._engine, self._batch = engine, batch
        self.left = len(batch.plan.visits)

    def advance(self, visits: int, /) -> None:
        self.left -= min(visits, self.left)

    def logits(self, rows: Tensor, /) -> Tensor:
        assert not self.left
        return self._engine.base.forward(self._batch, self._engine.pool, rows)


def with_decoder(engine: Engine) -> LayerDecoder:
    """Gives an engine that has not been started a `LayerDecoder`."""
    decoder = LayerDecoder(engine)
    engine.loop = engine.make_loop(decoder)
    return decoder
