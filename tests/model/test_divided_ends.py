"""Ranks that divide a base's vocabulary look up and compute what `transformers` does with all of it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lorarep_runtime.errors import FailedPrecondition
from lorarep_runtime.model.cut import Cut
from lorarep_runtime.model.divided_ends import DividedEnds
from lorarep_runtime.model.shard import Shard
from tests.support.models import load_base, save_base
from tests.support.ranks import ThreadGroup, Turns

VOCAB, HIDDEN = 275, 64
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("family", "ranks", "is_tied"), [("llama", 2, False), ("llama", 4, True), ("gemma3", 4, True), ("llama", 3, False)]
)
def test_embeddings_have_the_same_bits_and_logits_the_same_digits(
    family: str, ranks: int, is_tied: bool, tmp_path: Path
) -> None:
    """Also a family that scales embeddings, and tokens at the ends of parts."""
    folder = save_base(family, tmp_path, vocab_size=VOCAB, tie_word_embeddings=is_tied)
    whole, *models = (load_base(folder) for _ in range(ranks + 1))
    group = ThreadGroup(ranks, Turns())
    for rank, model in enumerate(models):
        shard = Shard(Cut(rank, ranks, 2), group.of(rank))  # type: ignore[arg-type]
        assert DividedEnds(model, shard, CPU).vocab_size == VOCAB
        rows = {end.weight.untyped_storage().data_ptr(): end.weight.shape[0] for end in ends(model)}
        assert sum(rows.values()) == -(-VOCAB // ranks) * (1 if is_tied else 2)
    ids, x = torch.arange(VOCAB).view(5, -1), torch.randn(3, 7, HIDDEN)

    def compute(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
        embedding, head = ends(model)
        return embedding(ids), head(x)

    with ThreadPoolExecutor(ranks) as pool:
        found = list(pool.map(compute, models))
    embeddings, logits = compute(whole)
    for of_rank, _ in found:
        assert torch.equal(of_rank, embeddings)
    torch.testing.assert_close(found[0][1], logits, atol=1e-5, rtol=0)


def test_a_head_has_its_own_part_of_the_bias() -> None:
    head = nn.Linear(HIDDEN, VOCAB)
    weights = head.weight.detach().clone(), head.bias.detach().clone()
    model: Any = model_of(nn.Embedding(VOCAB, HIDDEN), head)
    divided = DividedEnds(model, Shard(Cut(1, 2, 2), ThreadGroup(2, Turns()).of(1)), CPU)  # type: ignore[arg-type]
    x = torch.randn(3, HIDDEN)
    expected = nn.functional.linear(x, *(tensor[138:] for tensor in weights))
    torch.testing.assert_close(divided.own_logits(x)[:, :137], expected)


@pytest.mark.parametrize("head", [nn.Identity(), nn.Linear(HIDDEN, VOCAB - 1)])
def test_another_head_is_refused(head: nn.Module) -> None:
    model: Any = model_of(nn.Embedding(VOCAB, HIDDEN), head)
    with pytest.raises(FailedPrecondition, match=type(head).__name__) as refused:
        DividedEnds(model, Shard(Cut(0, 2, 2), ThreadGroup(2, Turns()).of(0)), CPU)  # type: ignore[arg-type]
    assert refused.value.field == "tensor_parallel"


def ends(model: Any) -> tuple[Any, Any]:
    return model.get_input_embeddings(), model.get_output_embeddings()


def model_of(embedding: nn.Module, head: nn.Module) -> Any:
    return SimpleNamespace(get_input_embeddings=lambda: embedding, get_output_embeddings=lambda: head)
