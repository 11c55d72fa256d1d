"""Which sequences take part in the next step, and with how many of their tokens.

Sequences that decode come first, with one token each. Prompts fill the rest of the step (Agrawal et al., 2024): first
those of the adapters with the fewest running sequences, then in order of arrival. When pages run short the youngest
sequence gives its own back and is computed again later (Kwon et al., 2023). Where all stacks together would make a step
long, they take turns.

A sequence claims its adapter when its turn has come. Others pass those whose adapter is still loading. But when there
is no memory for one, nobody has another adapter loaded until there is, or that one might wait for ever. Only who finds
an adapter on the device may pass, and only if that adapter is free again before any can go that is in use already.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field

from lorarep_runtime.adapters.claim import Claim
from lorarep_runtime.adapters.residency import Residency
from lorarep_runtime.config import PAGE_TOKENS, SchedulerConfig
from lorarep_runtime.engine.plans import Plans
from lorarep_runtime.engine.sequence import Sequence
from lorarep_runtime.engine.stack_turns import StackTurns
from lorarep_runtime.engine.waiting_queue import Group, WaitingQueue
from lorarep_runtime.errors import LorarepError
from lorarep_runtime.model.kv_cache import PagePool
from lorarep_runtime.model.plan import Plan

STEP_TOKENS, CPU_STEP_TOKENS = 2048, 512


def were_first(streams: Iterable[Sequence], prompts: Iterable[Sequence]) -> bool:
    """Whether a stream had its first token before all of the prompts arrived.

    Such a stream is slowed down no more than to twice its time for a token. Others have passed these prompts, which
    then go first: of requests that arrive together none waits for its first token while others have many.
    """
    arrived = min((prompt.submitted_at for prompt in prompts), default=float("inf"))
    return any(stream.first_token_at is not None and stream.first_token_at < arrived for stream in streams)


@dataclass
class Schedule:
    """One step's sequences, and all that changed when they were chosen."""

    chosen: dict[Sequence, int] = field(default_factory=dict)
    """Number of next tokens to compute for each sequence. Their pages are taken."""
    preempted: list[Sequence] = field(default_factory=list)
    """Sequences that gave their pages back and wait again."""
    admitted: list[Sequence] = field(default_factory=list)
    """Sequences that waited, or were preempted just now, and run from this step on."""
    failed: list[tuple[Sequence, LorarepError]] = field(default_factory=list)
    """Sequences whose adapter cannot be brought to the device. They wait no longer; the caller removes them."""


class Scheduler:
    """The sequences that wait and those that hold pages. The step loop's thread alone touches it."""

    def __init__(
        self,
        config: SchedulerConfig,
        pool: PagePool,
        residency: Residency,
        max_sequences: int,
        layers: int,
        plans: Plans,
        scored_rows: Callable[[int], int] = lambda vocabulary: CPU_STEP_TOKENS,
    ) -> None:
        """
        Args:
            max_sequences: most sequences in one step, whatever the config says.
            layers: of the base.
            plans: those that steps may walk.
            scored_rows: from the largest vocabulary of a step, its most tokens of prompts whose log-probabilities are
                wanted.
        """
        self.config = config
        self.pool = pool
        self._residency = residency
        default = CPU_STEP_TOKENS if pool.key_pages.device.type == "cpu" else STEP_TOKENS
        self._max_step_tokens = config.max_step_tokens or default
        self._max_sequences = max_sequences
        self._scored_rows = scored_rows
        self._scored = 0
        """Tokens of prompts in the step whose log-probabilities are wanted."""
        self._plans = plans
        self._turns = StackTurns(layers, plans)
        self.waiting = WaitingQueue()
        self.running: dict[Sequence, None] = {}
        """In order of arrival; a dict, in which a sequence is found at once among many."""
        self._by_id: dict[int, Sequence] = {}
        """All that wait or run."""
        self._prefilling: Collection[Sequence] = ()
        """Sequences of the pending prefill pass: they keep their pages, and no prompt begins before it is over."""
        # Of the last round of claims: groups that had to wait, whether there was memory, and when that was.
        self._passed: set[Group] = set()
        self._has_room = True
        self._version = 0
        # While there is no memory for a claim: sequences that have passed it, and those that decide who may.
        self._passing: set[Sequence] = set()
        self._next_to_end: Collection[Sequence] = ()

    def enqueue(self, sequences: Iterable[Sequence]) -> None:
        """Appends new sequences to the queue."""
        for sequence in sequences:
            self._by_id[sequence.id] = sequence
            self.waiting.append(sequence)

    def get(self, sequence_id: int) -> Sequence | None:
        """The sequence of an id, if it waits or runs."""
        return self._by_id.get(sequence_id)

    @property
    def count(self) -> int:
        """Number of sequences that wait or run."""
        return len(self._by_id)

    def remove(self, sequence: Sequence) -> None:
        """Takes a sequence out and frees its pages. Those of a pending prefill pass are the pass's to free."""
        del self._by_id[sequence.id]
        self._plans.leave(sequence.lease.stack)
        if sequence in self.running:
            del self.running[sequence]
        else:
            self.waiting.discard(sequence)
        if sequence not in self._prefilling:
            sequence.table.release()

    def plan_of(self, sequences: Iterable[Sequence]) -> Plan:
        """A plan that holds the stacks of some sequences of the last schedule, and maybe others of it."""
        return self._turns.plan_of({sequence.lease.stack for sequence in sequences})

    def begin_prefill(self, sequences: Collection[Sequence]) -> None:
        """Has sequences keep their pages, and every prompt wait, until `end_prefill`: a pass over them is pending."""
        self._prefilling = sequences

    def end_prefill(self) -> None:
        """Lets the sequences of the pass decode or be preempted, and other prompts begin."""
        self._prefilling = ()

    def schedule(self) -> Schedule:
        """Chooses the sequences of the next step, takes their pages and admits waiting ones."""
        schedule = Schedule()
        self._scored = 0
        budget = self._continue_running(schedule, self._max_step_tokens)
        if not self._prefilling:
            self._admit(schedule, budget)
        return schedule

    def _continue_running(self, schedule: Schedule, budget: int) -> int:
        """Chooses sequences that decode, then prompts that are partly computed; both in order of arrival.

        Returns:
            Number of tokens that the step has left of its budget.
        """
        chosen = schedule.chosen
        free = [s for s in self.running if not self._prefilling or (s not in self._prefilling and s.remaining == 1)]
        late = self._turns.begin_step(sequence.lease.stack for sequence in free)
        for sequence in sorted(free, key=lambda s: s.remaining > 1):
            if late and sequence.lease.stack in late:
                continue
            remaining = min(sequence.remaining, sequence.most_together(sequence.computed))
            if sequence in self.running and (count := self._share(sequence, remaining, budget, alone=not chosen)):
                if not self._make_room(sequence, count, schedule):
                    continue
                budget -= self._choose(sequence, count, schedule)
        return budget

    def _admit(self, schedule: Schedule, budget: int) -> None:
        """Starts waiting sequences while there are places, tokens and pages for them."""
        self._passed, self._has_room, self._version = set(), True, self._residency.version
        self._passing.intersection_update(self.running)
        while len(self.running) < self._max_sequences and (candidates := self._candidates()):
            group = self._next(candidates)
            sequence = self._claim_first(group, schedule)
            if sequence is None:
                self._passed.add(group)
                continue
            if budget <= 0:
                break
            if not sequence.may_start(self.pool):  # asked in each step while it waits
                break
            prefix = sequence.cached_prefix(self.pool)
            found = PAGE_TOKENS * len(prefix)
            remaining = min(sequence.remaining - found, sequence.most_together(found))
            count = self._share(sequence, remaining, budget, alone=not schedule.chosen)
            # Room for the whole prompt, or it would be preempted half-way.
            if not count or not sequence.start(prefix):
                break
            self.waiting.discard(sequence)
            self.running[sequence] = None
            schedule.admitted.append(sequence)
            if self._turns.joins(sequence.lease.stack):  # else its turn comes in the next step
                budget -= self._choose(sequence, count, schedule)
        if self._has_room:
            self._passing.clear()

    def would_choose_only(self, sequences: Collection[Sequence]) -> bool:
        """Whether a step now would be of these decoding sequences and no others, if their pages are there."""
        return (
            sum(s not in self._prefilling for s in self.running) == len(sequences)
            and not self._can_admit
            and all(s in self.running for s in sequences)
        )

    @property
    def _can_admit(self) -> bool:
        """Whether a waiting sequence might start, if its pages are there."""
        if self._prefilling or len(self.running) == self._max_sequences:
            return False
        return bool(self._candidates()) or bool(self.waiting and self._version != self._residency.version)

    def _candidates(self) -> list[Group]:
        """The groups that neither a limit of their adapter nor its absence from the device holds back."""
        most = self.config.max_running_per_adapter
        running = self._running_by_adapter()
        return [
            group
            for group in self.waiting.groups
            if group not in self._passed and (most is None or running[group.names] < most)
        ]

    def _running_by_adapter(self) -> Counter[tuple[str, ...]]:
        return Counter(sequence.lease.names for sequence in self.running)

    def _next(self, candidates: list[Group]) -> Group:
        """The group whose first sequence starts next.

        One that was preempted goes ahead, and then one whose adapter has been brought for it. Otherwise it is that of
        the adapter with the fewest running, so that a flood for one adapter does not starve the others, and of these
        the oldest.
        """
        running = self._running_by_adapter()

        def turn(group: Group) -> tuple[int, int]:
            first = group.first
            return -2 if first.started_at else -1 if first.lease.has_claim else running[group.names], first.id

        return min(candidates, key=turn)

    def _claim_first(self, group: Group, schedule: Schedule) -> Sequence | None:
        """Claims the adapter for the first of a group. Those of the group fail for which it cannot be brought.

        Returns:
            The first sequence if the adapter is on the device, where it stays for the sequence from then on.
        """
        may_load = self._has_room or not group.names
        while group and (may_load or self._may_pass(group.first)):
            sequence = group.first
            claim = self._claim(sequence, schedule, may_load=may_load)
            if claim is Claim.READY:
                if not may_load:
                    self._passing.add(sequence)
                return sequence
            if claim is Claim.LOADING:
                # They hear of the load's end, too. Who has claimed once need not again while the first one waits.
                for other in group.without_claim():
                    self._claim(other, schedule, may_load=may_load)
            if claim is not None:
                self._has_room &= claim is not Claim.NO_MEMORY
                return None
        return None

    def _claim(self, sequence: Sequence, schedule: Schedule, *, may_load: bool) -> Claim | None:
        """The answer to a sequence's claim; None if it fails, after which it waits no longer."""
        try:
            return sequence.lease.claim(may_load=may_load)
        except LorarepError as error:
            self.waiting.discard(sequence)
            schedule.failed.append((sequence, error))
            return None

    def _may_pass(self, sequence: Sequence) -> bool:
        """Whether a sequence may compute although an earlier claim has no memory.

        The claim waits for adapters in use. It waits no longer if the sequence ends, at its longest, before the first
        of these adapters is free. Once that is free, nobody passes any more before those have ended that did: so the
        claim is tried again and again with none of them in its way.
        """
        if not self._passing:
            users: dict[tuple[str, ...], list[Sequence]] = defaultdict(list)
            for other in self.running:
                if other.lease.names:
                    users[other.lease.names].append(other)
            self._next_to_end = min(users.values(), key=_most_left, default=())
        passes = len(sequence.tokens) // self._max_step_tokens + 1 + (sequence.first_adapted > 0)
        steps = passes + sequence.most_left
        return steps <= _most_left([other for other in self._next_to_end if other in self.running])

    def _choose(self, sequence: Sequence, count: int, schedule: Schedule) -> int:
        """Chooses a sequence with its next `count` tokens, and returns this count."""
        schedule.chosen[sequence] = count
        if sequence.needs_prompt_logits:
            self._scored += count
        return count

    def _share(self, sequence: Sequence, remaining: int, budget: int, *, alone: bool) -> int:
        """Number of a sequence's remaining tokens that go into the rest of the step."""
        if sequence.needs_prompt_logits:
            # Logits of a step are as wide as the largest vocabulary of its adapters.
            widest = max(other.lease.vocab_size for other in (sequence, *self.running))
            remaining = max(0, min(remaining, self._scored_rows(widest) - self._scored))
        if self.config.chunked_prefill:
            return min(remaining, budget)
        # Prompts stay whole; one that is longer than a step gets a step of its own.
        return remaining if remaining <= budget or alone else 0

    def _make_room(self, sequence: Sequence, count: int, schedule: Schedule) -> bool:
        """Takes pages for the next tokens, from the youngest sequences where none are free.

        Returns:
            False if the sequence itself was the youngest and has been preempted.
        """
        while not sequence.table.grow(sequence.computed + count):
            youngest = next(s for s in reversed(self.running) if s not in self._prefilling)
            self._preempt(youngest, schedule)
            if youngest is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence, schedule: Schedule) -> None:
        del self.running[sequence]
        sequence.give_pages_back(self.pool)
        self.waiting.prepend(sequence)
        schedule.chosen.pop(sequence, None)
        schedule.preempted.append(sequence)


def _most_left(sequences: Iterable[Sequence]) -> int:
    """Most tokens that any of the sequences still answers."""
    return max((sequence.most_left for sequence in sequences), default=0)
