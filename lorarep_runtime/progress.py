"""Progress of long work, as it is reported to those who wait for it."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with the stage's name, the amount of it that is done and the whole amount. Calls come from any thread.

The stage "download" counts bytes.
"""
