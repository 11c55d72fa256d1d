"""Decoding with fused layers is walking `transformers`' own, for every family that has them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lorarep_runtime.adapters.lease import Lease
from lorarep_runtime.config import BaseConfig, EngineConfig, SchedulerConfig
from lorarep_runtime.engine.engine import Engine
from lorarep_runtime.gpu.decoder import Decoder, can_decode
from lorarep_runtime.model.batch import Batch, Span
from lorarep_runtime.model.compiled_adapter import Adapter, table_of
from lorarep_runtime.model.kv_cache import PageTable
from lorarep_runtime.model.plan import Plan, merge
from lorarep_runtime.request import Request, Stopping
from tests.support.engines import PROMPT, assert_nothing_held, engine_for
from tests.support.models import ALTERNATING, save_adapter, save_base

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]
"""Without a GPU, decoding is seen with those alone that have what the others lack: biases, and norms of queries."""
MAPS = {"overlap": [[0, 2], [1, 3]], "base order": None, "reordering": [[1, 3], [0, 1]]}


def save_small(family: str, folder: Path) -> Path:
    """A base of three layers: Triton's interpreter takes milliseconds for each program of a kernel."""
    changes = {"layer_types": ALTERNATING[:3]} if family.startswith("qwen") else {}
    return save_base(family, folder / "base", num_hidden_layers=3, **changes)


def save_all(family: str, folder: Path) -> tuple[Path, dict[str, Path]]:
    base = save_small(family, folder)
    adapters = {}
    for i, (name, ranges) in enumerate(MAPS.items()):
        for dora in (False, True):
            config = dict(r=(4, 13, 40)[i], lora_alpha=8, use_dora=dora, target_modules=TARGETS[i:])
            adapters[f"{name} {dora}"] = save_adapter(
                base, folder / f"{i}{dora}", seed=i, layer_replication=ranges, **config
            )
    return base, adapters


def test_a_base_of_another_activation_has_its_own_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorarep_runtime.model.base.check_family", lambda *_: None)
    config = BaseConfig(str(save_base("llama", tmp_path, hidden_act="relu")), dtype="float32", device="cpu")
    assert not can_decode(Engine(EngineConfig(config, scheduler=SchedulerConfig(kv_bytes=1 << 20))).base)


@pytest.mark.parametrize("family", FAMILIES if torch.cuda.is_available() else ["qwen2", "qwen3"])
def test_logits_are_those_of_the_layers(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when a sequence has grown so long that it is split into more parts."""
    base, folders = save_all(family, tmp_path)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        monkeypatch.setattr("lorarep_runtime.gpu.buffers.MOST_PARTS", 2)
        monkeypatch.setattr("lorarep_runtime.gpu.buffers.MOST_SPLITS", 1)
        monkeypatch.setattr("lorarep_runtime.kernels.decode.shrink.MOST_RANK_PROGRAMS", 1)
    monkeypatch.setattr("lorarep_runtime.gpu.buffers.LONG_SEQUENCE", 16)
    config = BaseConfig(str(base), dtype="float32", device=device)
    engine = Engine(EngineConfig(config, scheduler=SchedulerConfig(kv_bytes=16 << 20)))
    for name, folder in folders.items():
        engine.adapters.load(name, str(folder), trusted=True)
    assert can_decode(engine.base)
    decoder = Decoder(engine.base, engine.pool, max_sequences=4, max_tokens=64, max_pages=4)
    names = ("overlap False", "reordering True", None)
    leases = [engine.adapters.lease([(name, 1.0)] if name else []) for name in names]
    texts = [[*PROMPT[: 3 + 6 * i], 5 * i, 5 * i + 1] for i in range(len(leases))]
    spans = []
    for lease, text in zip(leases, texts, strict=True):
        table = PageTable(engine.pool, len(lease.stack))
        assert table.grow(len(text) - 1)
        fill(engine, lease, text[:-2], table)
        spans.append(Span(text[-2:-1], len(text) - 2, lease.stack, with_table(lease, engine), table))
    splits = []
    for step in range(2):
        assert all(span.table.grow(span.length + step) for span in spans)
        rows = [
            replace(span, tokens=[text[step - 2]], context=span.context + step)
            for span, text in zip(spans, texts, strict=True)
        ]
        decoder.set_rows(rows, plan_of(rows))
        _, logits = decoder.step()
        splits.append(decoder._graph.buffers.shape.splits)
        for lease, text, row in zip(leases, texts, logits, strict=True):
            expected = engine.logits(text[: len(text) - 1 + step], lease)[-1]
            torch.testing.assert_close(row, expected, atol=1e-5, rtol=0)
    assert splits[1] == 2 * splits[0]


def test_a_step_goes_on_with_its_own_tokens_in_more_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine tells the decoder of new pages and of nothing else where the same sequences go on: here two of three
    get pages at once, at different depths. Before they do no sequence is split."""
    monkeypatch.setattr("lorarep_runtime.gpu.buffers.MOST_PARTS", 2)
    monkeypatch.setattr("lorarep_runtime.gpu.buffers.MOST_SPLITS", 1)
    monkeypatch.setattr("lorarep_runtime.gpu.buffers.LONG_SEQUENCE", 16)
    base = save_small("qwen2", tmp_path)
    config = BaseConfig(str(base), dtype="float32", device="cuda" if torch.cuda.is_available() else "cpu")
    lora = dict(r=4, lora_alpha=8, target_modules=TARGETS, layer_replication=[[0, 2]])
    save_adapter(base, tmp_path / "lora", seed=1, **lora)
    engine = Engine(EngineConfig(config, stacks={"short": (0,)}, scheduler=SchedulerConfig(kv_bytes=16 << 20)))
    engine.adapters.load("lora", str(tmp_path / "lora"), trusted=True)
    decoder = Decoder(engine.base, engine.pool, max_sequences=4, max_tokens=64, max_pages=4)
    leases = [*(engine.adapters.lease([], "short") for _ in range(2)), engine.adapters.lease([("lora", 1.0)])]
    texts, spans = [list(PROMPT[:length]) for length in (16, 7, 16)], []
    for lease, text in zip(leases, texts, strict=True):
        table = PageTable(engine.pool, len(lease.stack))
        assert table.grow(len(text))
        fill(engine, lease, text[:-1], table)
        spans.append(Span(text[-1:], len(text) - 1, lease.stack, with_table(lease, engine), table))
    decoder.set_rows(spans, plan_of(spans))
    splits = []
    for _ in range(3):  # the second writes to pages that the third reads
        assert engine.pool.grow([(span.table, len(text)) for span, text in zip(spans, texts, strict=True)])
        decoder.set_pages()
        tokens, logits = decoder.step()
        splits.append(decoder._graph.buffers.shape.splits)
        for lease, text, row, token in zip(leases, texts, logits, tokens.tolist(), strict=True):
            torch.testing.assert_close(row, engine.logits(text, lease)[-1], atol=1e-5, rtol=0)
            text.append(token)
    assert splits == [1, 2, 2]
    for rows, kept, splits_of_longest in (([0, 1], (0, 1), 2), ([1], (1,), 1)):
        decoder.keep_rows(rows)
        assert engine.pool.grow([(spans[i].table, len(texts[i])) for i in kept])
        decoder.set_pages()
        tokens, logits = decoder.step()
        assert decoder._graph.buffers.shape.splits == splits_of_longest
        expected = torch.stack([engine.logits(texts[i], leases[i])[-1] for i in kept])
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
        for i, token in zip(kept, tokens.tolist(), strict=True):
            texts[i].append(token)


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_have_the_logits_of_the_layers(family: str, tmp_path: Path) -> None:
    """Of several stacks and adapters in one pass, some with a part of their tokens in the cache already."""
    base, folders = save_all(family, tmp_path)
    config = BaseConfig(str(base), dtype="float32", device="cuda" if torch.cuda.is_available() else "cpu")
    engine = Engine(EngineConfig(config, scheduler=SchedulerConfig(kv_bytes=16 << 20)))
    for name, folder in folders.items():
        engine.adapters.load(name, str(folder), trusted=True)
    decoder = Decoder(engine.base, engine.pool, max_sequences=4, max_tokens=64, max_pages=4)
    spans, expected = [], []
    adapters: dict[str | None, Adapter | None] = {}
    for i, name in enumerate(["overlap True", "reordering False", None, "overlap True", "base order True"]):
        lease = engine.adapters.lease([(name, 1.0)] if name else [])
        adapters.setdefault(name, with_table(lease, engine))
        text = [*PROMPT[: 16 + i], *PROMPT[: i + 1]]
        table, cached = PageTable(engine.pool, len(lease.stack)), (12, 16, 13, 15, 19)[i]
        assert table.grow(len(text))
        if cached:
            fill(engine, lease, text[:cached], table)
        spans.append(Span(text[cached:], cached, lease.stack, adapters[name], table))
        expected.append(engine.logits(text, lease)[cached:])
    batch = Batch(spans, engine.base.device)
    prefill = decoder.prefill(batch)
    for _ in batch.plan.visits:
        prefill.advance(1)
    assert not prefill.left
    logits = prefill.logits(torch.arange(int(batch.starts[-1])))
    torch.testing.assert_close(logits, torch.cat([expected[i] for i in batch.order]), atol=1e-5, rtol=0)


def test_prompts_are_rows_of_a_step_beside_rows_that_decode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the rest of a prompt that is in the cache already. The next step is one of a row for each sequence."""
    monkeypatch.setattr("lorarep_runtime.gpu.buffers.MOST_PARTS", 2)
    monkeypatch.setattr("lorarep_runtime.gpu.buffers.MOST_SPLITS", 1)
    monkeypatch.setattr("lorarep_runtime.gpu.buffers.PROMPT_ROWS", (2, 8))
    monkeypatch.setattr("lorarep_runtime.kernels.decode.shrink.MOST_RANK_PROGRAMS", 1)
    base, folders = save_all("qwen3", tmp_path)
    config = BaseConfig(str(base), dtype="float32", device="cuda" if torch.cuda.is_available() else "cpu")
    engine = Engine(EngineConfig(config, scheduler=SchedulerConfig(kv_bytes=16 << 20)))
    decoder = Decoder(engine.base, engine.pool, max_sequences=4, max_tokens=64, max_pages=4)
    leases, texts, spans = [], [], []
    for name, length, cached in (("overlap False", 4, 0), ("reordering True", 6, 5), (None, 19, 16)):
        if name:
            engine.adapters.load(name, str(folders[name]), trusted=True)
        leases.append(lease := engine.adapters.lease([(name, 1.0)] if name else []))
        texts.append(text := [*PROMPT, *PROMPT][: length + 1])
        table = PageTable(engine.pool, len(lease.stack))
        assert table.grow(len(text))
        if cached:
            fill(engine, lease, text[:cached], table)
        spans.append(Span(text[cached:length], cached, lease.stack, with_table(lease, engine), table))
    decoder.set_rows(spans, plan_of(spans))
    _, logits = decoder.step()
    expected = [engine.logits(text[:-1], lease)[-1:] for lease, text in zip(leases, texts, strict=True)]
    torch.testing.assert_close(logits, torch.cat(expected), atol=1e-5, rtol=0)
    rows = [replace(span, tokens=text[-1:], context=span.length) for span, text in zip(spans, texts, strict=True)]
    decoder.set_rows(rows, plan_of(rows))
    _, logits = decoder.step()
    expected = [engine.logits(text, lease)[-1:] for lease, text in zip(leases, texts, strict=True)]
    torch.testing.assert_close(logits, torch.cat(expected), atol=1e-5, rtol=0)


def plan_of(spans: list[Span]) -> Plan:
    return merge(tuple(sorted({span.stack for span in spans})))


def fill(engine: Engine, lease: Lease, text: list[int], table: PageTable) -> None:
    """Puts the keys and values of a text into its pages."""
    lease.wait()
    batch = Batch([Span(text, 0, lease.stack, lease.adapter, table)], engine.base.device)
    engine.base.forward(batch, engine.pool, torch.zeros(1, dtype=torch.int64))


def with_table(lease: Lease, engine: Engine):
    """The adapter with its entry table, which it has on a GPU alone."""
    lease.wait()
    adapter = lease.adapter
    if adapter is None or adapter.table is not None:
        return adapter
    return replace(adapter, table=table_of(adapter.storage, adapter.blocks, adapter.stack, adapter.modules))


if torch.cuda.is_available():

    @pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
    def test_tokens_are_the_likeliest_to_the_layers(
        quantization: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("lorarep_runtime.gpu.buffers.LONG_SEQUENCE", 32)
        base, folders = save_all("mistral", tmp_path)
        config = BaseConfig(str(base), quantization=quantization, dtype="bfloat16", device="cuda")
        engine = Engine(EngineConfig(config, scheduler=SchedulerConfig(kv_bytes=64 << 20)))
        for name, folder in folders.items():
            engine.adapters.load(name, str(folder), trusted=True)
        names = [*folders, None, None]
        asked = [Request(PROMPT[: 2 + i], stopping=Stopping(max_new_tokens=40 + i)) for i in range(len(names))]
        leases = [engine.adapters.lease([(name, 1.0)] if name else []) for name in names]
        answers = engine.generate(zip(asked, leases, strict=True))
        assert_nothing_held(engine)
        for request, answer, name in zip(asked, answers, names, strict=True):
            lease = engine.adapters.lease([(name, 1.0)] if name else [])
            text = [*request.prompt, *answer.tokens]
            logits = engine.logits(text, lease)[len(request.prompt) - 1 : -1]
            lease.release()
            chosen = logits.gather(1, torch.tensor(answer.tokens, device="cuda")[:, None])[:, 0]
            assert ((logits.max(1).values - chosen) / logits.std(1)).max() < 0.1


def test_bases_of_other_kinds_are_left_to_transformers(tmp_path: Path) -> None:
    for family in ("gemma2", "phi3"):
        assert not can_decode(engine_for(save_base(family, tmp_path / family), kv_bytes=1 << 20).base)
