"""Sizes and device memory of decode steps: how large a tensor of a step is, and where it lies, is answered here alone.

One step runs at a time, so all steps share one memory. Captured graphs hold its addresses, so nothing that a step was
given is freed or moved; a size that was not foreseen gets memory of its own. Sizes come in few classes, so that few
graphs serve all steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, takewhile
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from lorarep_runtime.config import PAGE_TOKENS
from lorarep_runtime.integers import ceil_div, next_power_of_two, round_up
from lorarep_runtime.kernels.attention_config import Attention
from lorarep_runtime.kernels.decode.attention import chunks_of
from lorarep_runtime.kernels.decode.combine import Partials
from lorarep_runtime.model.kv_cache import pages_of
from lorarep_runtime.model.packed import PACKED_MODULES

if TYPE_CHECKING:
    from lorarep_runtime.model.base import Base

PROGRAMS = 256
"""Programs of a kernel that keep the device busy."""
LEAST_RANKS = 8
"""Ranks that `shrunk` has room for in the smallest class; each next class has eight times as many."""
WIDE_RANKS = 512
"""Ranks from which on each next class has twice as many: mixes alone have more, and their memory is large."""
LEAST_DEPTH = 16
"""Positions that page tables have room for in the smallest class; each next class has twice as many."""
MOST_PARTS = 16
"""Most partial sums of A x."""
LEAST_ALIKE_RANKS = 16
"""The smallest class of ranks of deterministic steps: kernels take those of all larger ones in blocks of one size."""
ALIKE_PARTS_ROWS = 16
"""Rows whose partial sums of A x are those of all deterministic steps."""
MOST_CHUNKED_ROWS = 8
"""Most rows of a deterministic step whose sequences several programs share for attention."""
MOST_ATTENDED_RANKS = 8
"""Most ranks for which the attention kernel computes A x itself; with more each of its programs would take long."""
MOST_SPLITS = 16
"""Most parts that a sequence of up to LONG_SEQUENCE tokens is split into for attention."""
PROMPT_ROWS = (16, 128)
"""Least and most rows of the steps that compute prompts; those of many sequences have as many as these."""
ALIGNMENT = 256
"""Bytes of whose multiples tensors begin at one: more than any load and TMA ask for."""
LONG_SEQUENCE = 2048
"""Tokens beyond which a sequence is split into MORE_SPLITS times as many parts: the reading pays for the merging."""
MORE_SPLITS = 2


def ranks_for(rank: int) -> int:
    """Ranks that `shrunk` has room for where `rank` is the largest of a step: 8, 64, 512, 1,024 and so on."""
    return next(ranks for ranks in _rank_classes() if ranks >= rank)


def rank_classes(max_rank: int) -> list[int]:
    """All that `ranks_for` returns for ranks of up to `max_rank`."""
    return [*takewhile(lambda ranks: ranks < max_rank, _rank_classes()), ranks_for(max_rank)]


def _rank_classes() -> Iterator[int]:
    ranks = LEAST_RANKS
    while True:
        yield ranks
        ranks *= 8 if ranks < WIDE_RANKS else 2


def depth_for(depth: int) -> int:
    """Positions that page tables have room for where the deepest stack of a step has `depth`."""
    return max(LEAST_DEPTH, next_power_of_two(depth))


def parts_for(rows: int, width: int) -> int:
    """Partial sums of A x that a step of `rows` rows computes of an x of `width` numbers."""
    return min(MOST_PARTS, ceil_div(width, 256 if rows <= 8 else 1024))


def splits_for(rows: int, kv_heads: int, tokens: int) -> int:
    """Parts that attention splits each sequence of a step into, of which the longest has `tokens` tokens."""
    more = MORE_SPLITS if tokens > LONG_SEQUENCE else 1
    return max(1, min(more * MOST_SPLITS, more * PROGRAMS // (rows * kv_heads)))


class StepShape(NamedTuple):
    """The sizes that the kernels of a step are launched for."""

    rows: int
    """A power of two; rows beyond the step's sequences have no position."""
    ranks: int
    """Ranks that `shrunk` has room for."""
    splits: int
    """Parts that each sequence is split into."""
    shares_sequences: bool = False
    """Whether several rows may be tokens of one sequence, as those of prompts are."""


@dataclass(frozen=True)
class LayerBuffers:
    """Tensors that the layers of one step write; the next layer may overwrite all but h."""

    h: Tensor
    """(rows, hidden size), the residual stream."""
    x: Tensor
    """(rows, hidden size), h after a norm."""
    qkv: Tensor
    """(rows, outputs of q, k and v)."""
    out: Tensor
    """(rows, heads · head_dim), the output of attention."""
    gate_up: Tensor
    """(rows, outputs of gate and up)."""
    gated: Tensor
    """(rows, intermediate size), the input of the down projection."""
    shrunk: Sequence[Tensor]
    """A x for each of PACKED_MODULES: fp32 (rows, parts, modules, ranks)."""
    partials: Partials
    """Attention to each part of the sequences, where they are split."""
    attention_shrinks: bool
    """Whether the attention kernel computes A x of the o projection too, one part for each head of keys and values."""
    shares_sequences: bool
    """Whether several rows may be tokens of one sequence."""
    deterministic: bool
    """Whether a row's result is bitwise the same for any number of rows."""


@dataclass(frozen=True)
class StepBuffers:
    """All memory that the steps of one shape read and write, at addresses that stay."""

    shape: StepShape
    tokens: Tensor
    """(rows) int64: the token of each row before a step, the likeliest next one after it."""
    lengths: Tensor
    """(rows) int32, tokens of each row's sequence before the row's own; a step adds one."""
    sequences: Tensor
    """(rows) int32, the number of each row's sequence in the tables."""
    adapters: Tensor
    """(rows) int64, addresses of the entry tables of the rows' adapters; 0 is no adapter."""
    ends: Tensor
    """(sequences) int64, the row of each sequence's last token, where several rows may be of one."""
    logits: Tensor
    """(sequences, vocab) fp32, of each sequence's last token; sequences are rows where each has one. Other ranks than 0
    have none: (sequences, 0)."""
    tables: Tensor
    """(most sequences, positions, pages) int32, the pages of each sequence at each position of its stack."""
    layers: LayerBuffers


class StepMemory:
    """The memory of all steps. The engine's thread alone asks it for views; any thread may count its tensors."""

    def __init__(
        self,
        base: Base,
        attention: Attention,
        max_sequences: int,
        max_tokens: int,
        max_pages: int,
        *,
        deterministic: bool = False,
    ) -> None:
        """
        Args:
            attention: of any layer; all have the same heads.
            max_sequences: most sequences of a step.
            max_tokens: most tokens of a sequence.
            max_pages: most pages of a sequence at each of its positions, whatever its stack.
            deterministic: a row's result is bitwise the same for any number of rows.
        """
        self._base, self._kv_heads = base, attention.kv_heads
        self.deterministic = deterministic
        self.max_sequences = next_power_of_two(max_sequences)
        """Most sequences of a step."""
        self.max_rows = rows = max(self.max_sequences, PROMPT_ROWS[1])
        """Most rows of a step."""
        self._longest, self._max_pages = pages_of(max_tokens), max_pages
        self._views: dict[tuple[StepShape, int], StepBuffers] = {}
        """By shape and depth of the page tables."""
        self._shrunk: dict[int, Sequence[Tensor]] = {}
        """By ranks, one tensor for each of PACKED_MODULES."""
        self._tables: dict[int, Tensor] = {}
        """Page tables by their depth."""
        hidden, widths = base.config.get_text_config().hidden_size, base.held_modules
        outputs = [sum(widths[name][0] for name in names) for names in PACKED_MODULES]
        splits = max(shape.rows * shape.splits for shape in self._shapes(LEAST_RANKS))
        heads, dim, dtype = attention.heads, attention.head_dim, base.dtype
        # Attention is over when gate and up are computed, and begins anew when they have been read.
        attended = [
            _Wanted((rows, outputs[0]), dtype),
            _Wanted((rows, heads * dim), dtype),
            *(_Wanted((1, heads, splits, *more), torch.float32) for more in ((), (), (dim,))),
        ]
        gate_up = [_Wanted((rows, outputs[2]), dtype)]
        others = [_Wanted((rows, n), dtype) for n in (hidden, hidden, widths[PACKED_MODULES[3][0]][1])]
        shared = max(_bytes(attended), _bytes(gate_up))
        self._layers = torch.zeros(shared + _bytes(others), dtype=torch.uint8, device=base.device)
        """The memory of what layers write, in one piece: an allocator rounds up each."""
        self._qkv, self._out, *partials = _carved(self._layers, attended)
        self._partials = Partials(*partials)
        (self._gate_up,) = _carved(self._layers, gate_up)
        self._h, self._x, self._gated = _carved(self._layers[shared:], others)
        self._tokens = self._zeros(rows, dtype=torch.int64)
        self._lengths = self._zeros(rows, dtype=torch.int32)
        self._sequences = self._zeros(rows, dtype=torch.int32)
        self._adapters = self._zeros(rows, dtype=torch.int64)
        self._ends = self._zeros(self.max_sequences, dtype=torch.int64)
        has_logits = base.shard is None or base.shard.cut.rank == 0
        self._logits = self._zeros(self.max_sequences, base.vocab_size if has_logits else 0, dtype=torch.float32)

    @property
    def buckets(self) -> list[int]:
        """Numbers of rows that steps of a row for each sequence are captured for: powers of two."""
        return [1 << power for power in range(self.max_sequences.bit_length())]

    @property
    def prompt_buckets(self) -> list[int]:
        """Numbers of rows that steps with prompts are captured for: powers of two."""
        return [1 << power for power in range(self.max_rows.bit_length()) if 1 << power >= PROMPT_ROWS[0]]

    @property
    def max_tokens(self) -> int:
        """Most tokens of a sequence, rounded up to whole pages."""
        return self._longest * PAGE_TOKENS

    @property
    def h(self) -> Tensor:
        """(most rows, hidden size), where the residual streams of every step are."""
        return self._h

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors that are held, also while another thread adds to them."""
        shrunk = [tensor for tensors in list(self._shrunk.values()) for tensor in tensors]
        rows = [self._tokens, self._lengths, self._sequences, self._adapters, self._ends, self._logits]
        return [self._layers, *shrunk, *list(self._tables.values()), *rows]

    def splits(self, rows: int, tokens: int) -> int:
        """Parts that each sequence of a step is split into, of which the longest has `tokens` tokens."""
        if self.deterministic:
            return chunks_of(tokens) if rows <= MOST_CHUNKED_ROWS else 1
        return splits_for(rows, self._kv_heads, tokens)

    def ranks(self, rank: int) -> int:
        """Ranks that `shrunk` has room for where `rank` is the largest of a step."""
        return LEAST_ALIKE_RANKS if self.deterministic and rank <= LEAST_ALIKE_RANKS else ranks_for(rank)

    def views(self, rows: int, rank: int, tokens: int, depth: int, *, shares_sequences: bool = False) -> StepBuffers:
        """The memory of a step, of the smallest shape that has room for it.

        Args:
            rows: of the step; its bucket does as well.
            rank: largest of its adapters; its class does as well.
            tokens: of its longest sequence.
            depth: positions of its deepest stack.
            shares_sequences: whether several rows may be tokens of one sequence.
        """
        rows = next_power_of_two(max(rows, self.prompt_buckets[0]) if shares_sequences else rows)
        depth = depth_for(depth)
        shape = StepShape(rows, self.ranks(rank), self.splits(rows, tokens), shares_sequences)
        if (shape, depth) not in self._views:
            self._views[shape, depth] = StepBuffers(
                shape=shape,
                tokens=self._tokens[:rows],
                lengths=self._lengths[:rows],
                sequences=self._sequences[:rows],
                adapters=self._adapters[:rows],
                ends=self._ends[:rows],
                logits=self._logits[:rows],
                tables=self._tables_of(depth),
                layers=self._layer_views(shape),
            )
        return self._views[shape, depth]

    def _layer_views(self, shape: StepShape) -> LayerBuffers:
        n, parts = shape.rows, self._parts(shape)
        return LayerBuffers(
            h=self._h[:n],
            x=self._x[:n],
            qkv=self._qkv[:n],
            out=self._out[:n],
            gate_up=self._gate_up[:n],
            gated=self._gated[:n],
            shrunk=[
                _reshaped(whole, n, count, *whole.shape[2:])
                for whole, count in zip(self._shrunk_of(shape.ranks), parts, strict=True)
            ],
            partials=Partials(*(_reshaped(p, n, p.shape[1], shape.splits, *p.shape[3:]) for p in self._partials)),
            attention_shrinks=self._attention_shrinks(shape),
            shares_sequences=shape.shares_sequences,
            deterministic=self.deterministic,
        )

    def _attention_shrinks(self, shape: StepShape) -> bool:
        # Only where no sequence is split does one program see all that a head attends to.
        return (
            not self.deterministic
            and shape.splits == 1
            and self._kv_heads <= MOST_PARTS
            and shape.ranks <= MOST_ATTENDED_RANKS
        )

    def _parts(self, shape: StepShape) -> list[int]:
        """Partial sums of A x, for each of PACKED_MODULES."""
        widths = self._base.held_modules
        rows = ALIKE_PARTS_ROWS if self.deterministic else shape.rows
        parts = [parts_for(rows, widths[names[0]][1]) for names in PACKED_MODULES]
        if self._attention_shrinks(shape):
            parts[1] = self._kv_heads
        return parts

    def _shapes(self, ranks: int) -> list[StepShape]:
        """All shapes that there are of some ranks: sequences are split as the shortest or as the longest is."""
        rows = {*self.buckets, *self.prompt_buckets}
        return [StepShape(n, ranks, self.splits(n, t)) for n in sorted(rows) for t in (1, self.max_tokens)]

    def _shrunk_of(self, ranks: int) -> Sequence[Tensor]:
        """Memory for A x in steps of every number of rows."""
        if ranks not in self._shrunk:
            parts = [[shape.rows * count for count in self._parts(shape)] for shape in self._shapes(ranks)]
            self._shrunk[ranks] = [
                self._zeros(1, max(counts), len(names), ranks, dtype=torch.float32)
                for counts, names in zip(zip(*parts, strict=True), PACKED_MODULES, strict=True)
            ]
        return self._shrunk[ranks]

    def _tables_of(self, depth: int) -> Tensor:
        if depth not in self._tables:
            self._tables[depth] = self._zeros(self.max_sequences, depth, self._max_pages, dtype=torch.int32)
        return self._tables[depth]

    def _zeros(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.zeros(shape, dtype=dtype or self._base.dtype, device=self._base.device)


class _Wanted(NamedTuple):
    """A tensor that is to lie in a given memory."""

    shape: Sequence[int]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes up to where the next tensor may begin."""
        return round_up(math.prod(self.shape) * self.dtype.itemsize, ALIGNMENT)


def _bytes(wanted: Sequence[_Wanted]) -> int:
    return sum(one.nbytes for one in wanted)


def _carved(memory: Tensor, wanted: Sequence[_Wanted]) -> list[Tensor]:
    """Tensors that lie one after the other in a memory of bytes, from its beginning on."""
    ends = accumulate((one.nbytes for one in wanted), initial=0)
    return [
        memory[at : at + math.prod(one.shape) * one.dtype.itemsize].view(one.dtype).view(*one.shape)
        for one, at in zip(wanted, ends, strict=False)
    ]


def _reshaped(whole: Tensor, *shape: int) -> Tensor:
    """The beginning of a tensor's memory in another shape."""
    return whole.flatten()[: torch.Size(shape).numel()].view(shape)
