"""Messages to another rank: bytes of a step's rows, and milliseconds until the rank has them.

    python -m benchmarks.cpu.rank_messages [--rows 64] [--tokens 4096] [--depth 64]

Rank 0 tells the others of a step's rows when one comes or goes. They know the page tables of those that stay.
"""

from __future__ import annotations

import argparse
import statistics
import time
from types import SimpleNamespace
from typing import Any

import numpy as np

from lorarep_runtime.device.ranks import Ranks, packed
from lorarep_runtime.engine.messages import SentTables
from lorarep_runtime.model.batch import Span
from lorarep_runtime.model.kv_cache import PageTable, pages_of

REPEATS = 15


def spans_of(rows: int, tokens: int, depth: int) -> list[Span]:
    """A row of each of some sequences."""
    pool: Any = SimpleNamespace()
    found = []
    for _ in range(rows):
        table = PageTable(pool, depth)
        table.pages = np.arange(depth * pages_of(tokens), dtype=np.int64).reshape(depth, -1)
        found.append(Span([5], tokens - 1, tuple(range(depth)), None, table))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--depth", type=int, default=64, help="Positions of their stack.")
    options = parser.parse_args()
    ranks = Ranks(2, "tests.support.receiver", [{}])
    try:
        ranks.ask("ready")
        for case in ("all rows are new", "one row is new"):
            seconds, size = [], 0
            for _ in range(REPEATS):
                spans, tables = spans_of(options.rows, options.tokens, options.depth), SentTables()
                if case == "one row is new":
                    tables.spans(spans[1:])
                began = time.perf_counter()
                message = tables.spans(spans)
                ranks.ask("set_rows", message)
                seconds.append(time.perf_counter() - began)
                size = len(packed(message))
            print(f"{case}: {size / 1e6:.2f} MB, {statistics.median(seconds) * 1e3:.2f} ms")
    finally:
        ranks.close()


if __name__ == "__main__":
    main()
