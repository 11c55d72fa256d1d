"""Requests that were answered unlike what is promised."""

from __future__ import annotations

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from lorarep.v1 import generation_pb2 as pb

from benchmarks.cpu.hostile.attack import Attack, Outcome, Target, code, post, publish_adapter
from tests.support.callers import adapters, load, request
from tests.support.world import World

ANSWERS = 16
NAMED = 20
"""More adapters than one request may name."""


def strike_rounding(target: Target) -> Outcome:
    wanted = [request(f"{i} is a number", new_tokens=128) for i in range(ANSWERS)]
    ask = partial(target.server.generation.Generate, timeout=target.seconds)
    alone = [list(ask(each).token_ids) for each in wanted]
    with ThreadPoolExecutor(ANSWERS) as threads:
        together = [list(answer.token_ids) for answer in threads.map(ask, wanted)]
    differ = sum(a != b for a, b in zip(alone, together, strict=True))
    return Outcome(f"{differ} of {ANSWERS} differ", True)


def strike_weight(target: Target) -> Outcome:
    wanted = request("abc", adapters=[pb.AdapterRef(name="dora", weight=1e39)], new_tokens=2, logprobs=1)
    answers: list[pb.GenerateResponse] = []
    ended = code(lambda: answers.append(target.server.generation.Generate(wanted, timeout=target.seconds)))
    if answers and any(math.isnan(logprob.logprob) for logprob in answers[0].logprobs):
        ended = "OK, the log-probabilities are NaN"
    return Outcome(ended, ended == "INVALID_ARGUMENT")


def publish_many(world: World, folder: Path) -> None:
    for i in range(NAMED):
        publish_adapter(world, folder, f"org/many{i}")


def strike_refused(target: Target) -> Outcome:
    names = [f"org/many{i}" for i in range(NAMED)]
    ended = code(lambda: target.server.generation.Generate(request("abc", *names), timeout=target.seconds))
    loaded = len(set(names) & set(adapters(target.server)))
    return Outcome(f"{ended}, {loaded} adapters loaded", (ended, loaded) == ("INVALID_ARGUMENT", 0))


def strike_pin(target: Target) -> Outcome:
    name, failpoints = "org/pinned", target.world.failpoints
    failpoints.set("load-check", "hold")
    administrator = threading.Thread(target=lambda: load(target.server, name, name, pinned=True, priority=7))
    administrator.start()
    failpoints.wait_reached("load-check")
    call = target.server.generation.Generate.future(request("abc", name), timeout=target.seconds)
    failpoints.unset("load-check")
    code(call.result)
    administrator.join()
    found = adapters(target.server)[name]
    return Outcome(f"pinned: {found.pinned}, priority: {found.priority}", (found.pinned, found.priority) == (True, 7))


def strike_clients(target: Target) -> Outcome:
    asked = {"role": "user", "content": "hi"}
    called = {"role": "assistant", "content": None, "tool_calls": [], "annotations": [], "refusal": None}
    answered = {"role": "assistant", "content": "ho", "tool_calls": [], "annotations": [], "refusal": None}
    chat = {"model": "dora", "max_tokens": 2}
    completion = {"model": "base", "max_tokens": 2}
    bodies = {
        "an answer of the client's own history": {**chat, "messages": [asked, answered, asked]},
        "an assistant's message without content": {**chat, "messages": [asked, called, asked]},
        "a message's name": {**chat, "messages": [{**asked, "name": "ann"}]},
        "chat_template_kwargs": {**chat, "messages": [asked], "chat_template_kwargs": {"enable_thinking": False}},
        "a list of prompts": {**completion, "prompt": ["a", "b"]},
        "seed: -1": {**completion, "prompt": "a", "seed": -1},
    }
    paths = ["/v1/chat/completions" if "messages" in body else "/v1/completions" for body in bodies.values()]
    statuses = [post(target, path, body)[0] for path, body in zip(paths, bodies.values(), strict=True)]
    taken = statuses.count(200)
    missing = [name for name, status in zip(bodies, statuses, strict=True) if status != 200]
    return Outcome(
        f"{taken} of {len(bodies)} answered" + (f"; not: {', '.join(missing)}" if missing else ""), not missing
    )


ATTACKS = [
    Attack(
        "B2",
        f"{ANSWERS} answers in bf16, one after the other and in one batch; rounding is no fault any more",
        strike_rounding,
        flags=("--dtype=bfloat16",),
        exact=False,
    ),
    Attack("B3", "a weight of 1e39 in a mix", strike_weight, alone=False),
    Attack("B4", f"a request with {NAMED} names, of which 16 are permitted", strike_refused, publish_many, alone=False),
    Attack(
        "B5",
        "a request for an adapter that an administrator is loading pinned",
        strike_pin,
        lambda world, folder: publish_adapter(world, folder, "org/pinned"),
        failpoints=True,
        alone=False,
    ),
    Attack("B7", "six bodies that OpenAI's and other clients send", strike_clients, alone=False),
]
