"""Walking a plan over a model's own layers.

`transformers` calls each decoder layer in order with that layer's own arguments: rotary embeddings of its attention
kind, positions, masks. A HandOff stands in for each layer and hands those arguments in; the last one walks the plan
with them. The model's own code still computes everything before the layers and after them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lorarep_runtime.errors import FailedPrecondition
from lorarep_runtime.kernels.eager import adapt as adapter_kernel
from lorarep_runtime.kernels.eager.adapt import Slice
from lorarep_runtime.kernels.eager.attention import Scores, write_pages
from lorarep_runtime.model.attention import attend_pages
from lorarep_runtime.model.batch import Batch, View
from lorarep_runtime.model.kv_cache import PagePool
from lorarep_runtime.model.plan import Visit

if TYPE_CHECKING:
    from transformers import PreTrainedModel


Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""What a layer is called with besides its hidden states: by place, and by name."""
_WALK = "_lorarep_walk"
"""The attribute by which a layer's modules find their walk."""


def walk_of(module: nn.Module) -> Walk:
    """The walk that a module of a layer belongs to.

    Raises:
        FailedPrecondition: it belongs to none.
    """
    walk: Walk | None = getattr(module, _WALK, None)
    if walk is None:
        raise FailedPrecondition(f"{type(module).__name__} attends outside of the decoder's layers", field="base")
    return walk


def find_layers(model: PreTrainedModel) -> tuple[nn.ModuleList, str]:
    """The list of a model's decoder layers, and its path, such as "model.layers".

    Raises:
        FailedPrecondition: the model has none.
    """
    count = model.config.get_text_config().num_hidden_layers
    # Some families give their head the name by which `transformers` finds a decoder.
    roots = (model.get_decoder(), model)
    found = ([m for m in root.modules() if isinstance(m, nn.ModuleList) and len(m) == count] for root in roots)
    lists = next(filter(None, found), None)
    paths = {id(module): path for path, module in model.named_modules()}
    if not lists:
        raise FailedPrecondition(f"{type(model).__name__} has no list of {count} decoder layers", field="base")
    # Layers may hold lists of as many modules.
    layers = min(lists, key=lambda module: paths[id(module)].count("."))
    return layers, paths[id(layers)]


class Walk:
    """The layers of a base, and the visit that is being computed. One forward pass at a time."""

    def __init__(self, layers: Sequence[nn.Module], *, in_tuples: bool = False) -> None:
        """
        Args:
            in_tuples: whether the model takes hidden states out of a tuple that each layer returns.
        """
        self.layers = layers
        self.in_tuples = in_tuples
        self.hand_offs = nn.ModuleList(HandOff(self, i) for i in range(len(layers)))
        """Modules that take the layers' places in the model."""
        self.deterministic = False
        """Whether adapters and attention compute each row alone."""
        for layer in layers:
            for module in layer.modules():
                object.__setattr__(module, _WALK, self)
        self._arguments: list[Arguments] = []
        self._attended: bool
        self._batch: Batch
        self._pool: PagePool
        self._index: int
        self._visit: Visit
        self._view: View

    @contextmanager
    def over(self, batch: Batch, pool: PagePool) -> Iterator[None]:
        """Walks a batch's plan in the forward pass within; afterwards holds nothing of it, least of all adapters."""
        self._batch, self._pool = batch, pool
        self._arguments = [((), {}) for _ in self.layers]
        try:
            yield
        finally:
            for name in ("_batch", "_pool", "_visit", "_view"):
                self.__dict__.pop(name, None)
            self._arguments = []

    def hand_in(self, layer: int, hidden: Tensor, arguments: Arguments) -> Tensor:
        """Takes one layer's arguments; with the last layer's, walks the plan.

        Args:
            hidden: (1, rows, hidden size).

        Returns:
            hidden; after the last layer, the output of the whole plan.
        """
        if hidden.dim() != 3:
            raise FailedPrecondition("it expects a tuple of each layer, as with an attention of its own", field="base")
        self._arguments[layer] = arguments
        return self._run(hidden) if layer == len(self.layers) - 1 else hidden

    def _run(self, hidden: Tensor) -> Tensor:
        arguments: dict[View, list[Arguments]] = {}
        for index, visit in enumerate(self._batch.plan.visits):
            self._index, self._visit, self._attended = index, visit, False
            self._view = view = self._batch.view(tuple(p is not None for p in visit.positions))
            if view not in arguments:
                arguments[view] = [_narrow(a, view, hidden.shape[1]) for a in self._arguments]
            layer, (placed, named) = self.layers[visit.layer], arguments[view][visit.layer]
            if view.rows is None:
                hidden = _first(layer(hidden, *placed, **named))
            else:
                # Rows whose stack has no position here pass through.
                walked = _first(layer(hidden.index_select(1, view.rows), *placed, **named))
                hidden = hidden.index_copy(1, view.rows, walked)
            if not self._attended:
                raise FailedPrecondition("its layers have an attention of their own, or none", field="base")
        return hidden

    def adapt(self, module: str, x: Tensor, y: Tensor, bias: Tensor | None) -> Tensor:
        """Applies each row's adapter to y = W x in place, and the base's bias.

        Args:
            module: path of the linear module in its layer.
            x: (rows, in).
            y: (rows, out), which is returned.
            bias: (out), the base's own; None is 0.
        """
        slices = self.slices(module)
        if self.deterministic:
            for s in slices:
                for row in range(s.start, s.stop):
                    adapter_kernel.adapt(x[row : row + 1], y[row : row + 1], [s._replace(start=0, stop=1)])
        elif slices:
            adapter_kernel.adapt(x, y, slices)
        return y if bias is None else y.add_(bias)

    def slices(self, module: str) -> list[Slice]:
        """What the adapters of the rows at this visit have for a module or a parameter of its layer."""
        return self._view.slices(self._visit, module)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> Tensor:
        """Stores keys and values of the rows at this visit and attends.

        Args:
            q: (rows, heads, key_dim).
            k: (rows, kv_heads, key_dim).
            v: (rows, kv_heads, value_dim).

        Returns:
            (rows, heads, value_dim).

        Raises:
            FailedPrecondition: the layer attends for the second time at this visit, which has pages for one time; or
                its keys or values have another shape than those of all pages.
        """
        if self._attended:
            raise FailedPrecondition("its layers attend more than once", field="base")
        for kind, given, paged in zip(("keys", "values"), (k, v), self._pool.tensors, strict=True):
            if given.shape[1:] != paged.shape[2:]:
                found, said = ("×".join(map(str, shape)) for shape in (given.shape[1:], paged.shape[2:]))
                raise FailedPrecondition(
                    f"its layers have {kind} of {found} numbers a token, and its config says {said}", field="base"
                )
        self._attended = True
        view, pages = self._view, self._pool.tensors
        slots, tables = self._batch.slots[self._index], self._batch.tables[self._index]
        if view.rows is not None:
            slots, tables = slots[view.rows], tables[view.spans]
        write_pages(k, v, *pages, slots)
        return attend_pages(view, q, (k, v), *pages, tables, scores, alone=self.deterministic)


class HandOff(nn.Module):
    """A module in the place of a decoder layer, which hands the layer's arguments to the walk."""

    def __init__(self, walk: Walk, layer: int) -> None:
        super().__init__()
        object.__setattr__(self, "_walk", walk)  # nn.Module would take the walk's layers for its own
        self._layer = layer

    def forward(self, hidden_states: Tensor, *placed: Any, **named: Any) -> Tensor | tuple[Tensor, None]:
        hidden = self._walk.hand_in(self._layer, hidden_states, (placed, named))
        return (hidden, None) if self._walk.in_tuples else hidden

    def __getattr__(self, name: str) -> Any:
        # Models read attributes of their layers, such as the attention kind.
        return getattr(self.__dict__["_walk"].layers[self.__dict__["_layer"]], name)


def _narrow(value: Any, view: View, rows: int) -> Any:
    """A layer's arguments for the rows of a view: every tensor (1, rows, …) inside is narrowed."""
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
