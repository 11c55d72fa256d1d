"""Masks of answers that have a form: made in threads of their own while the device computes the logits they are for."""

from __future__ import annotations

import time
from collections.abc import Iterable
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait

from torch import Tensor

from lorarep_runtime.errors import InvalidArgument, LorarepError
from lorarep_runtime.text.grammar import Grammar

THREADS = 4
"""They hold the GIL for moments alone. Four, so that a few slow grammars do not keep the others' waiting."""
PATIENCE = 0.01
"""Seconds for which a step waits for masks that take longer than the device: other streams wait with it."""
MOST_SECONDS = 10.0
"""Seconds after which a mask that is not there ends its answer."""


def mask_threads() -> Executor:
    """The threads that make masks."""
    return ThreadPoolExecutor(THREADS, thread_name_prefix="lorarep-mask")


class MaskedAnswer:
    """The mask of an answer's next token. The threads have the grammar; all else is the step loop's thread's.

    Args:
        grammar: of an answer without tokens.
        without: tokens that may not come next where others may.

    Raises:
        InvalidArgument: the grammar takes too much for its first mask.
    """

    def __init__(self, grammar: Grammar, threads: Executor, without: Iterable[int] = ()) -> None:
        self._grammar = grammar
        self._threads = threads
        self._next: Future[Tensor] | None = None
        """The mask that is being made."""
        self._asked_at = 0.0
        self._is_late = False
        """Whether a step has waited for it in vain."""
        self._mask: Tensor = grammar.mask(without)
        self._error: LorarepError | None = None

    def advance(self, token: int, without: Iterable[int] = ()) -> None:
        """Begins with the mask of the token after `token`, the answer's last one."""
        self._is_late, self._asked_at = False, time.monotonic()
        self._next = self._threads.submit(_advance, self._grammar, token, tuple(without))

    @property
    def mask(self) -> Tensor | None:
        """Bits of the tokens that may come, int32 (words) on the CPU; None if there is an error."""
        return None if self._error is not None else self._mask

    @property
    def error(self) -> LorarepError | None:
        """The error of the last mask, which ends the answer."""
        return self._error

    def take(self) -> bool:
        """Whether the mask is there, or an error in its place."""
        if self._next is None:
            return True
        if not self._next.done():
            if time.monotonic() < self._asked_at + MOST_SECONDS:
                return False
            self._error = InvalidArgument(f"takes over {MOST_SECONDS:g} s for a token", field="structured_output")
        elif (error := self._next.exception()) is None:
            self._mask = self._next.result()
        elif isinstance(error, LorarepError):
            self._error = error
        else:
            raise error
        self._next = None
        return True


def _advance(grammar: Grammar, token: int, without: Iterable[int]) -> Tensor:
    grammar.advance(token)
    return grammar.mask(without)


def take_masks(answers: Iterable[MaskedAnswer | None]) -> list[bool]:
    """Whether the mask of each answer is there, after a moment's wait for those that are not. One without needs none.

    A mask that was waited for once is not waited for again: its answer goes on when it is there.
    """
    answers = list(answers)
    awaited = [
        answer._next for answer in answers if answer is not None and answer._next is not None and not answer._is_late
    ]
    if awaited:
        wait(awaited, PATIENCE)
    ready = [answer is None or answer.take() for answer in answers]
    for answer, is_ready in zip(answers, ready, strict=True):
        if answer is not None:
            answer._is_late = not is_ready
    return ready
