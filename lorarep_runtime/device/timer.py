"""Where the device is in launched work, and the time that it took, without a wait for it."""

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


class DeviceMark:
    """A place in the order of the current stream: after all that was launched before its construction."""

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event() if device.type == "cuda" else None
        if self._event is not None:
            self._event.record(torch.cuda.current_stream(device))

    @property
    def is_passed(self) -> bool:
        """Whether the device has come past it. A CPU has done what it was told."""
        return self._event is None or self._event.query()
