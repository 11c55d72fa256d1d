"""The log, written by a thread of its own: when nobody reads standard error, nothing but the log stands still."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from logging.handlers import QueueHandler, QueueListener

MAX_UNWRITTEN = 10_000
"""Lines that wait to be written; later ones are lost."""
LAST_LINES = 1.0
"""Seconds for what is unwritten at the end."""


class _Handler(QueueHandler):
    def enqueue(self, record: logging.LogRecord) -> None:
        with suppress(queue.Full):
            self.queue.put_nowait(record)


@contextmanager
def logging_aside(level: str) -> Iterator[None]:
    """Logs lorarep's own lines from a level on, and warnings of others, to standard error."""
    lines: queue.Queue[logging.LogRecord] = queue.Queue(MAX_UNWRITTEN)
    written = logging.StreamHandler()
    written.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    # Of what others log, warnings alone: HTTP clients have a line for every request, signed addresses included.
    least = max(logging.WARNING, logging.getLevelName(level.upper()))
    logging.basicConfig(handlers=[_Handler(lines)], format="%(message)s", level=least)
    for package in ("lorarep_runtime", "lorarep_server"):
        logging.getLogger(package).setLevel(level.upper())
    QueueListener(lines, written).start()
    try:
        yield
    finally:
        # Not the listener's own end, which waits for as long as nobody reads.
        writing = threading.Thread(target=lines.join, daemon=True)
        writing.start()
        writing.join(LAST_LINES)
