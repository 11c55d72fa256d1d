"""Limits on the code as a whole. `lint-imports` checks the floors of the packages; pyproject.toml has its contracts."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PUBLIC = {
    "lorarep_runtime.adapters.conversion",
    "lorarep_runtime.adapters.files",
    "lorarep_runtime.adapters.header",
    "lorarep_runtime.adapters.look",
    "lorarep_runtime.adapters.peft_config",
    "lorarep_runtime.adapters.registry",
    "lorarep_runtime.adapters.resident",
    "lorarep_runtime.adapters.revision",
    "lorarep_runtime.config",
    "lorarep_runtime.engine.engine",
    "lorarep_runtime.errors",
    "lorarep_runtime.failpoints",
    "lorarep_runtime.hub.snapshot",
    "lorarep_runtime.integers",
    "lorarep_runtime.model.base",
    "lorarep_runtime.model.compiled_adapter",
    "lorarep_runtime.model.footprint",
    "lorarep_runtime.model.model_config",
    "lorarep_runtime.model.own_attention",
    "lorarep_runtime.model.physical_stack",
    "lorarep_runtime.model.plan",
    "lorarep_runtime.model.stack",
    "lorarep_runtime.progress",
    "lorarep_runtime.request",
    "lorarep_runtime.text.detokenizer",
    "lorarep_runtime.text.json_space",
    "lorarep_runtime.text.tokenizer",
}
"""Modules of the runtime that the server may import, with the package itself."""
MOST_LINES = 400
CODE = {".py", ".cu", ".cuh", ".js", ".html"}
FOLDERS = ("lorarep_runtime", "server", "benchmarks", "tests")
GENERATED = {"node_modules", ".venv"}


def imported(file: Path) -> Iterator[str]:
    """Modules that a file imports anywhere, also for type checking alone."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            yield node.module


def is_runtime(module: str) -> bool:
    return module.startswith("lorarep_runtime.")


def test_the_server_imports_public_modules_of_the_runtime_alone() -> None:
    files = sorted((ROOT / "server").rglob("*.py"))
    found = {(str(file.relative_to(ROOT)), module) for file in files for module in imported(file) if is_runtime(module)}
    assert found
    assert {(file, module) for file, module in found if module not in PUBLIC} == set()


def test_files_are_short() -> None:
    files = (file for folder in FOLDERS for file in (ROOT / folder).rglob("*") if file.suffix in CODE)
    own = (file for file in files if not GENERATED & set(file.parts))
    assert {str(file.relative_to(ROOT)) for file in own if len(file.read_text().splitlines()) > MOST_LINES} == set()
