"""Clients in another language, from the public messages or reflection alone; OpenAI's own is in test_openai."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import fmaas

from tests.support.callers import request
from tests.support.servers import SECONDS, Server

CLIENTS = Path(__file__).parents[1] / "clients"
NODE = Path(sys.executable).with_name("node")
PROMPT = "The capital of France"
ADAPTERS = ("lora", "dora")
"""Adapters of different stacks."""


def streamed(client: str, *arguments: str) -> dict[str, list[Any]]:
    """The messages of each stream, by adapter."""
    command = [NODE, CLIENTS / client, *arguments, *ADAPTERS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def texts(server: Server) -> dict[str, str]:
    found = {name: server.generation.Generate(request(PROMPT, name, new_tokens=40)).text for name in ADAPTERS}
    assert len(set(found.values())) == len(ADAPTERS)
    return found


def test_a_client_of_the_public_messages_streams_from_different_stacks(server: Server) -> None:
    proto = Path(fmaas.__path__[0]) / "generation.proto"
    answers = streamed("fmaas.js", server.address, str(proto))
    assert {name: "".join(part["text"] for part in parts) for name, parts in answers.items()} == texts(server)
    for first, *_, last in answers.values():
        assert first["input_token_count"] == len(PROMPT)
        assert (last["generated_token_count"], last["stop_reason"]) == (40, "MAX_TOKENS")


def test_a_client_that_knows_reflection_alone_streams_from_different_stacks(server: Server) -> None:
    answers = streamed("reflection.js", server.address)
    for first, *_, last in answers.values():
        assert first["started"]["prompt_tokens"] == len(PROMPT)
        assert last["finished"]["finish_reason"] == "FINISH_REASON_LENGTH"
    chunks = {name: [part["chunk"] for part in parts[1:-1]] for name, parts in answers.items()}
    assert {name: "".join(chunk.get("text", "") for chunk in parts) for name, parts in chunks.items()} == texts(server)
    assert all(sum(len(chunk["token_ids"]) for chunk in parts) == 40 for parts in chunks.values())
