"""Two replicas on a Ray cluster: they answer as a server does, each for its adapters, and are replaced if they end."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import openai
import psutil
import pytest
from transformers import AutoTokenizer

from tests.support.models import reference, reference_logits, stack_of
from tests.support.servers import SECONDS, wait_for
from tests.support.world import ADAPTERS, World, published

NAMES = ("lora", "org/dora")
"""An adapter that the server has from its start, and one that requests bring."""
Ask = Callable[[str], tuple[str, str]]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with published(tmp_path_factory.mktemp("world")) as world:
        yield world


@pytest.fixture(scope="module")
def client(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    arguments = [*world.flags(), "--allow-repository=org/*", "--adapter=lora=org/lora"]
    folder = tmp_path_factory.mktemp("ray")
    command = [sys.executable, "-m", "tests.support.ray_cluster", str(folder), port, json.dumps(arguments)]
    env = {**os.environ, **world.env, "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    root = Path(__file__).parents[2]
    with (
        (folder / "log").open("w") as log,
        subprocess.Popen(command, env=env, cwd=root, stderr=log, **pipes) as cluster,
    ):
        assert cluster.stdin is not None
        assert cluster.stdout is not None
        if "ready\n" not in iter(cluster.stdout.readline, ""):
            pytest.fail((folder / "log").read_text())
        yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=SECONDS)
        cluster.stdin.close()
        assert cluster.wait(SECONDS) == 0


@pytest.fixture(scope="module")
def ask(client: openai.OpenAI) -> Ask:
    def ask(model: str) -> tuple[str, str]:
        """The replica that answers, and the answer."""
        create = client.completions.with_raw_response.create
        answer = create(model=model, prompt="Hello", max_tokens=8, temperature=0)
        return answer.headers["x-replica"], answer.parse().choices[0].text

    return ask


def test_each_adapter_has_a_replica_whose_answers_are_those_of_peft(ask: Ask, world: World) -> None:
    homes = {}
    tokenizer = AutoTokenizer.from_pretrained(world.base)
    prompt = tokenizer("Hello")["input_ids"]
    for name in NAMES:
        homes[name], text = ask(name)
        short = name.removeprefix("org/")
        model = reference(world.base, world.adapters[short], stack_of(ADAPTERS[short]["layer_replication"]))
        tokens = list(prompt)
        for _ in range(8):
            tokens.append(int(reference_logits(model, tokens)[-1].argmax()))
        assert text == tokenizer.decode(tokens[len(prompt) :])
        time.sleep(3)  # replicas tell Ray of their adapters ten times a second
    assert len(set(homes.values())) == 2  # the second went where there was none yet
    for _ in range(8):
        assert {name: ask(name)[0] for name in NAMES} == homes


def test_a_caller_that_leaves_ends_its_request(client: openai.OpenAI, world: World) -> None:
    world.failpoints.set("step", "sleep 0.2")  # without an end from outside it would take minutes
    try:
        stream = client.completions.create(
            model="lora", prompt="x", max_tokens=500, stream=True, extra_body=dict(ignore_eos=True)
        )
        next(iter(stream))
        assert running(client, "lora") == 1
        stream.close()
        wait_for(lambda: not running(client, "lora"), "the request to end", 60)
    finally:
        world.failpoints.unset("step")


def running(client: openai.OpenAI, adapter: str) -> int:
    """The requests of an adapter's replica: the router looks for `model` in every body."""
    url, body = str(client.base_url.copy_with(path="/status")), json.dumps({"model": adapter}).encode()
    with urllib.request.urlopen(urllib.request.Request(url, body, method="GET"), timeout=SECONDS) as response:
        return json.load(response)["stats"]["running"]


def test_a_replica_whose_server_is_killed_is_replaced(ask: Ask, world: World) -> None:
    before = {ask(name)[0] for name in NAMES}
    server, other = (
        process
        for process in psutil.process_iter(["cmdline"])
        if f"--cache-dir={world.cache}" in (process.info["cmdline"] or ()) and "serve" in process.info["cmdline"]
    )
    server.kill()
    statuses: set[int] = set()

    def answers_from_a_new_one() -> bool:
        try:
            return ask("base")[0] not in before
        except openai.InternalServerError as error:  # it was asked in the moment in which it ended
            statuses.add(error.status_code)
            return False

    wait_for(answers_from_a_new_one, "a third replica to answer")
    assert statuses <= {503}
    assert other.is_running()
    for name in NAMES:
        ask(name)
