"""torch's threads: as many as the process may use processors."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
import torch

from lorarep_runtime.device import threads
from lorarep_runtime.device.threads import limit_threads, usable_processors

HERE = len(os.sched_getaffinity(0))


def machine(root: Path, group: str, files: dict[str, str]) -> Path:
    for name, text in {"proc/self/cgroup": group, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("group", "files", "expected"),
    [
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "200000 100000\n"}, 2),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "250000 100000\n"}, 2),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "max 100000\n"}, 16),
        (
            "0::/pods/one\n",
            {"sys/fs/cgroup/pods/cpu.max": "300000 100000\n", "sys/fs/cgroup/pods/one/cpu.max": "max 100000\n"},
            3,
        ),
        ("0::/not/mounted/here\n", {"sys/fs/cgroup/cpu.max": "400000 100000\n"}, 4),
        (
            "4:memory:/x\n3:cpu,cpuacct:/docker/1\n",
            {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "150000\n", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "50000\n"},
            3,
        ),
        (
            "3:cpu:/\n",
            {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "50000\n"},
            16,
        ),
        ("", {}, 16),
    ],
)
def test_processors_are_those_of_the_quota(
    group: str, files: dict[str, str], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    assert usable_processors(machine(tmp_path, group, files)) == expected


def test_a_machine_without_control_groups_is_used_whole(tmp_path: Path) -> None:
    assert usable_processors(tmp_path) == HERE


@pytest.fixture
def four_threads() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("four_threads")
@pytest.mark.parametrize(("wanted", "usable", "expected"), [(None, 2, 2), (None, 64, 4), ("4", 2, 4)])
def test_torch_has_a_thread_for_each_unless_the_operator_says_how_many(
    wanted: str | None,
    usable: int,
    expected: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(threads, "usable_processors", lambda: usable)
    monkeypatch.delenv("OMP_NUM_THREADS")
    if wanted:
        monkeypatch.setenv("OMP_NUM_THREADS", wanted)
    with caplog.at_level(logging.INFO, "lorarep_runtime"):
        limit_threads()
    assert torch.get_num_threads() == expected
    assert caplog.messages == [f"{expected} threads on {os.cpu_count()} processors, of which {usable} may be used"]
