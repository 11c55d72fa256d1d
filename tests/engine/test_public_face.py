"""`lorarep_runtime` exports all that a program needs to run an engine."""

from __future__ import annotations

import subprocess
import sys

import pytest

import lorarep_runtime
from lorarep_runtime.engine.engine import Engine
from lorarep_runtime.errors import LorarepError


def test_all_exported_names_are_there() -> None:
    assert {name for name in lorarep_runtime.__all__ if not hasattr(lorarep_runtime, name)} == set()
    assert lorarep_runtime.Engine is Engine
    assert {error.__name__ for error in LorarepError.__subclasses__()} < set(lorarep_runtime.__all__)


def test_other_names_are_not_there() -> None:
    with pytest.raises(AttributeError, match="nothing"):
        lorarep_runtime.nothing  # noqa: B018


def test_torch_is_imported_with_the_engine_and_not_before() -> None:
    code = (
        "import lorarep_runtime, sys; assert 'torch' not in sys.modules; lorarep_runtime.Engine; sys.modules['torch']"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
