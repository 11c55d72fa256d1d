"""A decode step between its launch and the moment when its tokens are read."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from lorarep_runtime.device.timer import DeviceTimer
from lorarep_runtime.engine.sampler import Sampled, checked, choose, sample
from lorarep_runtime.engine.sequence import Sequence
from lorarep_runtime.failpoints import failpoint


class LaunchedStep:
    """A decode step that the device computes, or has computed, and whose tokens have not been read."""

    def __init__(
        self,
        sequences: Seq[Sequence],
        launch: Callable[[], tuple[Tensor, Tensor]],
        device: torch.device,
        *,
        unread: int,
    ) -> None:
        """Launches the step and counts one more token of each sequence as computed.

        Args:
            sequences: in the order of the decoder's rows.
            launch: `StepDecoder.step`.
            unread: number of steps of these sequences that were launched before and have not been read.
        """
        self.sequences = sequences
        self._ended: list[Sequence] = []
        self.is_plain = all(s.sampler.is_plain and s.request.logprobs is None for s in sequences)
        """Whether its tokens are chosen without a look at earlier ones, and no log-probabilities are asked for."""
        self._timer = DeviceTimer(device)
        tokens, self._logits = launch()
        if self.is_plain:
            choose(tokens, self._logits, [s.sampler for s in sequences], unread=unread)
            self._tokens = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=tokens.is_cuda)
            # A copy: the next step reads `tokens`, and has no row of its embedding for NO_TOKEN.
            self._tokens.copy_(checked(tokens, self._logits), non_blocking=True)
        self._timer.stop()
        for sequence in sequences:
            sequence.mark_computed(1)

    @property
    def milliseconds(self) -> float | None:
        """Device time of the step; None before its tokens have been read."""
        return self._timer.milliseconds

    def sampled(self) -> list[tuple[Sequence, Sampled]]:
        """Waits for the device and returns each sequence's next token.

        A step that is not plain has to be read before the next one is launched.
        """
        failpoint("forward")
        if not self.is_plain:
            return list(zip(self.sequences, sample(self._logits, [s.sampler for s in self.sequences]), strict=True))
        self._timer.wait()
        return [(s, Sampled(t, None)) for s, t in zip(self.sequences, self._tokens.tolist(), strict=True)]

    def keep_adapter(self, sequence: Sequence) -> None:
        """Keeps the adapter of a sequence that has ended until `release_adapters`: the device may still read it."""
        self._ended.append(sequence)

    def release_adapters(self) -> None:
        """Releases the adapters of sequences that ended before the step was read. The device must be done with it."""
        while self._ended:
            self._ended.pop().lease.release()
