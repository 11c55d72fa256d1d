"""Generates `benchmarks/results/README.md` from the figures in that folder: `python -m benchmarks.results`."""

from benchmarks.results.report import PAGE, page

PAGE.write_text(page())
