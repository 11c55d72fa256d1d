"""The tables of promises and of found bugs name tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

HERE = Path(__file__).parent


def test_every_test_that_the_table_names_exists() -> None:
    named = set(re.findall(r"`(test_\w+)`", (HERE / "README.md").read_text()))
    there = {
        name
        for file in HERE.parent.glob("*/test_*.py")  # not what clients have installed
        for name in re.findall(r"^ *def (test_\w+)", file.read_text(), re.M)
    }
    assert named
    assert named - there == set()
