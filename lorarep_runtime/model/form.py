"""The form of one entry of an adapter: what a file has of it, and what memory. It is known before torch is imported."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple


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
    is_copy: bool = False
    """Whether a file has a whole weight in place of the base's. Its difference from that is what A and B are."""

    experts: int = 0
    """Experts with as many ranks each, of which the shape is one's. Their A and Bᵀ lie one below the other in memory; 0
    is an entry that is of no experts."""
    expert_modules: tuple[str, ...] = ()
    """Names of modules that a file has of each expert, in place of one parameter that stacks their outputs."""
    file_module: str | None = None
    """Path in the layer of the module that a file's tensors are of, where it is not the entry's own."""

    @property
    def pieces(self) -> Sequence[tuple[int, ...]]:
        """Shapes of an entry's tensors in memory: A, Bᵀ, c, bias."""
        out, into = self.shape
        ranks = self.rank * max(1, self.experts)
        return (ranks, into), (ranks, out), *[(out,)] * (self.has_c + self.has_bias)

    @property
    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Kinds and shapes of an entry's tensors in a file."""
        out, into = self.shape
        if self.is_copy or self.is_embedding:
            yield from self._tensors_of_ends()
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

    def _tensors_of_ends(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        out, into = self.shape
        if self.is_copy:
            yield "weight", (into, out) if self.is_embedding else (out, into)
        else:
            yield "lora_embedding_A", (self.rank, into)
            yield "lora_embedding_B", (out, self.rank)

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
