"""Answers with a form and without, on the CPU: the time for a token, for a mask and to compile.

    python -m benchmarks.cpu.forms [--hidden-size 256] [--new-tokens 64] [--repeats 5]

The vocabulary has 32,000 tokens, random words of its letters. All rows answer at once, drawn from random weights. In
each round the free answers and those of each form take turns. Forms have no end, so that all answers are of one length.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import string
import tempfile
import time
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lorarep_runtime.config import BaseConfig, EngineConfig, SchedulerConfig
from lorarep_runtime.engine.engine import Engine
from lorarep_runtime.request import Request, Sampling, Stopping, StructuredOutput
from lorarep_runtime.text import lark
from tests.support.models import save_base

VOCAB = 32_000
PROMPT_TOKENS = 32
LETTERS = "etaoinshrdlu"
SCHEMA = {
    "type": "array",
    "minItems": 1000,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "minLength": 8},
            "kind": {"enum": ["city", "river", "lake"]},
            "size": {"type": "integer", "minimum": 0, "maximum": 100_000},
            "open": {"type": "boolean"},
        },
        "required": ["name", "kind", "size"],
        "additionalProperties": False,
    },
}
FORMS: dict[str, StructuredOutput | None] = {
    "none": None,
    "regular expression": StructuredOutput("regex", "([a-z]+ [0-9]{1,3}, ){1000,}"),
    "JSON by a schema": StructuredOutput("json_schema", json.dumps(SCHEMA)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        engine = engine_of(Path(folder), options.hidden_size)
        for form in FORMS.values():
            if form is not None:
                print_parts(engine, form)
        for rows in (1, 8):
            compare(engine, rows, options.new_tokens, options.repeats)


def engine_of(folder: Path, hidden: int) -> Engine:
    base = save_base(
        "llama",
        folder,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4 // 64 * 64,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=hidden // 8,
        vocab_size=VOCAB,
    )
    save_words(base)
    config = SchedulerConfig(kv_bytes=256 << 20, prefix_cache=False)
    return Engine(EngineConfig(BaseConfig(str(base), dtype="float32", device="cpu"), scheduler=config))


def save_words(folder: Path) -> None:
    """A byte-level tokenizer with random words, as a trained one has: some begin with a space or end with a sign."""
    draw = random.Random(0)
    pieces = dict.fromkeys(sorted(pre_tokenizers.ByteLevel.alphabet()))
    while len(pieces) < VOCAB - 3:
        word = "".join(draw.choices(LETTERS, weights=range(12, 0, -1), k=draw.randint(2, 8)))
        end = draw.choice(string.punctuation) if draw.random() < 0.2 else ""
        pieces[draw.choice(["", "Ġ"]) + word + end] = None
    vocab = {piece: i for i, piece in enumerate([*list(pieces)[:256], "<pad>", "<s>", "</s>", *list(pieces)[256:]])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


def print_parts(engine: Engine, form: StructuredOutput) -> None:
    """Prints the times to compile a form, for the first time and again, and to make a mask."""
    given = engine.base.tokenizer, engine.base.vocab_size, [258]
    engine._grammars.compile(StructuredOutput("regex", "a"), *given)  # makes the vocabulary
    lark._known.clear()
    times = []
    for _ in range(2):
        began = time.perf_counter()
        grammar = engine._grammars.compile(form, *given)
        times.append(1e3 * (time.perf_counter() - began))
    draw, masks = random.Random(1), []
    for _ in range(200):
        began = time.perf_counter()
        mask = grammar.mask()
        masks.append(1e6 * (time.perf_counter() - began))
        words = mask.numpy().view("uint8")
        may_come = [i for i in range(VOCAB) if words[i // 8] >> (i % 8) & 1]
        grammar.advance(draw.choice(may_come))
    print(f"{form.kind}: {times[0]:.1f} ms to check and compile, {times[1]:.1f} ms again")
    print(f"{form.kind}: a mask {statistics.median(masks):.0f} µs, at most {max(masks):.0f}")


def compare(engine: Engine, rows: int, new_tokens: int, repeats: int) -> None:
    """Prints the milliseconds for a token of each row, without a form and with each."""
    found: dict[str, list[float]] = {name: [] for name in FORMS}
    for repeat in range(repeats + 1):
        for name, form in FORMS.items():
            asked = [request(form, new_tokens, seed) for seed in range(rows)]
            began = time.perf_counter()
            answers = engine.generate((each, engine.adapters.lease([])) for each in asked)
            seconds = time.perf_counter() - began
            assert all(len(answer.tokens) == new_tokens for answer in answers), name
            if repeat:  # the first round is warm-up
                found[name].append(1e3 * seconds / new_tokens)
    free = statistics.median(found["none"])
    for name, times in found.items():
        median, least, most = statistics.median(times), min(times), max(times)
        print(f"{rows} rows, {name}: {median:.2f} ms a token ({least:.2f} to {most:.2f}), {median / free:.2f} times")


def request(form: StructuredOutput | None, new_tokens: int, seed: int) -> Request:
    """A request of exactly so many tokens."""
    prompt = tuple((97 * seed + 31 * i * i) % VOCAB for i in range(PROMPT_TOKENS))
    stopping = Stopping(max_new_tokens=new_tokens, ignore_eos=form is None)
    return Request(prompt, Sampling(temperature=1.0, seed=seed), stopping, structured_output=form)


if __name__ == "__main__":
    main()
