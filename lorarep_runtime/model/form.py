"""The form of one entry of an adapter: what a file has of it, and what memory. It is known before torch is imported."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

HEAD, EMBEDDING = -1, -2
"""The positions of the model's head and embedding, which are in no stack: all stacks share them. The modules of such
entries are paths in the model."""

ROWS = "trainable_tokens_delta"
"""PEFT's name for rows of single tokens, in place of the base's."""


class End(NamedTuple):
    """A model's head or embedding."""

    path: str
    """In the model, such as "lm_head"."""
    tokens: int
    """Rows of its weight."""
    hidden: int
    """Columns of its weight."""


@dataclass(frozen=True)
class Ends:
    """A model's head and embedding, as far as adapters may adapt them."""

    head: End | None = None
    embedding: End | None = None
    tied: bool = False
    """Whether they have one weight."""

    def __iter__(self) -> Iterator[tuple[int, End]]:
        """The position and the module of each."""
        for position, end in ((HEAD, self.head), (EMBEDDING, self.embedding)):
            if end is not None:
                yield position, end


class ParameterShape(NamedTuple):
    """Shape of a parameter that adapters may adapt."""

    experts: int
    """Experts that it has weights of; 0 is a router's."""
    shape: tuple[int, int]
    """(out, in), of one expert or of the router."""


class Form(NamedTuple):
    """Shape and parts of one entry: an adapter's matrices for one module at one position."""

    rank: int
    shape: tuple[int, int]
    """(out, in) of the base's weight."""
    has_c: bool
    """Whether it scales the output, as DoRA does."""
    has_bias: bool
    a_blocks: int = 1
    """Blocks of which a file has A, which is block-diagonal then."""
    b_blocks: int = 1
    has_e: bool = False
    """Whether a file has the factors of the ranks (AdaLoRA's singular values) beside A."""

    is_embedding: bool = False
    """Whether it is of an embedding."""
    rows: Sequence[int] | None = None
    """Tokens whose rows of a head's or an embedding's weight an adapter has itself, in place of the base's. The entry
    has nothing else then, and `shape` is the weight's. A range is the end of a weight that the file has whole, and what
    is before it is the base's. A tuple is all that the file has."""

    @property
    def tokens(self) -> int:
        """Of an entry for a head or an embedding, the tokens of the adapter's vocabulary."""
        return self.shape[self.is_embedding]

    experts: int = 0
    """Experts with as many ranks each, of which the shape is one's. Their A and Bᵀ lie one below the other in memory; 0
    is an entry that is of no experts."""
    expert_modules: tuple[str, ...] = ()
    """Names of modules that a file has of each expert, in place of one parameter that stacks their outputs."""
    file_module: str | None = None
    """Path in the layer of the module that a file's tensors are of, where it is not the entry's own."""

    @property
    def pieces(self) -> Sequence[tuple[int, ...]]:
        """Shapes of an entry's tensors in memory: A, Bᵀ, c, bias; or its rows."""
        out, into = self.shape
        if self.rows is not None:
            return ((len(self.rows), into),)
        ranks = self.rank * max(1, self.experts)
        return (ranks, into), (ranks, out), *[(out,)] * (self.has_c + self.has_bias)

    @property
    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Kinds and shapes of an entry's tensors in a file."""
        out, into = self.shape
        if self.rows is not None:
            yield from [("weight", self.shape)] if isinstance(self.rows, range) else [(ROWS, (len(self.rows), into))]
            return
        if self.is_embedding:
            yield "lora_embedding_A", (self.rank, into)
            yield "lora_embedding_B", (out, self.rank)
            if self.has_c:
                yield "lora_magnitude_vector", (out,)
            return
        if self.experts:
            yield from self._tensors_of_experts()
            return
        suffix = "" if self.has_e else ".weight"
        yield f"lora_A{suffix}", (self.rank, into // self.a_blocks)
        yield f"lora_B{suffix}", (out, self.rank // self.b_blocks)
        if self.has_e:
            yield "lora_E", (self.rank, 1)
        if self.has_bias:
            yield "lora_B.bias", (out,)
        if self.has_c:
            yield "lora_magnitude_vector", (out,)

    def _tensors_of_experts(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        out, into = self.shape
        if not self.expert_modules:
            yield "lora_A.weight", (self.experts * self.rank, into)
            yield "lora_B.weight", (out, self.rank * self.experts)
        parts = len(self.expert_modules)
        for expert in range(self.experts):
            for module in self.expert_modules:
                yield f"{expert}.{module}.lora_A.weight", (self.rank // parts, into)
                yield f"{expert}.{module}.lora_B.weight", (out // parts, self.rank // parts)
