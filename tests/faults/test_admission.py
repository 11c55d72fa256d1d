"""Callers whose requests take long to be admitted, and who leave meanwhile."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import grpc
import pytest
from fmaas import generation_pb2 as fmaas_pb2
from lorarep.v1 import generation_pb2
from lorarep_server.requests.workers import ADMISSION_THREADS

from tests.support.callers import Bystander, refused, request
from tests.support.failpoints import Failpoints
from tests.support.servers import SECONDS, Server, serving, wait_for
from tests.support.world import World

WANTED = request("x")


@pytest.fixture
def own(tmp_path: Path) -> Failpoints:
    return Failpoints(tmp_path / "failpoints")


def code(server: Server, seconds: float) -> str:
    """The status code of a call."""
    try:
        server.generation.Generate(WANTED, timeout=seconds)
    except grpc.RpcError as error:
        return str(error.code().name)
    return "OK"


def test_callers_that_leave_stay_calls_under_way_until_their_work_ends(world: World, own: Failpoints) -> None:
    """`max_calls` bounds what the server still does for callers that have left. No token is computed for them."""
    flags = [*world.flags(), f"--max-calls={ADMISSION_THREADS}", "--grace-seconds=1"]
    with serving(flags, {**world.env, **own.env}) as server:
        server.wait_ready()
        own.set("admission", "hold")
        calls = [server.generation.Generate.future(WANTED) for _ in range(ADMISSION_THREADS)]
        wait_for(lambda: code(server, 1) == "RESOURCE_EXHAUSTED", "the calls to be under way")
        for call in calls:
            call.cancel()
        until = time.monotonic() + 2
        while time.monotonic() < until:
            assert code(server, 1) == "RESOURCE_EXHAUSTED"
        own.set("step", "hold")
        own.unset("admission")
        wait_for(lambda: sum(" CANCELLED " in line for line in server.log) == ADMISSION_THREADS, "their work to end")
        own.unset("step")
        server.wait_idle()
        assert server.metrics()["lorarep_completion_tokens_total"] == 0
        wait_for(lambda: code(server, SECONDS) == "OK", "an answer")
        server.wait_idle()
        assert server.metrics()["lorarep_requests_finished_total{reason=resource_exhausted}"] > 1


def test_a_server_ends_in_time_whatever_its_threads_do(world: World, own: Failpoints) -> None:
    with serving([*world.flags(), "--grace-seconds=1"], {**world.env, **own.env}) as server:
        server.wait_ready()
        own.set("admission", "hold")
        calls = [server.generation.Generate.future(WANTED) for _ in range(40)]
        own.wait_reached("admission")
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0
        for call in calls:
            refused(call.result, "UNAVAILABLE")


def test_a_prompt_too_long_by_arithmetic_is_refused_before_it_is_tokenized(
    server: Server, bystander: Bystander
) -> None:
    """The vocabulary's longest token has five characters, and a prompt 512 tokens."""
    text = "x" * (5 * 512 + 1)
    chat = generation_pb2.Prompt(
        chat=generation_pb2.Chat(messages=[generation_pb2.ChatMessage(role="user", content=text)])
    )
    prompts = {
        "prompt: ": generation_pb2.Prompt(text=text),
        "prompt.chat: ": chat,
        "prompt: 513": generation_pb2.Prompt(token_ids=generation_pb2.TokenIds(ids=[5] * 513)),
    }
    for named, prompt in prompts.items():
        refused(lambda p=prompt: server.generation.Generate(request("", "dora", prompt=p)), "INVALID_ARGUMENT", named)
        tokenize = generation_pb2.TokenizeRequest(prompt=prompt, adapters=[generation_pb2.AdapterRef(name="dora")])
        refused(lambda t=tokenize: server.generation.Tokenize(t), "INVALID_ARGUMENT", named)
    batch = fmaas_pb2.BatchedTokenizeRequest(requests=[fmaas_pb2.TokenizeRequest(text=text)])
    refused(lambda: server.fmaas.Tokenize(batch), "INVALID_ARGUMENT", "text: ")
    short = generation_pb2.TokenizeRequest(prompt=generation_pb2.Prompt(text=text[1:]))
    assert len(server.generation.Tokenize(short).token_ids) == len(text) - 1
