"""A server of two ranks: what fails on one of them, and its end with the other."""

from __future__ import annotations

import json
import re

import grpc
import psutil
import pytest
from lorarep.v1 import generation_pb2 as pb

from tests.support.callers import refused, request, stream
from tests.support.servers import Server, serving
from tests.support.world import World

FLAGS = ["--tensor-parallel=2", "--adapter=dora=org/dora", "--allow-repository=org/*"]
FORMS = (
    pb.StructuredOutput(regex="[a-d]{12}"),
    pb.StructuredOutput(json_schema='{"type": "array", "items": {"enum": [1, "x"]}, "minItems": 3, "maxItems": 3}'),
)
LONG = request("x", "dora", new_tokens=100)


def other_rank(server: Server) -> psutil.Process:
    """The process of rank 1."""
    children = psutil.Process(server.process.pid).children()
    (rank,) = [process for process in children if "engine.follower" in " ".join(process.cmdline())]
    return rank


def test_two_ranks_answer_as_one_in_forms_too_fail_a_load_together_and_end_with_a_rank_that_is_killed(
    world: World, server: Server
) -> None:
    with world.slow_steps(), serving([*world.flags(), *FLAGS], world.env) as two:
        two.wait_ready()
        wanted = [request("x", "dora", new_tokens=30), request("y", new_tokens=30)]
        assert [two.generation.Generate(one).token_ids for one in wanted] == [
            server.generation.Generate(one).token_ids for one in wanted
        ]
        stopping, sampling = pb.Stopping(max_new_tokens=200), pb.Sampling(temperature=1, seed=3)
        formed = [request("x", "dora", stopping=stopping, sampling=sampling, structured_output=form) for form in FORMS]
        # Together, and with one that has no form: only some rows of a step have masks.
        calls = [two.generation.Generate.future(one) for one in (*formed, wanted[0])]
        letters, array, free = (call.result() for call in calls)
        assert re.fullmatch("[a-d]{12}", letters.text)
        assert [item in (1, "x") for item in json.loads(array.text)] == [True] * 3
        assert [list(each.token_ids) for each in (letters, array, free)] == [
            list(server.generation.Generate(one).token_ids) for one in (*formed, wanted[0])
        ]
        held = two.metrics()
        # Rank 0's tables of the last step's rows may be more by some bytes.
        assert held["lorarep_rank_memory_bytes{rank=1}"] == pytest.approx(
            held["lorarep_rank_memory_bytes{rank=0}"], rel=0.01
        )
        world.failpoints.set("adapter-1", "once error")
        refused(lambda: two.generation.Generate(request("x", "org/lora")), "INTERNAL")
        assert two.generation.Generate(request("x", "org/lora")).token_ids
        call = stream(two, LONG)
        next(call)
        other_rank(two).kill()
        with pytest.raises(grpc.RpcError):
            list(call)
        assert two.process.wait(30) == 1


def test_a_rank_that_is_killed_while_the_base_loads_ends_the_server_within_seconds(world: World) -> None:
    """Rank 0 waits for it by then, as long as torch.distributed does."""
    world.failpoints.set("base-1", "hold")
    try:
        with serving([*world.flags(), "--tensor-parallel=2"], world.env) as two:
            world.failpoints.wait_reached("base-1")
            other_rank(two).kill()
            assert two.process.wait(30) == 1
            assert any("rank 1 has ended by SIGKILL" in line for line in two.log)
    finally:
        world.failpoints.unset("base-1")
