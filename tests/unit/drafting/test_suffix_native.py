"""The compiled index against the readable one: the same proposals, whatever happened before."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline import compiled
from paceline.drafting import suffix_native
from paceline.drafting.ngram_table import WIDTH, NgramTable, context_key, from_contexts
from paceline.drafting.speculation import Limits, Speculation
from paceline.drafting.suffix import SuffixDrafter
from paceline.drafting.suffix_index import SuffixIndex, TokenIndex
from paceline.drafting.suffix_native import NativeIndex, load_library, open_index
from paceline.errors import OptionError
from paceline.records import DraftFeatures
from toys import make_view

needs_compiler = pytest.mark.skipif(isinstance(load_library(), str), reason=str(load_library()))


def random_table(seed: int) -> NgramTable:
    """What follows some contexts of one to three of the tokens that the tests use."""
    rng = np.random.default_rng(seed)
    contexts = [context for order in (1, 2, 3) for context in product(range(5), repeat=order) if rng.random() < 0.5]
    chances = rng.dirichlet(np.ones(WIDTH + 1), len(contexts))[:, :WIDTH] * rng.integers(0, 2, (len(contexts), WIDTH))
    tokens = np.array([rng.permutation(6)[:WIDTH] for _ in contexts]).reshape(-1, WIDTH)
    keys = np.array([context_key(context) for context in contexts], dtype=np.uint64)
    return from_contexts(keys, tokens, chances, 3, "")


LIMITS = st.builds(
    Limits,
    factor=st.sampled_from([0.5, 1.0, 2.0, 4.0]),
    offset=st.sampled_from([-1.0, 0.0, 3.0]),
    min_prob=st.sampled_from([0.0, 0.1, 0.4]),
    tree=st.booleans(),
    max_match=st.integers(1, 20),
    max_places=st.integers(1, 20),
    past_weight=st.sampled_from([1.0, 0.3]),
    end_ids=st.frozensets(st.integers(0, 5), max_size=2),
    table=st.one_of(st.none(), st.integers(0, 9).map(random_table)),
)
SEQUENCES = st.lists(st.lists(st.integers(0, 4), max_size=40), max_size=8)


def native(table_bits: int) -> NativeIndex:
    index = open_index(table_bits)
    assert isinstance(index, NativeIndex)
    return index


def fill(index: TokenIndex, sequences: list[list[int]], drops: list[int]) -> None:
    for i, sequence in enumerate(sequences):
        index.extend(sequence[:7])
        index.extend(sequence[7:])
        index.end_sequence()
        if i < len(drops):
            index.drop_to(drops[i])


@needs_compiler
@settings(max_examples=300, deadline=None)
@given(SEQUENCES, st.lists(st.integers(0, 100), max_size=8), st.lists(st.integers(0, 4), max_size=60), LIMITS, st.integers(0, 20))
def test_both_propose_the_same(
    sequences: list[list[int]], drops: list[int], text: list[int], limits: Limits, max_tokens: int
) -> None:
    # Few buckets, so that hashes collide.
    past_reference, past_fast = SuffixIndex(table_bits=3), native(3)
    own_reference, own_fast = SuffixIndex(table_bits=3), native(3)
    for index in (past_reference, past_fast):
        fill(index, sequences, drops)
    assert len(past_fast) == len(past_reference)
    for start in range(0, len(text) + 1, 5):
        new = text[start : start + 5]
        expected = own_reference.look(new, past_reference, limits, max_tokens)
        assert own_fast.look(new, past_fast, limits, max_tokens) == expected
        assert own_fast.proposal().tokens == own_reference.proposal().tokens
        if expected[0]:
            assert own_fast.proposal() == own_reference.proposal()
        chains = replace(limits, tree=False)
        assert own_fast.search(own_fast, chains, max_tokens) == own_reference.search(own_reference, chains, max_tokens)


@needs_compiler
def test_both_propose_the_same_on_long_texts_of_many_tokens() -> None:
    rng = np.random.default_rng(0)
    phrases = [rng.integers(0, 50_000, rng.integers(2, 30)).tolist() for _ in range(40)]
    reference, fast = SuffixIndex(), native(13)
    past_reference, past_fast = SuffixIndex(), native(13)
    for index in (past_reference, past_fast):
        fill(index, [[*phrases[i], *phrases[i + 7]] for i in range(30)], [])
    proposals = 0
    for i in range(400):
        phrase = phrases[rng.integers(len(phrases))]
        for index in (reference, fast):
            index.extend(phrase)
            if i % 50 == 49:
                index.end_sequence()
                index.drop_to(3000)
        limits = Limits(factor=2.0, tree=bool(i % 2), past_weight=0.3)
        fast.look([], past_fast, limits, 16)
        reference.look([], past_reference, limits, 16)
        found = fast.proposal()
        assert found.tokens == reference.proposal().tokens
        assert not found.tokens or found == reference.proposal()
        proposals += len(found.tokens)
    assert proposals > 1000


@needs_compiler
def test_a_proposal_must_beat_the_one_that_is_there() -> None:
    index = native(10)
    index.extend([1, 2, 3, 1, 2])
    limits = Limits(factor=2.0)
    found = index.search(index, limits, 8)
    assert found.score == 2.0
    better = Speculation(tokens=(9,), score=2.0)
    assert index.search(index, limits, 8, better) is better
    assert index.search(index, limits, 8, Speculation(score=1.9)) == found


@needs_compiler
def test_memory_stays_within_the_bound() -> None:
    index = native(10)
    for request in range(200):
        index.extend(range(request, request + 100))
        index.end_sequence()
        index.drop_to(1000)
        assert len(index) <= 1000
    assert index.memory_bytes() < 12 * 1024 + 16 * 2000 + 1000


@needs_compiler
def test_more_places_than_there_is_room_for_are_refused() -> None:
    index = native(10)
    with pytest.raises(OptionError, match="max_places = 2000"):
        index.search(index, Limits(max_places=2000), 4)


def test_without_a_compiler_the_reference_drafts_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def always(_: DraftFeatures) -> bool:
        return True

    tokens = np.random.default_rng(1).integers(0, 6, 200).tolist()
    first = SuffixDrafter().open(make_view(tokens)).propose(12, always)
    monkeypatch.setattr(compiled, "find_compiler", lambda: None)
    suffix_native.load_library.cache_clear()
    try:
        assert "install gcc" in str(suffix_native.load_library())
        assert isinstance(open_index(), SuffixIndex)
        assert SuffixDrafter().open(make_view(tokens)).propose(12, always) == first
    finally:
        monkeypatch.undo()
        suffix_native.load_library.cache_clear()
