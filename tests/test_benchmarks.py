"""Benchmarks run by command; these tests import each of them and run what needs no GPU."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.cpu.families import Verdict, table, verdicts_in
from benchmarks.gpu.goals import Figures, print_all
from benchmarks.gpu.timeline import Work, timeline, works
from benchmarks.results import report

ROOT = Path(__file__).resolve().parents[1]
IMPORT = "import importlib, sys; [importlib.import_module(name) for name in sys.argv[1:]]"


def test_every_benchmark_can_be_imported() -> None:
    files = [file.relative_to(ROOT).with_suffix("") for file in sorted(ROOT.glob("benchmarks/*/*.py"))]
    modules = [".".join(file.parts) for file in files if file.name != "__main__"]
    assert "benchmarks.gpu.table" in modules
    # In a process of its own: they set variables of the environment.
    ended = subprocess.run(
        [sys.executable, "-c", IMPORT, *modules], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 0, ended.stderr


def step(begin: float, launch: int) -> list[Work]:
    """48 us: an embedding, 10 positions of two kernels that overlap, and a head."""
    found = [Work("embed", begin, begin + 4, launch)]
    for i in range(10):
        at = begin + 4 + 4 * i
        found += [Work("void norm<8>(int)", at, at + 1, launch), Work("product", at + 0.5, at + 4, launch)]
    return [*found, Work("head", begin + 44, begin + 48, launch)]


def test_a_timeline_has_what_is_idle_between_steps_and_what_each_kernel_adds() -> None:
    found = [work for i in range(6) for work in step(50.0 * i, i)]
    found += [Work("Memcpy DtoH", 50.0 * i + 48, 50.0 * i + 49, 100 + i) for i in range(6)]
    seen = timeline(sorted(found, key=lambda work: work.begin), unsettled=1)
    assert seen.step_us == pytest.approx(50)
    assert (seen.idle, seen.idle_within) == pytest.approx((2, 0))
    assert (seen.before, seen.positions, seen.after) == pytest.approx((4, 10, 4))
    assert [name for name, _ in seen.kernels] == ["norm", "product"]
    assert [took for _, took in seen.kernels] == pytest.approx([1, 3])


def test_works_are_read_from_a_trace() -> None:
    kernel = dict(cat="kernel", name="k", ts=2.0, dur=1.5, args=dict(correlation=7))
    assert works([dict(cat="cuda_runtime", name="cudaGraphLaunch", ts=0), kernel]) == [Work("k", 2, 3.5, 7)]


def test_a_table_says_what_holds_and_later_files_replace_earlier_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    earlier, later = tmp_path / "earlier.json", tmp_path / "later.json"
    earlier.write_text(json.dumps({"nf4/interference/zipf": {"kept": 0.8}, "nf4/interference/long": {"floors": 1.2}}))
    later.write_text(json.dumps({"nf4/interference/zipf": {"kept": 0.6}}))
    print_all(Figures(others=[earlier, later]))
    lines = {line.split("  ")[0]: line for line in capsys.readouterr().out.splitlines()}
    assert lines["1,000 adapters over what fits, tokens/s"].endswith("MISSED")
    assert lines["8,192 tokens, over reading what is added"].endswith("holds")
    assert lines["base"].endswith("not measured")


def test_the_results_page_is_generated_from_its_figures() -> None:
    assert report.PAGE.read_text() == report.page(), "run: python -m benchmarks.results"


def test_the_results_page_names_files_that_exist() -> None:
    names = re.findall(r"\]\(([^)]+)\)|`(benchmarks/\S+\.md)`", report.page())
    files = [report.FOLDER / link if link else ROOT / path for link, path in names]
    assert files
    assert [file for file in files if not file.exists()] == []


def test_verdicts_on_families_are_read_back_from_their_table() -> None:
    verdicts = [Verdict("bart", "an encoder | and a decoder"), Verdict("llama", ""), Verdict("llava", "")]
    shown = table(verdicts)
    assert sorted(verdicts_in(shown), key=lambda one: one.family) == verdicts
    assert table(verdicts_in(shown)) == shown
