"""Pages that can be found again: whose they are, what they hold, and which go first."""

from __future__ import annotations

import random
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from lorarep_runtime.config import PAGE_TOKENS
from lorarep_runtime.model import kv_cache
from lorarep_runtime.model.kv_cache import KVShape, PagePool, PageTable, pages_of
from lorarep_runtime.model.prefix_cache import PrefixKeys

DEPTHS = {(0, 1): 2, (0, 1, 0): 3}


def pool_of(pages: int) -> PagePool:
    return PagePool(pages, KVShape(1, 1, 1), dtype=torch.float32, device=torch.device("cpu"))


def keys_of(tokens: list[int], stack: tuple[int, ...] = (0, 1), adapters: tuple = (), salt: str = "") -> list[bytes]:
    keys = PrefixKeys(stack, adapters, salt)
    keys.extend(tokens)
    return keys.known


def kept(pool: PagePool, tokens: list[int], stack: tuple[int, ...] = (0, 1)) -> PageTable:
    """A table that holds the tokens, whose full columns are published."""
    table = PageTable(pool, DEPTHS[stack])
    keys = keys_of(tokens, stack)
    assert table.begin(pool.prefixes.find(keys), len(tokens))
    table.publish(keys[table.published :])
    return table


def text(words: str) -> list[int]:
    return [ord(letter) for letter in words for _ in range(PAGE_TOKENS)]


def test_a_key_is_of_everything_before_its_columns_end() -> None:
    tokens = text("abc")
    keys = keys_of(tokens)
    assert len(keys) == len(set(keys)) == 3
    assert keys_of(tokens[:-1]) == keys[:2]
    assert keys_of([*tokens[:-1], 0])[:2] == keys[:2]
    for changed in (0, 20, 47):
        others = keys_of([token + (place == changed) for place, token in enumerate(tokens)])
        assert [a == b for a, b in zip(keys, others, strict=True)] == [i < changed // PAGE_TOKENS for i in range(3)]
    first = [keys[0]] + [
        keys_of(tokens, **other)[0]  # type: ignore[arg-type]
        for other in (
            dict(stack=(0, 1, 0)),
            dict(adapters=(("a", 1.0),)),
            dict(adapters=(("b", 1.0),)),
            dict(adapters=(("a", 0.5),)),
            dict(adapters=(("a", 1.0), ("b", 1.0))),
            dict(adapters=(("b", 1.0), ("a", 1.0))),
            dict(salt="a"),
            dict(salt="\ud800"),
        )
    ]
    assert len(set(first)) == len(first)


def test_keys_that_grow_with_an_answer_are_those_of_the_whole() -> None:
    tokens = text("abcd")
    keys = PrefixKeys((0, 1), (), "")
    for end in (0, 5, 16, 17, 40, 64, 64):
        keys.extend(tokens[:end])
        assert keys.known == keys_of(tokens)[: end // PAGE_TOKENS]


def test_what_nobody_uses_is_free_and_found_until_it_is_wanted() -> None:
    pool = pool_of(8)
    first = kept(pool, text("ab"))
    pages = first.pages.copy()
    first.release()
    assert (pool.free, pool.used) == (8, 0)
    again = kept(pool, text("ab"))
    assert np.array_equal(again.pages, pages)
    assert (pool.free, pool.used) == (4, 4)
    again.release()
    pool.take(8)
    assert pool.free == 0
    assert pool.prefixes.find(keys_of(text("ab"))) == []


def test_a_shared_column_is_one_and_goes_with_its_last_user() -> None:
    pool = pool_of(8)
    first, second = kept(pool, text("ab")), kept(pool, text("ac"))
    assert np.array_equal(first.pages[:, 0], second.pages[:, 0])
    assert pool.used == 6
    first.release()
    assert pool.used == 4
    second.release()
    assert pool.used == 0


def test_the_same_computed_twice_at_a_time_is_found_once() -> None:
    pool = pool_of(8)
    tables = [PageTable(pool, 2) for _ in range(2)]
    for table in tables:
        assert table.begin([], 2 * PAGE_TOKENS)
    for table in tables:
        table.publish(keys_of(text("ab")))
    (first, second) = (table.pages.copy() for table in tables)
    assert not set(first.ravel()) & set(second.ravel())
    for table in tables:
        table.release()
    assert pool.free == 8
    assert np.array_equal(kept(pool, text("ab")).pages, first)


def test_the_least_recently_used_go_first_and_ends_before_beginnings() -> None:
    pool = pool_of(12)
    for words in ("ab", "cd", "e"):
        kept(pool, text(words)).release()
    kept(pool, text("ab")).release()  # used again
    gone = []
    for _ in range(6):
        pool.take(2)
        there = [is_there(pool, words, letter) for words in ("ab", "cd", "e") for letter in words]
        gone.append("".join(letter for letter, is_kept in zip("abcde", there, strict=True) if not is_kept))
    assert gone == ["", "d", "cd", "cde", "bcde", "abcde"]


def test_what_was_computed_twice_goes_from_its_end_too() -> None:
    """Whether the second found the first's columns idle at once, or one by one as its answer grew."""
    pool = pool_of(12)
    first, second = (PageTable(pool, 2) for _ in range(2))
    for table in (first, second):
        assert table.begin([], 3 * PAGE_TOKENS)
    keys = keys_of(text("abc"))
    first.publish(keys)
    first.release()
    second.publish(keys[:2])
    second.publish(keys[2:])
    second.release()
    gone = []
    for pages in (6, 2, 2, 2):
        pool.take(pages)
        gone.append("".join(letter for letter in "abc" if not is_there(pool, "abc", letter)))
    assert gone == ["", "c", "bc", "abc"]


def is_there(pool: PagePool, words: str, letter: str) -> bool:
    key = keys_of(text(words))[words.index(letter)]
    return bool(pool.prefixes.find([key]))


def test_a_prefix_that_does_not_fit_with_the_rest_takes_nothing() -> None:
    """Its own idle pages are no room for what follows it."""
    pool = pool_of(8)
    kept(pool, text("ab")).release()
    table = PageTable(pool, 2)
    found = pool.prefixes.find(keys_of(text("abcde")))
    assert not table.begin(found, 5 * PAGE_TOKENS)
    assert (table.pages.size, table.published, pool.free) == (0, 0, 8)
    assert table.begin(found, 4 * PAGE_TOKENS)
    assert (table.published, pool.free) == (2, 0)


@dataclass
class Sequence:
    stack: tuple[int, ...]
    tokens: list[int]
    table: PageTable
    computed: int

    @property
    def keys(self) -> list[bytes]:
        return keys_of(self.tokens, self.stack)


def mark(key: bytes, position: int) -> float:
    """What a test writes to a page, in place of keys and values."""
    return float(int.from_bytes(key[:2], "little") * 8 + position + 1)


Idle = OrderedDict[tuple[tuple[int, ...], bytes], None]


def forget_evicted(pool: PagePool, idle: Idle) -> None:
    there = [bool(pool.prefixes.find([key])) for _, key in idle]
    assert there == sorted(there), "the least recently used go first"
    for _ in range(there.count(False)):
        idle.popitem(last=False)


@pytest.mark.parametrize("seed", range(6))
def test_pages_are_whose_they_are_and_hold_what_was_computed(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences that share beginnings come, grow and go in any order: compared with a model that knows no pages."""
    monkeypatch.setattr(kv_cache, "WIPED", 1)
    dice = random.Random(seed)
    pool = pool_of(dice.choice([15, 24, 40]))
    living: list[Sequence] = []
    idle: Idle = OrderedDict()
    """The model: what nobody uses, the least recently used first; some of the first may have gone."""
    hits = 0
    for _ in range(600):
        act = dice.random()
        if act < 0.3:
            stack = dice.choice(list(DEPTHS))
            tokens = text("".join(dice.choice("ab") for _ in range(dice.randint(1, 5))))[dice.choice([0, 0, 3]) :]
            keys = keys_of(tokens, stack)[: (len(tokens) - 1) // PAGE_TOKENS]
            found, table, before = pool.prefixes.find(keys), PageTable(pool, DEPTHS[stack]), pool.free
            if table.begin(found, len(tokens)):
                for column in found:
                    idle.pop((stack, column.key), None)
                    for position, page in enumerate(column.pages):
                        assert (pool.key_pages[page] == mark(column.key, position)).all()
                hits += len(found)
                living.append(Sequence(stack, tokens, table, PAGE_TOKENS * len(found)))
            else:
                assert pool.free == before
        elif act < 0.7 and living:
            sequence = dice.choice(living)
            if len(sequence.tokens) > 4 * PAGE_TOKENS:
                continue
            grown = [*sequence.tokens, *text(dice.choice("ab"))[: dice.choice([0, 0, 5, 16])]]
            if not sequence.table.grow(len(grown)):
                continue
            sequence.tokens = grown
            forget_evicted(pool, idle)
            # All of it is computed: nothing is written to what can be found.
            for place, key in enumerate(sequence.keys):
                if place >= sequence.computed // PAGE_TOKENS:
                    for position, page in enumerate(sequence.table.pages[:, place]):
                        pool.key_pages[page] = mark(key, position)
            sequence.computed = len(grown)
            sequence.table.publish(sequence.keys[sequence.table.published :])
        elif living:
            sequence = living.pop(dice.randrange(len(living)))
            mine = set(sequence.table.pages[0].tolist())
            published = sequence.keys[: sequence.table.published]
            ended = [column for key in published for column in pool.prefixes.find([key])]
            sequence.table.release()
            for column in reversed(ended):
                if (sequence.stack, column.key) in idle or (int(column.pages[0]) in mine and not column.users):
                    idle[sequence.stack, column.key] = None
                    idle.move_to_end((sequence.stack, column.key))
        pages = [set(sequence.table.pages.ravel().tolist()) for sequence in living]
        assert pool.used == len(set().union(*pages))
        for sequence in living:
            assert sequence.table.pages.shape == (DEPTHS[sequence.stack], pages_of(len(sequence.tokens)))
            for place, key in enumerate(sequence.keys[: sequence.computed // PAGE_TOKENS]):
                for position, page in enumerate(sequence.table.pages[:, place]):
                    assert (pool.key_pages[page] == mark(key, position)).all(), "another wrote to it"
        forget_evicted(pool, idle)
        assert pool.prefixes.idle_pages == sum(DEPTHS[stack] for stack, _ in idle)
    assert hits > 20
    for sequence in living:
        sequence.table.release()
    assert pool.free == pool.total
    assert len(set(pool.take(pool.total).tolist())) == pool.total
