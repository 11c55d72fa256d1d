"""Ranks add up their terms and give their logits to rank 0 inside captured steps: two processes on one GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from lorarep_runtime.device.group import Group
from lorarep_runtime.gpu.rank_sums import ONE_SHOT_BYTES, RankSums

RANKS, MOST_ROWS, HIDDEN, WIDTH = 2, 128, 4096, 1000
REPLAYS = 3
ROWS = (1, ONE_SHOT_BYTES // (2 * HIDDEN), MOST_ROWS)
"""Of both kinds of sums."""


def term(rank: int, rows: int, columns: int, replay: int) -> torch.Tensor:
    """Of one rank; small whole numbers, whose sums are exact."""
    numbers = torch.arange(rows * columns, device="cuda").view(rows, columns)
    return ((numbers * (rank + 3) + 7 * replay) % 100).bfloat16()


def run(rank: int, store: Path) -> None:
    """What each rank's process does. gloo stands in for NCCL, which has no two ranks on a GPU."""
    cuda = torch.device("cuda", 0)
    sums = RankSums(Group(rank, RANKS, store, torch.device("cpu")), cuda)
    h = torch.zeros(MOST_ROWS, HIDDEN, device=cuda, dtype=torch.bfloat16)
    sums.take_memory(h, MOST_ROWS * WIDTH)
    assert len(sums.tensors) == 2
    for rows in ROWS:
        given, part = term(rank, rows, HIDDEN, 0), term(rank, rows, WIDTH, 0)
        whole = torch.zeros(rows, RANKS * WIDTH - 1 if rank == 0 else 0, device=cuda)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            sums.put(given, h[:rows])
            is_first = sums.gather(part, whole)
        assert is_first == (rank == 0)
        for replay in range(REPLAYS):
            given.copy_(term(rank, rows, HIDDEN, replay))
            part.copy_(term(rank, rows, WIDTH, replay))
            graph.replay()
            assert torch.equal(h[:rows], sum(term(r, rows, HIDDEN, replay) for r in range(RANKS)))
            parts = torch.cat([term(r, rows, WIDTH, replay) for r in range(RANKS)], 1).float()
            assert torch.equal(whole, parts[:, : whole.shape[1]])


if torch.cuda.is_available():

    def test_ranks_of_two_processes_add_up_and_gather(tmp_path: Path) -> None:
        processes = [
            subprocess.Popen([sys.executable, "-m", __name__, str(rank), str(tmp_path / "store")])
            for rank in range(RANKS)
        ]
        try:
            assert [process.wait(120) for process in processes] == [0] * RANKS
        finally:
            for process in processes:
                process.kill()


if __name__ == "__main__":
    run(int(sys.argv[1]), Path(sys.argv[2]))
