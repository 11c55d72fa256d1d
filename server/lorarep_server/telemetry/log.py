"""The log. A thread of its own writes it, so that an unread standard error blocks only the log."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from logging.handlers import QueueHandler, QueueListener

MAX_UNWRITTEN = 10_000
"""Most lines that wait to be written; further lines are lost."""
LAST_LINES = 1.0
"""Seconds for the unwritten lines at the end."""


class _Handler(QueueHandler):
    def enqueue(self, record: logging.LogRecord) -> None:
        with suppress(queue.Full):
            self.queue.put_nowait(record)


@contextmanager
def logging_in_a_thread(level: str) -> Iterator[None]:
    """Logs to standard error from a thread of its own while the context lasts.

    Args:
        level: least level of lorarep's own lines. Other packages log warnings and errors alone.
    """
    lines: queue.Queue[logging.LogRecord] = queue.Queue(MAX_UNWRITTEN)
    output = logging.StreamHandler()
    output.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    # HTTP clients log a line for every request below warnings, signed addresses included.
    least = max(logging.WARNING, logging.getLevelName(level.upper()))
    logging.basicConfig(handlers=[_Handler(lines)], format="%(message)s", level=least)
    for package in ("lorarep_runtime", "lorarep_server"):
        logging.getLogger(package).setLevel(level.upper())
    QueueListener(lines, output).start()
    try:
        yield
    finally:
        # QueueListener.stop would wait without a limit for an unread pipe.
        writing = threading.Thread(target=lines.join, daemon=True)
        writing.start()
        writing.join(LAST_LINES)
