"""Adapters of resized vocabularies and of single tokens, beside others in one batch, against PEFT."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from lorarep_server.cli.verify import verify
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from lorarep_runtime.adapters.lease import Lease
from lorarep_runtime.engine.engine import Engine
from lorarep_runtime.errors import FailedPrecondition, InvalidArgument
from lorarep_runtime.request import FinishReason, Request, Sampling, Stopping, StructuredOutput
from tests.support.engines import PROMPT, engine_for, greedy, sampled
from tests.support.models import VOCAB, reference, reference_logits, save_adapter, save_base, stack_of

WEIGHTS = "adapter_model.safetensors"
LAYERS = 3
RANGES = [[0, 2], [1, 3]]
MORE, FEWER = VOCAB + 8, VOCAB - 16
NEW = tuple(range(VOCAB, MORE))
Q: dict[str, Any] = dict(target_modules=["q_proj"])
BOTH = ["embed_tokens", "lm_head"]
KINDS: dict[str, dict[str, Any]] = {
    "plain": Q,
    "more": dict(**Q, tokens=MORE),
    "more on a stack": dict(**Q, tokens=MORE, layer_replication=RANGES),
    "own head and embedding": dict(**Q, tokens=MORE, modules_to_save=BOTH, layer_replication=RANGES),
    "own embedding": dict(**Q, tokens=MORE, modules_to_save=["embed_tokens"]),
    "own head": dict(**Q, tokens=MORE, modules_to_save=["lm_head"]),
    "tied": dict(**Q, tokens=MORE, modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    "LoRA": dict(target_modules=["q_proj", *BOTH], tokens=MORE, layer_replication=RANGES),
    "fewer": dict(**Q, tokens=FEWER),
    "fewer of its own": dict(**Q, tokens=FEWER, modules_to_save=BOTH),
    "as many": dict(**Q, modules_to_save=BOTH),
    "tied and as many": dict(**Q, modules_to_save=["lm_head"], ensure_weight_tying=True),
    "tied LoRA": dict(target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True),
    "tokens": dict(**Q, trainable_token_indices=[270, 5, 11], layer_replication=RANGES),
    "tokens of the head": dict(**Q, trainable_token_indices={"lm_head": [5, 11]}),
    "tokens of both": dict(**Q, trainable_token_indices={"embed_tokens": [5, 11], "lm_head": [5, 11]}),
    "others of the head": dict(**Q, trainable_token_indices={"embed_tokens": [5, 11], "lm_head": [48]}),
    "new tokens": dict(**Q, tokens=MORE, trainable_token_indices=[*NEW, 5], layer_replication=RANGES),
    "DoRA and tokens": dict(**Q, use_dora=True, trainable_token_indices=[11]),
}
OF_TIED: dict[str, dict[str, Any]] = {
    "LoRA on the embedding": dict(target_modules=["q_proj", "embed_tokens"], tokens=MORE),
    "LoRA on the head": dict(target_modules=["lm_head"], tokens=MORE),
    "LoRA over tokens": dict(target_modules=["lm_head"], trainable_token_indices=[5, 270]),
}
# PEFT warns of tied weights, and that it saves the base's.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(scope="module", params=["llama", "gemma2"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Llama has a head of its own. Gemma 2's is the embedding, which scales what it gives; its logits are capped."""
    changes: dict[str, Any] = dict(num_hidden_layers=LAYERS)
    if request.param == "gemma2":
        changes["layer_types"] = ["full_attention", "sliding_attention", "full_attention"]
    return save_base(request.param, tmp_path_factory.mktemp("vocabularies") / "base", **changes)


@pytest.fixture(scope="module")
def kinds(base: Path) -> dict[str, dict[str, Any]]:
    is_tied = json.loads((base / "config.json").read_text())["tie_word_embeddings"]
    return {**KINDS, **(OF_TIED if is_tied else {})}


@pytest.fixture(scope="module")
def adapters(base: Path, kinds: dict[str, dict[str, Any]]) -> dict[str, Path]:
    return {
        name: save_adapter(base, base.parent / str(i), seed=i, r=4, lora_alpha=8, **config)
        for i, (name, config) in enumerate(kinds.items())
    }


@pytest.fixture(scope="module")
def engine(base: Path, adapters: dict[str, Path]) -> Engine:
    return engine_for(base, adapters=adapters)


def prompt_of(tokens: int) -> tuple[int, ...]:
    """A prompt with some of the last tokens of a vocabulary."""
    return (*(token % tokens for token in PROMPT), tokens - 1, 5, tokens - 2, 11)


@pytest.mark.parametrize(("quantization", "tolerance"), [("none", 2e-5), ("nf4", 2e-4)])
def test_each_vocabulary_is_as_with_peft_in_one_batch(
    quantization: str,
    tolerance: float,
    engine: Engine,
    base: Path,
    kinds: dict[str, dict[str, Any]],
    adapters: dict[str, Path],
) -> None:
    engine = engine if quantization == "none" else engine_for(base, quantization, adapters=adapters)
    names = [None, *adapters]
    tokens = {name: kinds[name].get("tokens", VOCAB) if name else VOCAB for name in names}
    leases = [engine.adapters.lease([] if name is None else [(name, 1.0)]) for name in names]
    assert [lease.vocab_size for lease in leases] == list(tokens.values())
    asked = [replace(greedy(prompt_of(tokens[name]), new_tokens=8), prompt_logprobs=2) for name in names]
    answers = engine.generate(zip(asked, leases, strict=True))
    for name, request, answer in zip(names, asked, answers, strict=True):
        stack = stack_of(kinds[name].get("layer_replication") if name else None, LAYERS)
        text = [*request.prompt, *answer.tokens]
        expected = reference_logits(reference(base, name and adapters[name], stack, quantization), text)
        assert expected.shape[1] == tokens[name]
        assert list(answer.tokens) == expected[len(request.prompt) - 1 : -1].argmax(-1).tolist(), name
        lease = engine.adapters.lease([] if name is None else [(name, 1.0)])
        got = engine.logits(text, lease)
        lease.release()
        torch.testing.assert_close(got, expected, atol=tolerance, rtol=0, msg=lambda m, name=name: f"{name}: {m}")
        own = expected.log_softmax(-1)[range(len(request.prompt) - 1), request.prompt[1:]]
        assert answer.prompt_logprobs is not None
        assert answer.prompt_logprobs.logprobs == pytest.approx(own.numpy(), abs=10 * tolerance), name
    assert any({*answer.tokens} & {*NEW} for answer in answers)


def test_samplers_see_each_rows_own_vocabulary(engine: Engine, kinds: dict[str, dict[str, Any]]) -> None:
    """All tokens are about as likely, and those of some vocabularies never come in answers of others."""
    sampling = Sampling(temperature=30, top_k=250, min_p=1e-4, repetition_penalty=1.2, frequency_penalty=0.5)
    asked = [
        (name, replace(sampled(seed, prompt_of(FEWER), 24), sampling=replace(sampling, seed=seed), logprobs=3))
        for name in [None, "more", "fewer", "tokens", "LoRA"]
        for seed in range(3)
    ]

    def lease(name: str | None) -> Lease:
        return engine.adapters.lease([] if name is None else [(name, 1.0)])

    together = engine.generate((request, lease(name)) for name, request in asked)
    for (name, request), answer in zip(asked, together, strict=True):
        (alone,) = engine.generate([(request, lease(name))])
        assert alone.tokens == answer.tokens
        assert [one.logprob for one in alone.logprobs] == pytest.approx([one.logprob for one in answer.logprobs])
        assert max(answer.tokens) < (kinds[name].get("tokens", VOCAB) if name else VOCAB)
    assert max(token for answer in together for token in answer.tokens) >= VOCAB
    held = lease("more")
    logits = engine.logits(prompt_of(FEWER), held)[-1]
    held.release()
    first = together[3].logprobs[0]
    assert first.logprob == pytest.approx(float(logits.log_softmax(-1)[first.token]), abs=1e-4)


def test_forms_are_of_each_rows_own_vocabulary(engine: Engine) -> None:
    form = StructuredOutput("regex", "[a-f]{5,9}")
    asked = [replace(sampled(seed, prompt_of(FEWER), 20), structured_output=form) for seed in range(3)]
    names = [None, "more", "LoRA"]
    leases = [engine.adapters.lease([] if name is None else [(name, 1.0)]) for name in names]
    for answer in engine.generate(zip(asked, leases, strict=True)):
        assert re.fullmatch(form.text, answer.text)


def test_new_tokens_of_an_adapters_tokenizer_are_in_prompts_and_end_answers(
    engine: Engine, base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    folder, name = shutil.copytree(adapters["own head"], tmp_path / "chat"), "base_model.model.lm_head.weight"
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens([f"<{token}>" for token in range(len(tokenizer), MORE - 1)])
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})
    tokenizer.save_pretrained(folder)
    # It ends an answer where a token that the tokenizer writes out would come.
    held = engine.adapters.lease([("own head", 1.0)])
    prompt, end = tuple(tokenizer.encode("a<270><279>b<|im_end|>c")), MORE - 1
    assert {VOCAB, end} & {*prompt} == {end}
    likeliest = int(engine.logits(prompt, held)[-1].argmax())
    held.release()
    tensors = load_file(folder / WEIGHTS)
    tensors[name][end] = 2 * tensors[name][likeliest]
    save_file(tensors, folder / WEIGHTS)
    engine.adapters.load("chat", str(folder), trusted=True)
    lease, other = engine.adapters.lease([("chat", 1.0)]), engine.adapters.lease([("plain", 1.0)])
    assert tuple(lease.tokenizer.encode("a<270><279>b<|im_end|>c")) == prompt
    answer, _ = engine.generate([(greedy_to_end(prompt), lease), (greedy_to_end(PROMPT), other)])
    assert (answer.tokens, answer.text, answer.finished.reason) == ((end,), "", FinishReason.END_TOKEN)
    engine.adapters.unload("chat")


def greedy_to_end(prompt: tuple[int, ...]) -> Request:
    return Request(prompt, stopping=Stopping(max_new_tokens=8))


def test_only_rows_that_are_not_the_bases_take_memory(engine: Engine, adapters: dict[str, Path]) -> None:
    held = engine.ledger().adapters
    row = 4 * 64
    assert held["more"] == held["plain"] + 2 * len(NEW) * row
    assert held["fewer"] == held["plain"]
    assert held["as many"] >= held["plain"] + 2 * VOCAB * row
    assert held["tokens"] - held["plain"] <= 2 * 3 * row + 4 * held["plain"] // LAYERS
    assert held["own head"] == held["plain"] + (MORE + len(NEW)) * row


def test_verify_compares_an_adapter_of_more_tokens(base: Path, adapters: dict[str, Path]) -> None:
    flags = ["--base", base, "--adapter", adapters["own head"], "--device=cpu", "--dtype=float32"]
    verified = CliRunner().invoke(verify, [*map(str, flags), "--prompt=abc", "--max-new-tokens=2"])
    assert verified.exit_code == 0, verified.output
    assert "under PEFT" in verified.output
    assert "the same but for rounding" in verified.output


def edited(adapter: Path, folder: Path, drop: str = "", **changes: Any) -> Path:
    """A copy of an adapter without a tensor, and with changes of its config."""
    shutil.copytree(adapter, folder)
    tensors = {name: tensor for name, tensor in load_file(folder / WEIGHTS).items() if name != drop}
    save_file(tensors, folder / WEIGHTS)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    return folder


HEAD_WEIGHT = "base_model.model.lm_head.weight"


@pytest.mark.parametrize(
    ("kind", "changes", "why"),
    [
        ("tokens", {"trainable_token_indices": [5, 5, 11]}, "trainable_token_indices: has a token twice"),
        ("tokens", {"trainable_token_indices": [5, -1, 11]}, "trainable_token_indices: -1 is not a whole number"),
        ("tokens", {"trainable_token_indices": [5, 272, 11]}, "trainable_token_indices: 272 is none of 272 tokens: if"),
        ("tokens", {"trainable_token_indices": {"q_proj": [5]}}, "trainable_token_indices: 'q_proj' is neither head"),
        ("tokens", {"modules_to_save": ["embed_tokens"]}, "trainable_token_indices: names model.embed_tokens, as"),
        ("more", {"modules_to_save": ["norm"]}, "modules_to_save: 'norm' is neither head nor embedding"),
    ],
)
def test_what_is_not_whole_is_refused_by_name(
    kind: str, changes: dict[str, Any], why: str, engine: Engine, adapters: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises((FailedPrecondition, InvalidArgument)) as refused:
        engine.adapters.load("other", str(edited(adapters[kind], tmp_path / "other", **changes)), trusted=True)
    assert str(refused.value).startswith(why)


def test_a_head_without_new_rows_is_refused_unless_it_is_the_embedding(
    engine: Engine, base: Path, kinds: dict[str, dict[str, Any]], adapters: dict[str, Path], tmp_path: Path
) -> None:
    folder = edited(adapters["more"], tmp_path / "other", drop=HEAD_WEIGHT)
    if kinds.keys() == KINDS.keys():
        with pytest.raises(FailedPrecondition, match=rf"^{HEAD_WEIGHT}: is missing in the file, which has 280 tokens"):
            engine.adapters.load("other", str(folder), trusted=True)
        return
    engine.adapters.load("other", str(folder), trusted=True)
    lease, text = engine.adapters.lease([("other", 1.0)]), prompt_of(MORE)
    expected = reference_logits(reference(base, folder, stack_of(None, LAYERS)), text)
    torch.testing.assert_close(engine.logits(text, lease), expected, atol=2e-5, rtol=0)
    lease.release()
    engine.adapters.unload("other")


def test_tokens_beyond_a_requests_vocabulary_and_mixes_of_vocabularies_are_refused(engine: Engine) -> None:
    for name, token in ((None, VOCAB), ("plain", VOCAB), ("more", MORE), ("fewer", FEWER)):
        lease = engine.adapters.lease([] if name is None else [(name, 1.0)])
        with pytest.raises(InvalidArgument, match=rf"^prompt: token {token} is not one of the vocabulary's {token}"):
            engine.submit(greedy((5, token)), lease, lambda event: None)
        lease.release()
    for weights in ([("more", 1.0), ("plain", 1.0)], [("fewer", 0.5)]):
        with pytest.raises(FailedPrecondition, match=r"^adapters: one has a vocabulary of its own"):
            engine.adapters.lease(weights)
