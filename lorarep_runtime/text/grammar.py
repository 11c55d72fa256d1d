"""Grammars of answers over a tokenizer's tokens: which tokens may come next (llguidance)."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lorarep_runtime.errors import FailedPrecondition, InvalidArgument
from lorarep_runtime.request import StructuredOutput
from lorarep_runtime.text import lark
from lorarep_runtime.text.tokenizer import Tokenizer, Vocabulary

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MAX_VOCABULARIES = 4
"""Number of vocabularies that are kept: one of 128,000 tokens takes 60 MiB, and half a second to make."""
FIRST_SECONDS, TOKEN_SECONDS = 0.25, 0.002
"""Processor seconds that an answer's grammar may take, at once and for each token more. Most take 50 µs for a token."""
WORD_BITS = 32


class Grammars:
    """Compiles forms of answers. Any thread may call it."""

    def __init__(self) -> None:
        self._vocabularies: OrderedDict[tuple[bytes, Sequence[int]], LLTokenizer] = OrderedDict()
        self._making = threading.Lock()

    def compile(self, form: StructuredOutput, tokenizer: Tokenizer, rows: int, ends: Sequence[int]) -> Grammar:
        """The grammar of an answer.

        Args:
            rows: of the head, which may be the adapter's: number of tokens that an answer may have at a place.
            ends: tokens that end the answer. They are no text.

        Raises:
            InvalidArgument: the form cannot be compiled, or takes too much time or memory.
            FailedPrecondition: the tokenizer has no end token, or its decoder makes text of tokens in a way of its own.
            Exhausted: forms of others take all the time there is.
        """
        if not ends:
            raise FailedPrecondition("the tokenizer has no end token, which ends a form", field=form.field)
        if not lark.places.acquire(timeout=lark.WAITING_SECONDS):
            raise lark.exhausted(form)
        try:
            text = lark.checked_lark(form)
            vocabulary = self._vocabulary(tokenizer.vocabulary(rows), ends)
            return Grammar(form, text, vocabulary)
        finally:
            lark.places.release()

    def _vocabulary(self, vocabulary: Vocabulary, ends: Sequence[int]) -> LLTokenizer:
        from llguidance import LLMatcher, LLTokenizer

        key = (vocabulary.digest, tuple(ends))
        with self._making:
            made = self._vocabularies.pop(key, None)
            if made is None:
                words = _Words(vocabulary, ends)
                made = LLTokenizer(words, eos_token=list(ends), n_vocab=len(vocabulary.tokens))  # type: ignore[arg-type]
                # The first mask takes a tenth of a second more than those that follow.
                LLMatcher(made, f"{lark.OPTIONS}start: %json {{}}", log_level=0).compute_bitmask()
            self._vocabularies[key] = made
            while len(self._vocabularies) > MAX_VOCABULARIES:
                self._vocabularies.popitem(last=False)
        return made


class _Words:
    """A vocabulary as `LLTokenizer` asks for it. Those of no text have a mark before their name."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary, ends: Sequence[int]) -> None:
        self.tokens = vocabulary.tokens
        self.special_token_ids = sorted({*vocabulary.special, *ends})
        self.eos_token_id = ends[0]

    def __call__(self, text: str) -> list[int]:
        raise NotImplementedError("nothing is forced (OPTIONS), so no text is made tokens")


class Grammar:
    """A form's grammar after some tokens of an answer. One thread at a time may call it.

    Args:
        form: the form that was asked for.
        text: its grammar, from `lark.checked_lark`.
        vocabulary: the tokens, one for each row of the base's head.

    Raises:
        InvalidArgument: it does not compile with these tokens.
    """

    def __init__(self, form: StructuredOutput, text: str, vocabulary: LLTokenizer) -> None:
        from llguidance import LLMatcher

        self._form = form
        self._matcher: LLMatcher = LLMatcher(vocabulary, text, log_level=0, limits=lark.limits())
        self._rows = vocabulary.vocab_size
        self._left = FIRST_SECONDS
        """Processor seconds."""
        self._check()

    def advance(self, token: int) -> None:
        """Takes in the answer's next token. Raises InvalidArgument where that takes too much."""
        began = time.thread_time()
        self._matcher.consume_token(token)
        self._left += TOKEN_SECONDS - (time.thread_time() - began)
        self._check()

    def mask(self, without: Iterable[int] = ()) -> Tensor:
        """The tokens that may come next: bits of int32 words (⌈rows / 32⌉), the lowest first.

        Args:
            without: tokens that may not come where others may.

        Raises:
            InvalidArgument: the grammar takes too much for it.
        """
        words = torch.zeros(-(-self._rows // WORD_BITS), dtype=torch.int32)
        began = time.thread_time()
        self._matcher.unsafe_compute_mask_ptr(words.data_ptr(), words.numel() * words.element_size())
        self._left -= time.thread_time() - began
        self._check()
        others = words.clone()
        for token in without:
            others[token // WORD_BITS] &= ~_bit(token)
        words = others if bool(others.any()) else words
        if not bool(words.any()):
            raise InvalidArgument("no token of the vocabulary goes on with it", field=self._form.field)
        return words

    def _check(self) -> None:
        if self._matcher.is_error():
            raise InvalidArgument(lark.reason(self._matcher.get_error()), field=self._form.field)
        if self._left < 0:
            raise InvalidArgument(
                f"takes over {FIRST_SECONDS:g} s and {TOKEN_SECONDS:g} s a token: ask for a simpler one",
                field=self._form.field,
            )


def _bit(token: int) -> int:
    """A token's bit of its word, as a signed number of 32 bits."""
    place = token % WORD_BITS
    return 1 << place if place < WORD_BITS - 1 else -(1 << place)


def allowed(masks: Tensor, rows: int) -> Tensor:
    """Masks (n, words) int32, as `Grammar.mask` gives them, as bool (n, rows), on their device."""
    places = torch.arange(WORD_BITS, dtype=torch.int32, device=masks.device)
    return ((masks.unsqueeze(-1) >> places) & 1).flatten(1)[:, :rows].bool()
