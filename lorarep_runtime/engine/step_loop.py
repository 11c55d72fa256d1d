"""The step loop: take in, schedule, launch, emit. One thread runs it; others reach it through the inbox alone."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Seq

import torch

from lorarep_runtime.device import gil
from lorarep_runtime.engine.deadlines import Deadlines
from lorarep_runtime.engine.deferred_releases import DeferredReleases
from lorarep_runtime.engine.inbox import Inbox
from lorarep_runtime.engine.launched_step import LaunchedStep
from lorarep_runtime.engine.outputs import Outputs
from lorarep_runtime.engine.overlap import Chosen, StepOverlap
from lorarep_runtime.engine.prefill_pass import SlicedPrefill
from lorarep_runtime.engine.sampler import Sampled
from lorarep_runtime.engine.scheduler import Scheduler
from lorarep_runtime.engine.sequence import Sequence
from lorarep_runtime.engine.stats import StatsRecorder
from lorarep_runtime.errors import Cancelled, DeadlineExceeded, EngineFailure, LorarepError, Unavailable
from lorarep_runtime.failpoints import failpoint
from lorarep_runtime.request import Finished

log = logging.getLogger(__name__)

DEADLINE_POLL = 0.05
"""Seconds between looks at the deadlines of requests that wait for adapters, while there is nothing else to do."""
MAX_FAILURES = 8
"""Number of forward passes that fail one after the other until the engine counts as failed."""


class StepLoop:
    """Computes the sequences' tokens, a step at a time. All but the inbox and the stats is its thread's alone."""

    def __init__(
        self,
        inbox: Inbox,
        scheduler: Scheduler,
        overlap: StepOverlap,
        prefill: SlicedPrefill,
        outputs: Outputs,
        stats: StatsRecorder,
    ) -> None:
        self.inbox = inbox
        self.scheduler = scheduler
        self.overlap = overlap
        self.prefill = prefill
        self._outputs = outputs
        self._stats = stats
        self._releases = DeferredReleases(scheduler.pool.key_pages.device)
        self._deadlines = Deadlines()
        self._began_at = 0.0
        """`time.perf_counter()` seconds when the device began the last decode step, or shortly after."""
        self._failures = 0
        """Number of forward passes that have failed since one worked."""
        self.turns = 0
        """Number of steps that have begun, those that had nothing to do included. Any thread may read it."""

    def run(self) -> None:
        """Steps until the inbox says stop, then ends all requests with Unavailable; with EngineFailure if it fails."""
        try:
            while self.inbox.wait_for_work(self.is_busy):
                self.step_or_wait()
            self._end_all(Unavailable("the server has stopped"))
        except BaseException as error:  # libraries in Rust panic with what is no Exception
            log.exception("the engine has failed")
            self.inbox.report_failure(error)
            self._end_all(EngineFailure("the engine has failed"))
        finally:
            gil.release()

    @property
    def is_busy(self) -> bool:
        """Whether there are requests, launched work that has not been read, or adapters to be released behind it."""
        scheduler = self.scheduler
        has_requests = self.inbox.has_submitted or scheduler.running or scheduler.waiting
        return bool(has_requests or self.overlap.pending or self.prefill.pending or self._releases)

    def step_or_wait(self) -> None:
        """A step. If all sequences wait for adapters: waits until one has come or a deadline may have passed."""
        if not self.step():
            self.inbox.wait_for_news(DEADLINE_POLL)

    def step(self) -> bool:
        """Computes some tokens of some sequences; False if there was nothing to do."""
        self.turns += 1
        failpoint("step")
        self._take_in()
        if self.overlap.pending is not None:
            self._read_pending()
            self._advance_prefill()
            return True
        chosen = self._schedule()
        decoding, rest = self.overlap.divide(chosen)
        if not decoding:
            gil.release()  # no stream waits, and prompts take long
        if not chosen and self.prefill.pending is None:
            return False
        if chosen:
            self._stats.record_step([sequence for sequence, _ in (*decoding, *rest)])
        if decoding:
            self._decode(decoding)
        self._advance_prefill(rest)
        return True

    def _take_in(self) -> None:
        """Takes in all that other threads have said, and ends the requests that are cancelled or too late."""
        self._releases.release_passed()
        submitted, cancelled = self.inbox.take()
        self.scheduler.enqueue(submitted)
        for sequence in submitted:
            self._deadlines.add(sequence)
        for sequence in self._living(sorted(cancelled)):
            self._end(sequence, Cancelled("the caller cancelled"))
        for sequence in self._living(self._deadlines.pop_passed(time.monotonic())):
            held = sequence.text.finish()
            self._end(sequence, DeadlineExceeded("the request's deadline has passed", text=held))
        self._deadlines.forget_ended(self.scheduler.count, lambda number: self.scheduler.get(number) is not None)

    def _living(self, numbers: Iterable[int]) -> Iterator[Sequence]:
        """The sequences of ids, as far as they have not ended when their turn comes."""
        return (sequence for number in numbers if (sequence := self.scheduler.get(number)) is not None)

    def _schedule(self) -> list[tuple[Sequence, int]]:
        """The sequences of this step, and the number of their next tokens to compute. Reports all that has changed."""
        schedule = self.scheduler.schedule()
        self.inbox.report_waiting(schedule.preempted)
        self.inbox.report_not_waiting(schedule.admitted)
        self._stats.record_preemptions(len(schedule.preempted))
        self._record_use()
        for sequence, error in schedule.failed:
            self._end(sequence, error)
        return list(schedule.chosen.items())

    def _decode(self, chosen: Seq[Chosen]) -> None:
        """Launches a step while none is pending. If log-probabilities are asked for, reads it."""
        try:
            self._launch(chosen)
            self._choose_late()
        except Exception as error:
            self._end_failed([sequence for sequence, _ in chosen], error)
        if self.overlap.pending is not None and self.overlap.pending.has_logprobs:
            self._read(self.overlap.take_pending())

    def _choose_late(self) -> None:
        """Chooses the tokens of the pending step that depend on earlier ones: these have been read."""
        if self.overlap.pending is not None and not self.overlap.pending.is_plain:
            self.overlap.pending.choose_late()

    def _launch(self, chosen: Seq[Chosen]) -> None:
        """Launches a step, which is pending then; raises what the launch raises."""
        self.overlap.launch(chosen)
        self._began_at = time.perf_counter()
        self._failures = 0

    def _read_pending(self) -> None:
        """Emits the tokens of the pending step. If the same sequences go on, their next step is launched before."""
        step = self.overlap.take_pending()
        try:
            if self.overlap.go_on(step, has_time=self.has_time):
                self._stats.record_step(step.sequences)
                self._record_use()
        except Exception as error:
            self._end_failed(step.sequences, error)
        else:
            self._failures = 0
        self._read(step)
        step.release_adapters()
        pending = self.overlap.pending
        try:
            self._choose_late()
        except Exception as error:
            self._end_failed([] if pending is None else pending.sequences, error)

    @property
    def has_time(self) -> bool:
        """Whether the decode step is in its first quarter: a processor that is slow now is not asked for more."""
        return time.perf_counter() < self._began_at + self.prefill.pacer.decode_seconds / 4

    def _read(self, step: LaunchedStep) -> None:
        """Waits for the tokens of a step and emits them."""
        # 1. Other threads have the GIL while the device computes.
        gil.release(self._began_at + self.prefill.pacer.decode_seconds)
        sampled: Seq[tuple[Sequence, Sampled]] = ()
        try:
            sampled = step.sampled()
        except Exception as error:
            self._end_failed(step.sequences, error)
        else:
            self._failures = 0
        # 2. They do not have it from here to the next read, unless no sequence is left.
        gil.claim()
        self._began_at = time.perf_counter()
        self._emit(sampled)
        if step.is_steady:
            self.prefill.pacer.record_decode(step.milliseconds)
        if not self.scheduler.running:
            gil.release()

    def _advance_prefill(self, chosen: Seq[tuple[Sequence, int]] = ()) -> None:
        """Begins a prefill pass or goes on with the pending one, and emits the tokens of one that is over."""
        if not chosen and self.prefill.pending is None:
            return
        try:
            self.prefill.begin_or_go_on(chosen)
        except Exception as error:
            pending = self.prefill.pending
            self._end_failed([s for s, _ in chosen] if pending is None else pending.sequences, error)
        else:
            self._failures = 0
        finished = self.prefill.take_finished()
        if finished is not None:
            self._emit(finished.sampled or ())
            self._releases.add(finished.take_ended())

    def _emit(self, sampled: Seq[tuple[Sequence, Sampled]]) -> None:
        """Adds tokens to the answers of sequences that have not ended meanwhile, and ends those that are done."""
        for sequence, token in sampled:
            if sequence not in self.scheduler.running:
                continue
            end: Finished | LorarepError | None
            try:
                end = self._outputs.add_token(sequence, token)
            except LorarepError as error:
                end = error
            if end is not None:
                self._end(sequence, end)

    def _end_failed(self, sequences: Seq[Sequence], error: Exception) -> None:
        """Ends sequences whose forward pass has raised an error; the others go on.

        Raises:
            Exception: the error itself, if it is the last of MAX_FAILURES with no pass that worked between them.
        """
        log.exception("a forward pass failed")
        device = self.scheduler.pool.key_pages.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # a lost device raises again here and ends the engine
        for sequence in sequences:
            if sequence in self.scheduler.running:
                self._end(sequence, EngineFailure("the forward pass failed"))
        self._failures += 1
        if self._failures == MAX_FAILURES:
            raise error

    def _end(self, sequence: Sequence, event: Finished | LorarepError) -> None:
        """Gives back what a sequence holds and tells its caller the last event."""
        try:
            self.scheduler.remove(sequence)
            if self.prefill.is_computing(sequence):
                self.prefill.drop(sequence)
            elif sequence.is_unread:
                self._releases.add([sequence.lease])
            else:
                self.overlap.release_adapter(sequence)
            self.inbox.report_not_waiting([sequence])
            self._record_use()
        finally:  # nobody would end it again
            self._outputs.tell(sequence, event)

    def _end_all(self, error: LorarepError) -> None:
        self._take_in()
        for sequence in [*self.scheduler.running, *self.scheduler.waiting]:
            try:
                self._end(sequence, error)
            except Exception:
                log.exception("what a request held could not be given back")
        self.overlap.release_adapters()
        self.prefill.release_adapters()
        self._releases.release_all()

    def _record_use(self) -> None:
        self._stats.record_use(self.scheduler.running, self.scheduler.pool.used)
