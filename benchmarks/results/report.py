"""The results page, generated from the figures in JSON files.

Each file has one table: its `title`, the `commit`, `device` and `command` of its figures, `notes`, `columns` and
`rows`. A column shows a row's value under its `key`, or the ratio of two values, `of` and `over`. Files with a lower
`order` come first.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
PAGE = FOLDER / "README.md"
HEAD = """# Results

`python -m benchmarks.results` generates this page from the JSON files in this folder. A floor is the time to read a
step's bytes once, at the bandwidth that a copy reaches. Ratios are of the figures as the page shows them. An empty cell
was not measured, or has no floor or goal.
[The log](../log/README.md) has earlier figures, and the experiments that led to these ones.
"""


def page() -> str:
    """The whole page, in Markdown."""
    tables = sorted((json.loads(file.read_text()) for file in FOLDER.glob("*.json")), key=lambda table: table["order"])
    return "\n".join([HEAD, *map(section, tables)])


def section(table: Mapping[str, Any]) -> str:
    columns = table["columns"]
    lines = [f"## {table['title']}", ""]
    lines += [f"`{table['command']}` at commit {table['commit']}, on: {table['device']}.", ""]
    lines += ["\n\n".join(table["notes"]), ""] if table["notes"] else []
    lines += [row(column["title"] for column in columns), "|---" * len(columns) + "|"]
    lines += [row(cell(column, figures) for column in columns) for figures in table["rows"]]
    lines += [f"\n![{title}]({file})" for file, title in table.get("plots", [])]
    return "\n".join([*lines, ""])


def row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def cell(column: Mapping[str, Any], figures: Mapping[str, Any]) -> str:
    """One number or word of a row; empty where the row has none."""
    if "key" in column:
        value = figures.get(column["key"])
    elif column["of"] in figures and column["over"] in figures:
        value = figures[column["of"]] / figures[column["over"]]
    else:
        value = None
    if value is None or isinstance(value, str):
        return value or ""
    return f"{value:,.{column['digits']}f}" if "digits" in column else f"{value:,}"
