"""Walking a plan over a model's own layers.

`transformers` calls each decoder layer in order with that layer's own arguments: rotary embeddings of its attention
kind, positions, masks. A HandOff stands in for each layer and hands those arguments in; the last one walks the plan
with them. What comes before the layers and after them stays the model's own code.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lorarep_runtime.errors import FailedPrecondition
from lorarep_runtime.kernels.eager import adapt as adapter_kernel
from lorarep_runtime.kernels.eager.attention import paged_attention, prompt_attention, varlen_attention, write_pages
from lorarep_runtime.model.batch import Batch, Prompt, View
from lorarep_runtime.model.kv_cache import PagePool, pages_of
from lorarep_runtime.model.plan import Visit

ATTENTION = "lorarep"
"""Name under which `transformers` finds the attention below. It has no mask function: windows are applied here."""


class Walk:
    """The layers of a base and the step that is being computed. One forward pass at a time."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self.layers = layers
        self.hand_offs = nn.ModuleList(HandOff(self, i) for i in range(len(layers)))
        self._arguments: list[dict[str, Any]] = []
        self.batch: Batch
        self.pool: PagePool
        self._index: int
        self._step: Visit
        self._view: View

    @contextmanager
    def over(self, batch: Batch, pool: PagePool) -> Iterator[None]:
        """Walks a batch's plan in the forward pass within; afterwards holds nothing of it, least of all adapters."""
        self.batch, self.pool = batch, pool
        self._arguments = [{} for _ in self.layers]
        try:
            yield
        finally:
            for name in ("batch", "pool", "_step", "_view"):
                self.__dict__.pop(name, None)
            self._arguments = []

    def hand_in(self, layer: int, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
        """Takes one layer's arguments; with the last layer's, walks. hidden: (1, rows, hidden size)."""
        self._arguments[layer] = arguments
        return self._run(hidden) if layer == len(self.layers) - 1 else hidden

    def _run(self, hidden: Tensor) -> Tensor:
        arguments: dict[View, list[dict[str, Any]]] = {}
        for index, step in enumerate(self.batch.plan.visits):
            self._index, self._step = index, step
            self._view = view = self.batch.view(tuple(p is not None for p in self._step.positions))
            if view not in arguments:
                arguments[view] = [_narrow(a, view, hidden.shape[1]) for a in self._arguments]
            layer, own = self.layers[self._step.layer], arguments[view][self._step.layer]
            if view.rows is None:
                hidden = _first(layer(hidden, walk=self, **own))
            else:
                # Rows whose stack has no position here pass through.
                walked = _first(layer(hidden.index_select(1, view.rows), walk=self, **own))
                hidden = hidden.index_copy(1, view.rows, walked)
        return hidden

    def adapt(self, module: str, x: Tensor, y: Tensor, bias: Tensor | None) -> Tensor:
        """Applies each row's adapter to y = W x (rows, out) in place, and the base's bias."""
        slices = self._view.slices(self._step, module)
        if slices:
            adapter_kernel.adapt(x, y, slices)
        return y if bias is None else y.add_(bias)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None, softcap: float | None
    ) -> Tensor:
        """Stores keys and values of the rows at this step and attends.

        Args:
            q: (rows, heads, head_dim).
            k, v: (rows, kv_heads, head_dim).

        Returns:
            (rows, heads, head_dim).
        """
        view, pages = self._view, self.pool.tensors
        slots, tables = self.batch.slots[self._index], self.batch.tables[self._index]
        if view.rows is not None:
            slots, tables = slots[view.rows], tables[view.spans]
        write_pages(k, v, *pages, slots)
        return attend_pages(view, q, *pages, tables, scale=scale, window=window, softcap=softcap)


def attend_pages(
    view: View,
    q: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    tables: Tensor,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Attention of the rows of a view to the pages of their spans, which hold their own keys and values already.

    Args:
        q: (rows, heads, head_dim).
        tables: (spans, n) int64, the pages of each span at this step.

    Returns:
        (rows, heads, head_dim).
    """

    def attend(rows: Tensor, tables: Tensor, lengths: Tensor) -> Tensor:
        return paged_attention(
            rows.unsqueeze(1), key_pages, value_pages, tables, lengths, scale=scale, window=window, softcap=softcap
        ).squeeze(1)

    if not view.prompts:
        return attend(q, tables, view.lengths)

    def attend_prompt(prompt: Prompt) -> Tensor:
        return prompt_attention(
            q[prompt.start : prompt.stop],
            key_pages,
            value_pages,
            tables[prompt.span, : pages_of(prompt.length)],
            prompt.length,
            prompt.bounds,
            scale=scale,
            window=window,
            softcap=softcap,
        )

    if len(view.prompts) == 1 and not len(view.decodes):
        return attend_prompt(view.prompts[0])
    out = torch.empty_like(q)
    if len(view.decodes):
        out[view.decode_rows] = attend(
            q[view.decode_rows], tables[view.decodes, : view.decode_pages], view.lengths[view.decodes]
        )
    for prompt in view.prompts:
        out[prompt.start : prompt.stop] = attend_prompt(prompt)
    return out


class HandOff(nn.Module):
    """Stands where a decoder layer stood in the model."""

    def __init__(self, walk: Walk, layer: int) -> None:
        super().__init__()
        object.__setattr__(self, "_walk", walk)  # nn.Module would take the walk's layers for its own
        self._layer = layer

    def forward(self, hidden: Tensor, **arguments: Any) -> Tensor:
        return self._walk.hand_in(self._layer, hidden, arguments)

    def __getattr__(self, name: str) -> Any:
        # Models read attributes of their layers, such as the attention kind.
        return getattr(self.__dict__["_walk"].layers[self.__dict__["_layer"]], name)


def _narrow(value: Any, view: View, rows: int) -> Any:
    """The arguments of a layer for the rows of a view: every tensor (1, rows, …) inside is narrowed."""
    if view.rows is None:
        return value
    if isinstance(value, Tensor):
        return value.index_select(1, view.rows) if value.dim() > 1 and value.shape[1] == rows else value
    if isinstance(value, dict):
        return {k: _narrow(v, view, rows) for k, v in value.items()}
    if isinstance(value, tuple):
        return tuple(_narrow(v, view, rows) for v in value)
    return value


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


NO_EFFECT = {"dropout", "position_ids", "use_cache", "cache_position", "output_attentions", "is_causal"}
"""Arguments that models give to their attention and that change nothing here."""


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    walk: Walk,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The attention function of `transformers`: (1, heads, rows, head_dim) in, (1, rows, heads, head_dim) out."""
    unknown = [name for name, given in others.items() if name not in NO_EFFECT and given is not None]
    if attention_mask is not None or unknown or not getattr(module, "is_causal", True):
        what = ", ".join(unknown) or "a mask of its own"
        raise FailedPrecondition(
            f"{type(module).__name__} wants {what}, which paged attention does not know", field="base"
        )
    out = walk.attend(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=sliding_window,
        softcap=softcap,
    )
    return out.unsqueeze(0), None


def register_attention() -> None:
    """Has `transformers` find the attention above. To import what models and attention are made of takes seconds."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, _attention)
    if torch.cuda.is_available():
        varlen_attention()
