"""The device time of launched work, measured without a wait for it."""

from __future__ import annotations

import time

import torch


class DeviceTimer:
    """Measures the work that is launched between its construction and `stop`, in the order of the current stream."""

    def __init__(self, device: torch.device) -> None:
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if device.type == "cuda" else None
        self._times: list[float] = []
        self._mark(0)

    def stop(self) -> None:
        """Ends the measured work: marks its end on the current stream."""
        self._mark(1)

    def _mark(self, which: int) -> None:
        if self._events is None:
            self._times.append(time.perf_counter())
        else:
            self._events[which].record()

    def wait(self) -> None:
        """Waits until the device has reached the stop."""
        if self._events is not None:
            self._events[1].synchronize()

    @property
    def milliseconds(self) -> float | None:
        """Device time of the measured work; None before the device has reached the stop."""
        if self._events is None:
            return (self._times[1] - self._times[0]) * 1e3
        return self._events[0].elapsed_time(self._events[1]) if self._events[1].query() else None
