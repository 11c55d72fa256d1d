"""The requests that wait, in groups: those of one group want the same adapter, and start in order of arrival.

A step looks at the first of each group alone, so its cost does not grow with the requests that wait for one adapter.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Hashable, Iterator
from collections.abc import Sequence as Seq

from lorarep_runtime.engine.sequence import Sequence


class Group:
    """Waiting sequences that want the same adapter, or none. Never empty in a queue."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        """The adapter's, as requested."""
        self._sequences: OrderedDict[Sequence, None] = OrderedDict()

    def __bool__(self) -> bool:
        return bool(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences)

    @property
    def first(self) -> Sequence:
        """The one that starts next."""
        return next(iter(self._sequences))

    def without_claim(self) -> Seq[Sequence]:
        """The last ones, as long as they have never had a claim that was granted."""
        found: list[Sequence] = []
        for sequence in reversed(self._sequences):
            if sequence.lease.has_claim:
                break
            found.append(sequence)
        return found[::-1]

    def append(self, sequence: Sequence) -> None:
        """Lets a sequence start after all others."""
        self._sequences[sequence] = None

    def prepend(self, sequence: Sequence) -> None:
        """Lets a sequence start before all others."""
        self._sequences[sequence] = None
        self._sequences.move_to_end(sequence, last=False)

    def discard(self, sequence: Sequence) -> None:
        """Takes a sequence out, if it is there."""
        self._sequences.pop(sequence, None)


class WaitingQueue:
    """All waiting sequences. Everything but iteration takes the same time however many there are."""

    def __init__(self) -> None:
        self._groups: dict[Hashable, Group] = {}

    def __bool__(self) -> bool:
        return bool(self._groups)

    def __iter__(self) -> Iterator[Sequence]:
        return (sequence for group in self._groups.values() for sequence in group)

    @property
    def groups(self) -> Collection[Group]:
        """One for each adapter that is waited for."""
        return self._groups.values()

    def append(self, sequence: Sequence) -> None:
        """Adds a sequence behind the others of its group."""
        self._group(sequence).append(sequence)

    def prepend(self, sequence: Sequence) -> None:
        """Adds a sequence before the others of its group."""
        self._group(sequence).prepend(sequence)

    def discard(self, sequence: Sequence) -> None:
        """Takes a sequence out, if it is there."""
        key = _key(sequence)
        if (group := self._groups.get(key)) is not None:
            group.discard(sequence)
            if not group:
                del self._groups[key]

    def _group(self, sequence: Sequence) -> Group:
        return self._groups.setdefault(_key(sequence), Group(sequence.lease.names))


def _key(sequence: Sequence) -> Hashable:
    return sequence.lease.names, sequence.lease.target
