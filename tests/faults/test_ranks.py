"""A server of two ranks: what fails on one of them, and its end with the other."""

from __future__ import annotations

import grpc
import psutil
import pytest

from tests.support.callers import refused, request, stream
from tests.support.servers import Server, serving
from tests.support.world import World

FLAGS = ["--tensor-parallel=2", "--adapter=dora=org/dora", "--allow-repository=org/*"]
LONG = request("x", "dora", new_tokens=100)


def other_rank(server: Server) -> psutil.Process:
    """The process of rank 1."""
    children = psutil.Process(server.process.pid).children()
    (rank,) = [process for process in children if "engine.follower" in " ".join(process.cmdline())]
    return rank


def test_two_ranks_answer_as_one_fail_a_load_together_and_end_with_a_rank_that_is_killed(
    world: World, server: Server
) -> None:
    with world.slow_steps(), serving([*world.flags(), *FLAGS], world.env) as two:
        two.wait_ready()
        wanted = [request("x", "dora", new_tokens=30), request("y", new_tokens=30)]
        assert [two.generation.Generate(one).token_ids for one in wanted] == [
            server.generation.Generate(one).token_ids for one in wanted
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
