"""Documents tell the truth where a test can know it: links, paths, flags, metrics, names of classes and tests."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import click
import pytest
from lorarep_server.cli.serve import serve

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
OPERATIONS = ROOT / "docs/operations.md"
PACKAGES = ("lorarep_runtime", "server", "proto", "tests", "benchmarks", "deploy", "docs")
LONGEST_README = 120
"""Lines."""

in_each = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)


def prose(document: Path) -> str:
    """A document without its blocks of code."""
    return re.sub(r"^ *```.*?^ *```", "", document.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(document: Path) -> set[str]:
    """The anchors that GitHub gives a document's headings."""
    headings = re.findall(r"^#+ (.+)$", prose(document), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@cache
def sources() -> str:
    """All Python code of the runtime, the server and the tests."""
    files = [file for folder in ("lorarep_runtime", "server", "tests") for file in (ROOT / folder).rglob("*.py")]
    return "\n".join(file.read_text() for file in files if not {"node_modules", ".venv"} & {*file.parts})


def quoted(document: Path) -> set[str]:
    """All that a document has in backticks outside of blocks of code."""
    return set(re.findall(r"`([^`\n]+)`", prose(document)))


@cache
def protos() -> str:
    """All contracts of lorarep.v1."""
    return "\n".join(file.read_text() for file in (ROOT / "proto/lorarep").rglob("*.proto"))


def service_of(name: str) -> str:
    """The contract of a service; empty where there is none."""
    found = re.search(rf"^service {name} {{.*?^}}", protos(), re.DOTALL | re.MULTILINE)
    return "" if found is None else found[0]


def options() -> dict[str, str]:
    """Flags of `lorarep serve` by their names."""
    return {p.name: p.opts[0] for p in serve.params if isinstance(p, click.Option) and p.name is not None}


@in_each
def test_links_lead_somewhere(document: Path) -> None:
    lost = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(document)):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (document.parent / name).resolve() if name else document
        if not target.exists() or (anchor and anchor not in anchors(target)):
            lost.append(link)
    assert lost == []


@in_each
def test_paths_exist(document: Path) -> None:
    named = {name for name in quoted(document) if re.fullmatch(rf"({'|'.join(PACKAGES)})(/[\w.\-]+)+/?", name)}
    assert {name for name in named if not (ROOT / name).exists()} == set()


@in_each
def test_classes_have_the_members_that_are_named(document: Path) -> None:
    lost = set()
    named = {tuple(name.split(".")) for name in quoted(document) if re.fullmatch(r"[A-Z]\w+\.[a-z_]+", name)}
    for name, member in named:
        body = re.search(rf"^class {name}\b.*?(?=^\S|\Z)", sources(), re.DOTALL | re.MULTILINE)
        if body is None or not re.search(rf"\b(def |self\.){member}\b|\b{member}:", body[0]):
            lost.add(f"{name}.{member}")
    assert lost == set()


@in_each
def test_calls_are_in_the_contracts(document: Path) -> None:
    named = {tuple(name.split(".")) for name in quoted(document) if re.fullmatch(r"\w+Service\.[A-Z]\w+", name)}
    assert {(service, call) for service, call in named if f"rpc {call}(" not in service_of(service)} == set()


@in_each
def test_tests_that_are_named_exist(document: Path) -> None:
    named = {name for name in quoted(document) if re.fullmatch(r"test_\w+", name)}
    assert named - set(re.findall(r"^def (test_\w+)", sources(), re.MULTILINE)) == set()


@in_each
def test_variables_of_the_environment_are_read_somewhere(document: Path) -> None:
    flags = {f"LORAREP_SERVE_{name.upper()}" for name in options()}
    named = set(re.findall(r"\bLORAREP_[A-Z_]*[A-Z]\b", document.read_text()))
    assert {name for name in named - flags if name not in sources()} == set()


@in_each
def test_modules_that_are_run_exist(document: Path) -> None:
    for module in re.findall(r"python -m (benchmarks[\w.]+)", document.read_text()):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module


@in_each
def test_targets_of_make_exist(document: Path) -> None:
    named = set(re.findall(r"(?:^|`)make ([a-z\-]+)", document.read_text(), re.MULTILINE))
    assert named - set(re.findall(r"^([a-z\-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)) == set()


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= LONGEST_README


def test_all_flags_are_in_the_tables() -> None:
    rows = set(re.findall(r"^\| `(--[\w\-]+)`", OPERATIONS.read_text(), re.MULTILINE))
    assert rows == set(options().values())


@in_each
def test_metrics_exist(document: Path) -> None:
    metrics = (ROOT / "server/lorarep_server/telemetry/metrics.py").read_text()
    for name in {name for name in quoted(document) if re.fullmatch(r"lorarep_[a-z_]+", name)}:
        if name in ("lorarep_runtime", "lorarep_server"):
            continue
        short = name.removeprefix("lorarep_").removesuffix("_total")
        assert re.search(rf'"(lorarep_)?{short}"', metrics), name
