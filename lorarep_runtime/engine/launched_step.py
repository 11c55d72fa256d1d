"""A decode step between its launch and the moment when its tokens are read."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from lorarep_runtime.device.staging import moved
from lorarep_runtime.device.timer import DeviceTimer
from lorarep_runtime.engine.masks import take_masks
from lorarep_runtime.engine.sampler import Sampled, checked, choose, sample
from lorarep_runtime.engine.sequence import Sequence
from lorarep_runtime.failpoints import failpoint


class LaunchedStep:
    """A decode step that the device computes, or has computed, and whose tokens have not been read."""

    def __init__(
        self,
        chosen: Seq[tuple[Sequence, int]],
        launch: Callable[[], tuple[Tensor, Tensor]],
        device: torch.device,
        *,
        unread: int,
    ) -> None:
        """Launches the step and counts its tokens as computed.

        Args:
            chosen: sequences and the number of their next tokens, in the order of the decoder's rows.
            launch: `StepDecoder.step`.
            unread: number of steps of these sequences that were launched before and have not been read.
        """
        self.sequences = [sequence for sequence, _ in chosen]
        self._device = device
        self._ended: list[Sequence] = []
        ready = [i for i, (sequence, count) in enumerate(chosen) if sequence.remaining <= count]
        self._ready = [self.sequences[i] for i in ready]
        """The sequences whose next token the step computes; not those of which it computes a part of the prompt."""
        self.is_steady = len(ready) == len(chosen) and all(count == 1 for _, count in chosen)
        """Whether each sequence has one row, which gives its next token: then the next step may have the same rows."""
        self.is_plain = all(s.sampler.is_plain for s in self._ready)
        """Whether its tokens are chosen without a look at earlier ones."""
        self.has_logprobs = any(s.request.logprobs is not None for s in self._ready)
        """Whether log-probabilities are asked for: then it has to be read before the next step is launched."""
        self._tokens: Tensor | None = None
        """The chosen tokens on the CPU, once the timer has stopped; None where logits are still to be sampled."""
        self._timer = DeviceTimer(device)
        self._chosen, self._logits = launch()
        if len(ready) < len(chosen):
            at = moved(torch.tensor(ready, dtype=torch.int64), device)
            self._chosen, self._logits = self._chosen[at], self._logits[at]
        if self.is_plain and not self.has_logprobs:
            self._choose(unread)
        for sequence, count in chosen:
            sequence.mark_computed(count)

    def choose_late(self) -> None:
        """Chooses tokens that depend on earlier ones. All of these have been read, while the device computes this step.

        A sequence whose mask is not there yet has no token, and computes its last one again.
        """
        has_mask = take_masks(s.sampler.form for s in self._ready)
        if not all(has_mask):
            self.is_steady = False
            for sequence, is_there in zip(self._ready, has_mask, strict=True):
                if not is_there:
                    sequence.compute_last_again()
            at = moved(
                torch.tensor([i for i, is_there in enumerate(has_mask) if is_there], dtype=torch.int64), self._device
            )
            self._chosen, self._logits = self._chosen[at], self._logits[at]
            self._ready = [s for s, is_there in zip(self._ready, has_mask, strict=True) if is_there]
        if not self.has_logprobs:
            self._choose(unread=0)

    def _choose(self, unread: int) -> None:
        choose(self._chosen, self._logits, [s.sampler for s in self._ready], unread=unread)
        self._tokens = torch.empty(self._chosen.shape, dtype=self._chosen.dtype, pin_memory=self._chosen.is_cuda)
        # A copy: the next step reads the chosen ones, and has no row of its embedding for NO_TOKEN.
        self._tokens.copy_(checked(self._chosen, self._logits), non_blocking=True)
        self._timer.stop()

    @property
    def milliseconds(self) -> float | None:
        """Device time of the step; None before its tokens have been read."""
        return self._timer.milliseconds

    def sampled(self) -> list[tuple[Sequence, Sampled]]:
        """Waits for the device and returns the next token of each sequence that has one.

        A step with log-probabilities has to be read before the next one is launched.
        """
        failpoint("forward")
        if self._tokens is None:
            self._timer.stop()
            return list(zip(self._ready, sample(self._logits, [s.sampler for s in self._ready]), strict=True))
        self._timer.wait()
        return [(s, Sampled(t, None)) for s, t in zip(self._ready, self._tokens.tolist(), strict=True)]

    def keep_adapter(self, sequence: Sequence) -> None:
        """Keeps the adapter of a sequence that has ended until `release_adapters`: the device may still read it."""
        self._ended.append(sequence)

    def release_adapters(self) -> None:
        """Releases the adapters of sequences that ended before the step was read. The device must be done with it."""
        while self._ended:
            self._ended.pop().lease.release()
