"""A lease: everything about adapters that a request has from its admission to its end."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from lorarep_runtime.adapters.claim import Claim
from lorarep_runtime.adapters.residency import Hold
from lorarep_runtime.adapters.resident import Resident
from lorarep_runtime.adapters.revision import AdapterInfo
from lorarep_runtime.errors import Exhausted
from lorarep_runtime.model.compiled_adapter import Adapter
from lorarep_runtime.model.stack import Stack
from lorarep_runtime.text.tokenizer import Tokenizer

NEVER = 1 << 62
"""An index beyond any sequence's tokens."""


class Lease:
    """A request's hold on the adapter that it computes with, and its stack and tokenizer.

    Whatever happens to an adapter's name, the request finishes on the revision that it was admitted with.

    Args:
        stack: the layers that the request walks.
        tokenizer: the adapters' own, or the base's.
        vocab_size: number of tokens of the adapter's own vocabulary, or of the base's.
        names: the adapters, as requested.
        adapters: the revisions behind the names, in the same order.
        contents: what the adapters compute, in the same order: `Revision.content` and the weight of each.
        hold: the hold on the revision or mix, which the lease takes over; None is the stack without adapters.
        invocation: tokens from whose last place on the adapter computes (aLoRA, Greenewald et al., 2025); the base does
            before, or everywhere if they are nowhere. Empty is from the first token on.
    """

    def __init__(
        self,
        stack: Stack,
        tokenizer: Tokenizer,
        vocab_size: int,
        names: tuple[str, ...] = (),
        adapters: tuple[AdapterInfo, ...] = (),
        contents: tuple[tuple[str, float], ...] = (),
        hold: Hold[Resident] | None = None,
        invocation: tuple[int, ...] = (),
    ) -> None:
        self.stack = stack
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.names = names
        self.adapters = adapters
        self.contents = contents
        self._invocation = invocation
        self._hold = hold

    @property
    def adapter(self) -> Adapter | None:
        """The adapter on the device, or None for the stack without adapters. Only after a claim that was READY."""
        return None if self._hold is None else self._hold.adapter

    def first_adapted(self, prompt: Sequence[int]) -> int:
        """Index of the first token that the adapter computes, of a prompt and its answer; `NEVER` is none."""
        if not self._invocation:
            return 0
        # As texts, backwards: `str.find` takes linear time for any of them, and `str.rfind` does not.
        text, call = ("".join(map(chr, reversed(tokens))) for tokens in (prompt, self._invocation))
        behind = text.find(call)
        return NEVER if behind < 0 else len(text) - len(call) - behind

    @property
    def has_claim(self) -> bool:
        """Whether the last claim was READY or LOADING; never for the stack without adapters."""
        return self._hold is not None and self._hold.has_claim

    @property
    def target(self) -> Hashable:
        """What a claim brings to the device: equal for leases whose claims have the same answer."""
        return None if self._hold is None else self._hold.item

    def claim(self, *, may_load: bool = True) -> Claim:
        """Has the adapter brought to the device, and keeps it there once it has come. Never blocks.

        Args:
            may_load: as for `Hold.claim`.

        Raises:
            LorarepError: it cannot be brought.
        """
        return Claim.READY if self._hold is None else self._hold.claim(may_load=may_load)

    def wait(self) -> None:
        """Blocks until the adapter is on the device.

        Raises:
            Exhausted: there is no room for it now.
            LorarepError: it cannot be brought.
        """
        if self._hold is not None and self._hold.wait() is Claim.NO_MEMORY:
            raise Exhausted(f"adapter memory: all of it is in use, none is left for {self.names}", retry_after=1.0)

    def release(self) -> None:
        """Gives the adapter back; to be called once."""
        if self._hold is not None:
            self._hold.release()
