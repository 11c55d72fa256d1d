"""The answers to requests that want to start."""

from __future__ import annotations

import enum


class Claim(enum.Enum):
    """The answer to a request that wants to start."""

    READY = enum.auto()
    """The adapter is on the device, and stays there for the request."""
    LOADING = enum.auto()
    """A thread loads it, or still moves it out of the device; the request claims it again when that has ended."""
    NO_MEMORY = enum.auto()
    """Running requests, and adapters that are loaded for others, use all device memory."""
