"""The requests of the soak.

Over gRPC they are for one answer each. Over OpenAI's API they are for several, for prompts that come back, forms, and
calls of tools.
"""

from __future__ import annotations

import json
import math
import random
import urllib.error
import urllib.request
from typing import Any

from lorarep.v1 import generation_pb2 as pb

from tests.support.callers import request
from tests.support.servers import SECONDS, Server

COMPACT = {"x-guidance": {"whitespace_flexible": False}}
"""Short answers: random weights like space."""


def kind(dice: random.Random) -> pb.GenerateRequest:
    """A random request whose answer does not depend on other requests."""
    fields: dict[str, Any] = {}
    adapters = dice.choice([(), ("lora",), ("dora",), ("org/plain",), ("lora", "other"), ("deep",)])
    if adapters == ("deep",):
        adapters, fields["stack"] = (), "deep"
    fields["adapters"] = [pb.AdapterRef(name=name, weight=dice.choice([0.5, 1.0])) for name in adapters]
    if dice.random() < 0.5:
        fields["sampling"] = pb.Sampling(temperature=0.9, top_k=40, top_p=0.95, seed=dice.randrange(1 << 30))
    if dice.random() < 0.2:
        fields["logprobs"] = dice.randrange(5)
    text = "".join(dice.choice("abcdefgh ") for _ in range(dice.randrange(1, 40)))
    if adapters == ("dora",) and dice.random() < 0.5:
        fields["prompt"] = pb.Prompt(chat=pb.Chat(messages=[pb.ChatMessage(role="user", content=text)]))
    prompt = dice.choice([text, list(text.encode())])
    return request(prompt, new_tokens=dice.randrange(1, 30), **fields)


def bodies(dice: random.Random, count: int, caller: str) -> list[tuple[str, dict[str, Any]]]:
    """Paths and bodies of requests whose answers do not depend on other requests, of each kind in turn.

    Args:
        caller: a model whose chat template tells tools.
    """
    kinds = (_several, _echo, _scored, _formed, _call)
    return [kinds[i % len(kinds)](dice, caller) for i in range(count)]


def answer_to(server: Server, path: str, body: dict[str, Any]) -> tuple[int, Any]:
    """The status, and what has to be the same each time: the choices without ids, or the message of the error."""
    url = f"http://127.0.0.1:{server.openai_port}/v1/{path}"
    asked = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(asked, timeout=SECONDS) as response:
            told = json.loads(response.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())["error"]["message"]
    for choice in told["choices"]:
        for call in choice.get("message", {}).get("tool_calls", ()):
            del call["id"]
    return 200, [told["choices"], told.get("prompt_logprobs")]


def are_same(one: Any, other: Any) -> bool:
    """Whether two answers are the same, with log-probabilities up to rounding."""
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, abs_tol=1e-3)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(are_same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(are_same, one, other))
    return bool(one == other)


def _completion(dice: random.Random, **fields: Any) -> tuple[str, dict[str, Any]]:
    text = "".join(dice.choice("abcdefgh ") for _ in range(dice.randrange(2, 40)))
    asked = dict(model=dice.choice(["base", "lora", "deep"]), prompt=text, max_tokens=dice.randrange(1, 16))
    return "completions", asked | dict(seed=dice.randrange(1 << 30)) | fields


def _several(dice: random.Random, caller: str) -> tuple[str, dict[str, Any]]:
    return _completion(dice, n=dice.randrange(2, 4), best_of=4)


def _echo(dice: random.Random, caller: str) -> tuple[str, dict[str, Any]]:
    return _completion(dice, echo=True, logprobs=dice.randrange(4), max_tokens=dice.randrange(4))


def _scored(dice: random.Random, caller: str) -> tuple[str, dict[str, Any]]:
    return _completion(dice, prompt_logprobs=dice.randrange(3), temperature=0)


def _formed(dice: random.Random, caller: str) -> tuple[str, dict[str, Any]]:
    return _completion(dice, guided_json=_schema(dice), max_tokens=100)


def _call(dice: random.Random, caller: str) -> tuple[str, dict[str, Any]]:
    function = {"name": "weather", "parameters": _schema(dice)}
    asked = dict(model=caller, messages=[{"role": "user", "content": dice.choice("abc")}], max_tokens=150)
    asked |= dict(tools=[{"type": "function", "function": function}], tool_choice="required")
    return "chat/completions", asked | dict(parallel_tool_calls=False, seed=dice.randrange(1 << 30))


def _schema(dice: random.Random) -> dict[str, Any]:
    properties = {"days": {"enum": list(range(dice.randrange(1, 9)))}, "city": {"enum": ["Rome", "Oslo"]}}
    given: dict[str, Any] = {"type": "object", "properties": properties, "required": list(properties)}
    return given | {"additionalProperties": False} | COMPACT
