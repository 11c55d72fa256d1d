"""Servers of two ranks: what fails on one of them, and how both end."""

from __future__ import annotations

import signal

import grpc
import psutil
import pytest

from tests.support.callers import refused, request, stream, stream_tokens
from tests.support.servers import SECONDS, Server, serving, wait_for
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
        world.failpoints.set("adapter-1", "once error")
        refused(lambda: two.generation.Generate(request("x", "org/lora")), "INTERNAL")
        assert two.generation.Generate(request("x", "org/lora")).token_ids
        call = stream(two, LONG)
        next(call)
        other_rank(two).kill()
        with pytest.raises(grpc.RpcError):
            list(call)
        assert two.process.wait(30) == 1


def test_sigterm_lets_streams_of_two_ranks_finish_and_ends_both(world: World) -> None:
    with world.slow_steps(), serving([*world.flags(), *FLAGS], world.env) as two:
        two.wait_ready()
        rank = other_rank(two)
        call = stream(two, LONG)
        next(call)
        rank.send_signal(signal.SIGTERM)  # as a manager does that tells all processes of a group
        two.process.send_signal(signal.SIGTERM)
        assert len(list(stream_tokens(call))) == 100
        assert two.process.wait(SECONDS) == 0
        wait_for(lambda: not rank.is_running(), "the other rank's end")
