"""Answers of a form: each has it, each token is the likeliest of those that may come, and nobody waits for masks."""

from __future__ import annotations

import json
import random
import re
import threading
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

from lorarep_runtime.engine import masks
from lorarep_runtime.engine.engine import Engine
from lorarep_runtime.errors import InvalidArgument
from lorarep_runtime.request import FinishReason, Request, Sampling, Stopping, StructuredOutput
from lorarep_runtime.text import grammar
from lorarep_runtime.text.grammar import Grammar
from tests.support.decoders import with_decoder
from tests.support.engines import PROMPT, assert_nothing_held, engine_for, greedy
from tests.support.models import save_adapter, save_base

END = 258
PAGE = 2 * 16 * 2 * 16 * 4
"""Bytes of a page of one position."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base("qwen2", tmp_path_factory.mktemp("structured") / "base")


@pytest.fixture(scope="module")
def adapters(base: Path) -> dict[str, Path]:
    maps = {"deep": [[0, 4], [2, 5]], "shallow": [[1, 5]]}
    return {
        name: save_adapter(base, base.parent / name, r=4, target_modules=["q_proj"], layer_replication=ranges)
        for name, ranges in maps.items()
    }


def asked(form: StructuredOutput | None, new_tokens: int = 200, seed: int = 0, **stopping: Any) -> Request:
    sampling = Sampling(temperature=1.0, seed=seed)
    return Request(PROMPT, sampling, Stopping(max_new_tokens=new_tokens, **stopping), structured_output=form)


def of(engine: Engine, name: str | None = None) -> Any:
    return engine.adapters.lease([(name, 1.0)] if name else [])


def random_schema(draw: random.Random, depth: int = 2) -> dict[str, Any]:
    kinds = ["integer", "number", "boolean", "null", "string", "enum", "pattern", "format"]
    match draw.choice(kinds + 2 * ["object", "array", "anyOf"] if depth else kinds):
        case "integer":
            low = draw.randint(-50, 50)
            return {"type": "integer", "minimum": low, "maximum": low + draw.randint(0, 1000)}
        case "number":
            return {"type": "number", "minimum": 0, "exclusiveMaximum": draw.randint(1, 9)}
        case "string":
            return {"type": "string", "minLength": draw.randint(0, 2), "maxLength": draw.randint(2, 6)}
        case "enum":
            return {"enum": draw.sample([1, "a", None, 'ß"\\', True, [2], {"x": 1.5}], draw.randint(1, 4))}
        case "pattern":
            return {"type": "string", "pattern": draw.choice(["^[a-c]{1,4}$", "^(x|yz)+1$", "^\\d{2}-\\w{0,3}$"])}
        case "format":
            return {"type": "string", "format": draw.choice(["date", "ipv4", "uuid"])}
        case "object":
            names = draw.sample("abcdef", draw.randint(0, 3))
            properties = {name: random_schema(draw, depth - 1) for name in names}
            required = [name for name in names if draw.random() < 0.6]
            return dict(type="object", properties=properties, required=required, additionalProperties=False)
        case "array":
            return {"type": "array", "items": random_schema(draw, depth - 1), "maxItems": draw.randint(0, 3)}
        case "anyOf":
            return {"anyOf": [random_schema(draw, depth - 1) for _ in range(2)]}
        case kind:
            return {"type": kind}


def test_all_answers_to_two_hundred_schemas_are_valid(base: Path, adapters: dict[str, Path]) -> None:
    """In one batch, with free answers among them, at three depths."""
    engine = engine_for(base, adapters=adapters, max_sequences=240, max_queued=400)
    draw = random.Random(5)
    schemas = [random_schema(draw) for _ in range(200)]
    forms = [
        StructuredOutput("json_schema", json.dumps({**s, "x-guidance": {"whitespace_flexible": False}}))
        for s in schemas
    ]
    names = [None, *adapters]
    free = [(asked(None, 30, seed), of(engine, names[seed % 3])) for seed in range(9)]
    alone = engine.generate([(asked(None, 30, seed), of(engine, names[seed % 3])) for seed in range(9)])
    answers = engine.generate(
        [(asked(form, 250, seed), of(engine, names[seed % 3])) for seed, form in enumerate(forms)] + free
    )
    ended = 0
    for schema, answer in zip(schemas, answers[:200], strict=True):
        if answer.finished.reason is FinishReason.END_TOKEN:
            ended += 1
            jsonschema.validate(json.loads(answer.text), schema, format_checker=jsonschema.FormatChecker())
        else:
            assert (answer.finished.reason, len(answer.tokens)) == (FinishReason.LENGTH, 250)
    assert ended > 190
    assert [a.tokens for a in answers[200:]] == [a.tokens for a in alone]
    assert_nothing_held(engine)


CHOICES = ("yes", "no", "none", "yes, and ß", '"\\')


@pytest.mark.parametrize("ahead", [False, True], ids=["passes", "steps ahead"])
def test_each_token_is_the_likeliest_that_may_come(base: Path, ahead: bool) -> None:
    engine = engine_for(base)
    if ahead:
        with_decoder(engine)
    ids = {choice: engine.base.tokenizer.encode(choice) for choice in CHOICES}  # one token a byte
    request = Request(
        PROMPT,
        stopping=Stopping(max_new_tokens=30),
        logprobs=2,
        structured_output=StructuredOutput("choice", choices=CHOICES),
    )
    (answer,) = engine.generate([(request, of(engine))])
    expected: list[int] = []
    with torch.inference_mode():
        while not expected or expected[-1] != END:
            lease = of(engine)
            logits = engine.logits([*PROMPT, *expected], lease)[-1]
            lease.release()
            may_come = {
                END if len(each) == len(expected) else each[len(expected)]
                for each in ids.values()
                if each[: len(expected)] == expected
            }
            expected.append(max(may_come, key=lambda token: float(logits[token])))
            place = answer.logprobs[len(expected) - 1]
            assert place.logprob == pytest.approx(float(logits.log_softmax(-1)[expected[-1]]), abs=1e-4)
            assert place.top[0][0] == int(logits.argmax())  # before the mask
    assert list(answer.tokens) == expected
    assert answer.text in CHOICES


FORMS = [
    StructuredOutput("regex", "[0-9]{30}-[a-z]{20,40}"),
    StructuredOutput("grammar", 'root ::= "[" ("a" | "bb")* "]"'),
    StructuredOutput("grammar", 'start: "<" /[a-z]{25}/ (">" | "/>")'),
]
MATCHES = [r"[0-9]{30}-[a-z]{20,40}", r"\[(a|bb)*\]", r"<[a-z]{25}/?>"]


@pytest.mark.parametrize("scheduler", [dict(), dict(kv_bytes=60 * PAGE, max_sequences=5)], ids=["", "few pages"])
def test_steps_ahead_and_preempted_answers_give_the_same_tokens(
    base: Path, adapters: dict[str, Path], scheduler: dict[str, Any]
) -> None:
    one_by_one, ahead = (engine_for(base, adapters=adapters, **scheduler) for _ in range(2))
    decoder = with_decoder(ahead)
    requests = [(asked(FORMS[i % 3], 90, i), [None, *adapters][i % 2]) for i in range(6)]
    requests.append((greedy(new_tokens=60), None))
    answers = [engine.generate((r, of(engine, name)) for r, name in requests) for engine in (one_by_one, ahead)]
    assert [a.tokens for a in answers[1]] == [a.tokens for a in answers[0]]
    for i, answer in enumerate(answers[0][:6]):
        if answer.finished.reason is FinishReason.END_TOKEN:
            assert re.fullmatch(MATCHES[i % 3], answer.text)
    assert decoder.steps > decoder.told + 10  # rows with forms go on without being set anew
    assert (ahead.stats().preemptions > 0) == ("kv_bytes" in scheduler)
    for engine in (one_by_one, ahead):
        assert_nothing_held(engine)


@pytest.mark.parametrize("ahead", [False, True], ids=["passes", "steps ahead"])
def test_nobody_waits_for_a_mask_that_does_not_come(base: Path, monkeypatch: pytest.MonkeyPatch, ahead: bool) -> None:
    engine = engine_for(base)
    if ahead:
        with_decoder(engine)
    request, others = asked(FORMS[0], 80), [greedy(new_tokens=20), asked(FORMS[2], 80, 1)]
    expected = engine.generate([(request, of(engine)), *((other, of(engine)) for other in others)])
    comes, make = threading.Event(), Grammar.mask

    def late(self: Grammar, without: Any = ()) -> torch.Tensor:
        if self._form is FORMS[0] and threading.current_thread().name.startswith("lorarep-mask"):
            comes.wait()
        return make(self, without)

    monkeypatch.setattr(Grammar, "mask", late)
    monkeypatch.setattr(masks, "PATIENCE", 0.001)
    left = [len(expected[1].tokens) + 1, len(expected[2].tokens) + 1]
    got: list[list[Any]] = [[], [], []]

    def put(number: int, event: Any) -> None:
        got[number].append(event)
        if number:
            left[number - 1] -= 1
        if left == [0, 0]:
            comes.set()

    for number, each in enumerate([request, *others]):
        engine.submit(each, of(engine), lambda event, number=number: put(number, event))
    while engine.loop.is_busy:
        engine.loop.step_or_wait()
    assert comes.is_set()
    for events, answer in zip(got, expected, strict=True):
        assert tuple(token for event in events[:-1] for token in event.tokens) == answer.tokens
    assert_nothing_held(engine)


def test_the_fewest_tokens_hold_as_long_as_the_form_lets_others_come(base: Path) -> None:
    engine = engine_for(base)
    letters = StructuredOutput("regex", "[a-z]*")
    long, short = engine.generate(
        [
            (asked(letters, 30, min_new_tokens=25), of(engine)),
            (asked(StructuredOutput("choice", choices=("ab",)), 30, min_new_tokens=25), of(engine)),
        ]
    )
    assert re.fullmatch("[a-z]{25,30}", long.text)
    assert (short.text, short.finished.reason) == ("ab", FinishReason.END_TOKEN)


HOSTILE = "start: A\nA: " + " & ".join(f"/(.*a.{{{i}}})/" for i in range(2, 200))
"""Takes minutes to compile."""


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (asked(StructuredOutput("regex", "(?=a)b")), "structured_output.regex"),
        (asked(StructuredOutput("regex", "(")), "structured_output.regex"),
        (asked(StructuredOutput("json_schema", "{")), "structured_output.json_schema"),
        (asked(StructuredOutput("json_schema", "[" * 50_000)), "structured_output.json_schema"),
        (asked(StructuredOutput("json_schema", '{"type": "nothing"}')), "structured_output.json_schema"),
        (asked(StructuredOutput("json_schema", '{"not": {}}')), "structured_output.json_schema"),
        (asked(StructuredOutput("json_schema", '{"$ref": "http://127.0.0.1/x"}')), "structured_output.json_schema"),
        (asked(StructuredOutput("json_schema", "false")), "structured_output.json_schema"),
        (asked(StructuredOutput("grammar", "root ::= x")), "structured_output.grammar"),
        (asked(StructuredOutput("grammar", "root ::= a" + "\n" * 60_000)), "structured_output.grammar"),
        (asked(StructuredOutput("grammar", HOSTILE)), "structured_output.grammar"),
        (asked(StructuredOutput("grammar", "x" * 70_000)), "structured_output.grammar"),
        (asked(StructuredOutput("choice")), "structured_output.choice"),
        (asked(StructuredOutput("choice", choices=("a",) * 2000)), "structured_output.choice"),
        (asked(StructuredOutput("regex", "a"), ignore_eos=True), "ignore_eos"),
    ],
    ids=lambda each: "" if isinstance(each, Request) else each,
)
def test_what_cannot_be_compiled_is_refused_by_name(base: Path, request_: Request, field: str) -> None:
    engine = engine_for(base)
    lease = of(engine)
    with pytest.raises(InvalidArgument) as error:
        engine.submit(request_, lease, print)
    assert error.value.field == field
    lease.release()


def test_a_form_that_takes_too_long_for_its_tokens_ends_alone(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_for(base)
    free = engine.generate([(greedy(new_tokens=20), of(engine))])[0].tokens
    monkeypatch.setattr(grammar, "TOKEN_SECONDS", -1.0)
    events: list[Any] = []
    engine.submit(asked(FORMS[0]), of(engine), events.append)
    assert engine.generate([(greedy(new_tokens=20), of(engine))])[0].tokens == free
    assert isinstance(events[-1], InvalidArgument)
    assert (len(events), events[-1].field) == (2, "structured_output.regex")
    assert_nothing_held(engine)
