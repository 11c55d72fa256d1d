"""A request that the engine has accepted, and how far its answer is."""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from lorarep_runtime.adapters.lease import Lease
from lorarep_runtime.config import PAGE_TOKENS
from lorarep_runtime.engine.sampler import SamplerState
from lorarep_runtime.model.batch import Span
from lorarep_runtime.model.kv_cache import PagePool, PageTable
from lorarep_runtime.model.prefix_cache import Column, PrefixKeys
from lorarep_runtime.request import Event, PromptLogprobs, Request
from lorarep_runtime.text.detokenizer import TextStream


@dataclass(eq=False)
class Sequence:
    """One request's tokens, the KV pages that they take, and the adapter that they are computed with."""

    id: int
    request: Request
    lease: Lease
    sampler: SamplerState
    text: TextStream
    on_event: Callable[[Event], None]
    table: PageTable
    tokens: list[int]
    """Token ids of prompt and answer."""
    keys: PrefixKeys | None = None
    """By which its full pages are found again; None where nobody shall find them."""
    first_adapted: int = 0
    """Index of the first token that the adapter computes; the base computes those before."""
    computed: int = 0
    """Number of tokens whose keys and values are in the cache."""
    submitted_at: float = field(default_factory=time.monotonic)
    """`time.monotonic()` seconds of the submission."""
    started_at: float | None = None
    """`time.monotonic()` seconds of the first admission; None before it."""
    first_token_at: float | None = None
    """`time.monotonic()` seconds of the answer's first token; None before it."""

    found: int = 0
    """Number of columns that were found when `cached_prefix` last looked."""
    cached_tokens: int = 0
    """Tokens of the prompt that were in the cache at the first admission."""
    prompt_parts: list[PromptLogprobs] = field(default_factory=list)
    """Log-probabilities of the prompt's tokens so far, in order, until the caller has them."""
    scored: int = 1
    """Number of tokens of the prompt whose log-probabilities are known. The first one has none."""
    is_unread: bool = False
    """Whether the device may still compute its prompt, as nobody has waited for the pass."""

    @property
    def remaining(self) -> int:
        """Number of tokens to compute before the next one can be sampled."""
        return len(self.tokens) - self.computed

    @property
    def new_tokens(self) -> int:
        """Number of tokens in the answer."""
        return len(self.tokens) - len(self.request.prompt)

    @property
    def most_left(self) -> int:
        """Most tokens that the answer may still get."""
        return self.request.stopping.max_new_tokens - self.new_tokens

    @property
    def most_computed(self) -> int:
        """Largest value that `computed` can reach: nothing follows the last token of the longest answer."""
        return len(self.request.prompt) + self.request.stopping.max_new_tokens - 1

    @property
    def needs_prompt_logits(self) -> bool:
        """Whether log-probabilities of its prompt are wanted, and some are not known yet."""
        return self.request.prompt_logprobs is not None and self.scored < len(self.request.prompt)

    def rows_to_score(self, count: int) -> range:
        """Which of its next `count` tokens have the logits of a token of the prompt whose log-probability is wanted.

        They are indices of tokens of the sequence; each has the logits of the token after it.
        """
        if not self.needs_prompt_logits:
            return range(0)
        return range(self.scored - 1, min(self.computed + count, len(self.request.prompt) - 1))

    def take_prompt_logprobs(self) -> PromptLogprobs | None:
        """Those of the whole prompt, for its caller, who gets them once; None where they are not wanted."""
        parts, self.prompt_parts = self.prompt_parts, []
        return PromptLogprobs.joined(parts) if parts else None

    def most_together(self, computed: int) -> int:
        """Most tokens that one pass may compute after some have been: the base does those before the adapter's."""
        before = self.first_adapted - computed
        return before if before > 0 else len(self.tokens)

    def span(self, count: int) -> Span:
        """The next `count` tokens, as a batch takes them: up to `most_together`."""
        return Span(
            self.tokens[self.computed : self.computed + count],
            self.computed,
            self.lease.stack,
            self.lease.adapter if self.computed >= self.first_adapted else None,
            self.table,
        )

    def cached_prefix(self, pool: PagePool) -> list[Column]:
        """The pages of its first tokens that can be found, without those of the last token: it has to be computed."""
        if self.keys is None:
            return []
        prefix = pool.prefixes.find(self.keys.known[: self._most_found])
        self.found = len(prefix)
        return prefix

    @property
    def _most_found(self) -> int:
        """Number of columns that may be found: the last token has to be computed, and each whose logits are wanted."""
        return 0 if self.needs_prompt_logits else (len(self.tokens) - 1) // PAGE_TOKENS

    def may_start(self, pool: PagePool) -> bool:
        """Whether so many pages may be free as it needs. Unlike `cached_prefix` it looks at one column at most."""
        more = self.keys.known[self.found : min(self.found + 1, self._most_found)] if self.keys is not None else []
        if pool.prefixes.find(more):
            return True
        return self.table.missing(len(self.tokens)) - self.table.depth * self.found <= pool.free

    def start(self, prefix: Seq[Column]) -> bool:
        """Takes the pages of a prefix, and pages for all other tokens; False, with nothing taken, if too few are free.

        The first admission is noted; a later one, after a preemption, changes nothing of that.
        """
        if not self.table.begin(prefix, len(self.tokens)):
            return False
        self.computed = PAGE_TOKENS * len(prefix)
        if self.started_at is None:
            self.started_at, self.cached_tokens = time.monotonic(), self.computed
        return True

    def mark_computed(self, count: int) -> None:
        """Counts `count` more tokens as computed."""
        self.computed += count

    def compute_last_again(self) -> None:
        """Has the last token computed once more in a later step: the next one could not be chosen in this one."""
        self.computed -= 1

    def give_pages_back(self, pool: PagePool) -> None:
        """Frees the KV pages; all tokens have to be computed again.

        The page table is a new one afterwards. A decoder tells by it that the pages it knows are gone.
        """
        self.table.release()
        self.table = PageTable(pool, self.table.depth)
        self.computed = 0

    def append(self, token: int, now: float) -> None:
        """Adds a token, sampled at `now` (`time.monotonic()` seconds), to the answer.

        All tokens before it have been computed, or it could not have been read: their full pages can be found now.
        """
        if self.keys is not None and len(self.tokens) // PAGE_TOKENS > self.table.published:
            self.keys.extend(self.tokens)
            self.table.publish(self.keys.known[self.table.published :])
        if self.first_token_at is None:
            self.first_token_at = now
        self.tokens.append(token)
        self.sampler.append(token)
