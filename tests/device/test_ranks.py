"""Processes of ranks end with rank 0, which knows of their own ends."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import psutil
import pytest
import torch

from lorarep_runtime.device.ranks import Ranks
from lorarep_runtime.errors import EngineFailure
from tests.support.servers import wait_for

ECHO = "tests.support.echo"
LEADER = f"""
import signal
from lorarep_runtime.device.ranks import Ranks
ranks = Ranks(2, {ECHO!r}, [{{}}])
ranks.ask("ready")
print(ranks.processes[0], flush=True)
signal.pause()
"""


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    ranks = Ranks(3, ECHO, [{}, {}])
    yield ranks
    ranks.close()


def test_ranks_leave_signals_to_rank_0_and_end_with_its_group(ranks: Ranks) -> None:
    assert ranks.ask("a", 1) == [("a", 1)] * 2
    processes = [psutil.Process(number) for number in ranks.processes]
    for process in processes:
        process.send_signal(signal.SIGTERM)  # as a manager does that tells all processes of a group
        process.send_signal(signal.SIGINT)
    assert ranks.ask("b") == [("b",)] * 2
    ranks.close()
    assert ranks.failure is None
    assert not any(process.is_running() for process in processes)


def test_a_rank_that_is_killed_is_told_and_nothing_waits_for_it(ranks: Ranks) -> None:
    told: list[BaseException] = []
    ranks.subscribe(told.append)
    ranks.ask("a")
    psutil.Process(ranks.processes[1]).kill()
    wait_for(lambda: told, "the news")
    assert "rank 2 has ended by SIGKILL" in str(told[0])
    with pytest.raises(EngineFailure):
        ranks.ask("b")


@pytest.mark.parametrize("fails", ["is killed", "refuses"])
@pytest.mark.parametrize("waits", ["for another rank's answer", "for all to join"])
def test_what_fails_at_the_start_is_told_within_seconds_whatever_waits(ranks: Ranks, fails: str, waits: str) -> None:
    """A rank that is there, and rank 0 itself, would wait for minutes."""
    began = []

    def work() -> None:
        ranks.tell("wait", 1, "rank 2 refuses" if fails == "refuses" else "")
        began.append(time.monotonic())
        if fails == "is killed":
            psutil.Process(ranks.processes[1]).kill()
        if waits == "for all to join":
            ranks.join(torch.device("cpu"))
        else:
            ranks.answers()

    ranks.ask("ready")
    with pytest.raises(ValueError if fails == "refuses" else EngineFailure):
        ranks.guarded(work)
    ranks.close()
    assert time.monotonic() - began[0] < 10


def test_ranks_end_with_a_rank_0_that_is_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", LEADER], stdout=subprocess.PIPE, text=True) as leader:
        assert leader.stdout is not None
        other = psutil.Process(int(leader.stdout.readline()))
        leader.kill()
    wait_for(lambda: not other.is_running() or other.status() == psutil.STATUS_ZOMBIE, "the other rank's end")
