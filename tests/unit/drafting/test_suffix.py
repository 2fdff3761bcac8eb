from __future__ import annotations

import threading
from array import array
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.drafting.ngram_table import WIDTH, NgramTable, context_key, from_contexts
from paceline.drafting.registry import parse_spec
from paceline.drafting.speculation import Limits, Place, Speculation, agreement, followers, path_walk, speculate
from paceline.drafting.suffix import OutputStore, SuffixDrafter, SuffixOptions
from paceline.drafting.suffix_index import SuffixIndex
from paceline.drafting.suffix_native import open_index
from toys import make_view
from unit.drafting.kit import always

R1 = [1, 2, 3, 4, 1, 2, 3, 5, 1, 2, 3, 4]
R2 = [9, 2, 3, 4]


def index_of(*sequences: list[int]) -> SuffixIndex:
    index = SuffixIndex(table_bits=10)
    for i, sequence in enumerate(sequences):
        if i:
            index.end_sequence()
        index.extend(sequence)
    return index


def ask(index: SuffixIndex, context: list[int], limits: Limits, max_tokens: int = 5) -> Speculation:
    return speculate(index, array("i", context), replace(limits, max_places=100), max_tokens)


def ask_store(store: OutputStore, context: list[int]) -> tuple[int, ...]:
    text = open_index()
    store.look(text, context, Limits(factor=2.0), 4)
    return text.proposal().tokens


def all_places(index: SuffixIndex, context: list[int]) -> list[Place]:
    return [place for places in index.places(array("i", context), 1000) for place in places]


def test_counts_are_those_of_the_suffix_tree() -> None:
    index = index_of(R1, R2)

    def counts(context: list[int]) -> tuple[int, dict[int, int]]:
        places = [p for p in all_places(index, context) if p.matched == len(context)]
        found = followers(index.tokens, [p.start for p in places])
        return len(places), {token: len(behind) for token, behind in found.items()}

    assert counts([2, 3]) == (4, {4: 3, 5: 1})
    assert counts([1, 2, 3]) == (3, {4: 2, 5: 1})


def test_worked_example_of_adaptive_length() -> None:
    # The note's tree is 8 deep, which ends the second draft after 5 tokens; here the budget does.
    index = index_of(R1, R2)
    found = ask(index, [7, 1, 2, 3], Limits(factor=1.0))
    assert found.tokens == (4, 1, 2)
    assert np.cumprod(found.confidences) == pytest.approx([2 / 3, 1 / 3, 1 / 3])
    assert (found.score, found.matched) == (pytest.approx(4 / 3), 3)
    found = ask(index, [7, 1, 2, 3], Limits(factor=2.0))
    assert found.tokens == (4, 1, 2, 3, 5)
    assert found.score == pytest.approx(2.0)
    found = ask(index, [7, 1, 2, 3], Limits(factor=2.0, min_prob=0.5))
    assert (found.tokens, found.confidences, found.matched) == ((4,), (0.75,), 2)


def test_a_text_that_ends_like_the_context_halves_the_estimate() -> None:
    found = ask(index_of([1, 2, 3, 1, 2]), [9, 1, 2], Limits(factor=2.0))
    assert found.tokens == (3, 1, 2)
    assert np.cumprod(found.confidences).tolist() == [0.5, 0.5, 0.5]
    assert found.score == 1.5


def test_tree_walk_emits_paths_by_probability() -> None:
    index = index_of([1, 2, 5, 6], [1, 2, 5, 7], [1, 2, 8, 9])
    found = ask(index, [0, 1, 2], Limits(factor=3.0, tree=True), max_tokens=6)
    assert found.parents is not None
    assert found.tokens[0] == 5
    paths = {}
    for i, (token, parent) in enumerate(zip(found.tokens, found.parents, strict=True)):
        paths[i] = (*paths.get(parent, ()), token)
    assert set(paths.values()) == {(5,), (5, 6), (5, 7), (8,), (8, 9)}
    probs = [2 / 3, 1 / 3, 1 / 3, 1 / 3, 1 / 3]
    assert found.score == pytest.approx(sum(probs))


def vote(text: list[int], past: list[list[int]], limits: Limits, max_tokens: int = 8) -> Speculation:
    index, outputs = index_of(text), index_of(*past)
    outputs.end_sequence()
    return index.vote(outputs, replace(limits, tree=True), max_tokens)


def test_places_vote_with_the_square_of_their_match_and_some_votes_are_for_nothing() -> None:
    # 1 2 -> 5 agrees in two tokens, 2 -> 6 in one: votes 4, 1 and 3 * 2 for nothing; one step deeper 3 * 2 / 1.5.
    found = vote([1, 2, 5, 7, 2, 6, 1, 2], [[]], Limits(min_prob=0.12))
    assert (found.tokens[:2], (found.parents or ())[:2], found.matched) == ((5, 7), (-1, 0), 2)
    assert found.confidences[:2] == pytest.approx((4 / 11, 4 / 8))
    assert found.score == pytest.approx(4 / 11 * (1 + 4 / 8))
    both = vote([1, 2, 5, 7, 2, 6, 1, 2], [[]], Limits(min_prob=0.05, end_ids=frozenset({5, 6})))
    roots = {t: c for t, p, c in zip(both.tokens, both.parents or (), both.confidences, strict=True) if p < 0}
    assert roots == pytest.approx({5: 4 / 11, 6: 1 / 11})


def test_votes_for_nothing_grow_with_the_longest_match_up_to_eight_tokens() -> None:
    def first(length: int) -> float:
        phrase = list(range(10, 10 + length))
        return vote([*phrase, 5, 6, *phrase], [[]], Limits()).confidences[0]

    assert [first(m) for m in (1, 2, 8, 20)] == pytest.approx([1 / 4, 4 / 10, 64 / 88, 400 / 424])


def table_of(chances: dict[tuple[int, ...], dict[int, float]]) -> NgramTable:
    keys = np.array([context_key(context) for context in chances], dtype=np.uint64)
    tokens, best = np.zeros((len(keys), WIDTH), np.int64), np.zeros((len(keys), WIDTH))
    for row, following in enumerate(chances.values()):
        tokens[row, : len(following)], best[row, : len(following)] = list(following), list(following.values())
    return from_contexts(keys, tokens, best, 3, "")


def test_what_no_place_knows_is_what_the_table_says() -> None:
    table = table_of({(2,): {7: 0.5, 8: 0.25}, (2, 7): {9: 0.75}})
    limits = Limits(table=table, min_prob=0.1)
    alone = vote([4, 3, 2], [[]], limits)
    assert (alone.tokens, alone.parents, alone.matched) == ((7, 9, 8), (-1, 0, -1), 0)
    assert alone.confidences == pytest.approx((0.5, 0.75, 0.25), abs=0.003)
    # A place of one token says 8: one vote of its own, and of the three for anything else the table's share.
    joined = vote([2, 8, 3, 2], [[]], limits)
    firsts = {t: c for t, p, c in zip(joined.tokens, joined.parents or (), joined.confidences, strict=True) if p < 0}
    assert firsts == pytest.approx({7: 3 * 0.5 / 4, 8: (1 + 3 * 0.25) / 4}, abs=0.003)


def test_a_table_drafts_from_the_first_token_on_and_its_evidence_is_the_chance() -> None:
    signals = []
    for chance in (0.15, 0.3, 0.5, 0.62, 0.75, 0.85, 0.92, 0.99):
        session = SuffixDrafter(tree=True, table=table_of({(3,): {9: chance}}), row_cost=0.05).open(make_view([3]))
        assert session.outlook(4).available == 1
        signals.append(session.outlook(4).signal)
    assert signals == [1, 2, 3, 4, 6, 8, 12, 17]


def test_dear_rows_cut_a_tree_shorter() -> None:
    table = table_of({(3,): {9: 0.6, 8: 0.15, 7: 0.05}})
    widths = [
        SuffixDrafter(tree=True, table=table, row_cost=cost).open(make_view([3])).outlook(8).available for cost in (0, 0.05, 1)
    ]
    assert widths == [3, 2, 1]


def test_past_outputs_vote_in_the_same_tree() -> None:
    for weight, expected in ((0.5, [5, 8]), (2.0, [8, 5])):
        found = vote([1, 2, 5, 7, 3, 1, 2], [[0, 1, 2, 8]], Limits(factor=1.0, past_weight=weight, end_ids=frozenset({5, 8})))
        assert found.parents is not None
        assert [token for token, parent in zip(found.tokens, found.parents, strict=True) if parent < 0] == expected


def test_a_single_place_neither_agrees_nor_contradicts() -> None:
    def first(text: list[int]) -> int:
        places = all_places(index_of(text), [1, 2])
        starts = [place.start for place in places if place.matched == 2]
        return agreement(path_walk(array("i", text), starts, 4, Limits(), 2, grows=False))

    assert first([4, 1, 2, 5, 4, 1, 2]) == 0
    assert first([4, 1, 2, 5, 8, 4, 1, 2, 5, 9, 4, 1, 2]) == 1
    assert first([4, 1, 2, 5, 8, 4, 1, 2, 6, 9, 4, 1, 2, 7, 0, 4, 1, 2]) == -1


def test_a_tree_of_one_path_is_verified_as_a_chain() -> None:
    found = vote([4, 1, 2, 5, 6, 7, 4, 1, 2], [[]], Limits())
    assert (found.parents or ())[:3] == (-1, 0, 1)
    assert found.draft(3, "x").parents is None
    forked = vote([4, 1, 2, 5, 8, 4, 1, 2, 6, 9, 4, 1, 2], [[]], Limits(min_prob=0.2))
    assert forked.draft(1, "x").parents is None
    assert forked.draft(2, "x").parents == (-1, -1)


@given(
    st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=20), min_size=1, max_size=4),
    st.permutations([0, 1, 2, 3]),
    st.integers(1, 4),
    st.sampled_from([0.0, 0.1, 0.3]),
)
def test_shares_of_votes_equal_counting_from_the_definition(
    past: list[list[int]], order: list[int], length: int, min_prob: float
) -> None:
    text = order[:length]  # no token twice: all places are in past outputs
    found = vote(text, past, Limits(factor=9.0, min_prob=min_prob, max_places=1000), max_tokens=40)
    votes = []
    for output in past:
        for at in range(1, len(output) + 1):
            matched = next((m for m in range(min(at, length), 0, -1) if output[at - m : at] == text[-m:]), 0)
            votes.append((matched**2, output[at:]))
    unknown = 3.0 * max((m for m in range(length, 0, -1) if any(weight == m * m for weight, _ in votes)), default=0)
    paths: list[list[int]] = []
    reached: list[float] = []
    for token, parent, share in zip(found.tokens, found.parents or (), found.confidences, strict=True):
        above = paths[parent] if parent >= 0 else []
        paths.append([*above, token])
        reached.append(share * (reached[parent] if parent >= 0 else 1.0))
        asked = sum(weight for weight, rest in votes if rest[: len(above)] == above)
        said = sum(weight for weight, rest in votes if rest[: len(paths[-1])] == paths[-1])
        assert share == pytest.approx(said / (asked + unknown / (1.0 + 0.5 * len(above))))
        assert reached[-1] >= min_prob - 1e-12
    assert reached == sorted(reached, reverse=True) or reached == pytest.approx(sorted(reached, reverse=True))
    assert len({tuple(path) for path in paths}) == len(paths)
    firsts = {rest[0] for weight, rest in votes if weight and rest}
    if not min_prob and len(found.tokens) < 40:
        assert firsts == {path[0] for path in paths if len(path) == 1}


def naive_path(sequences: list[list[int]], context: list[int], matched: int, budget: int) -> list[float]:
    """Path probabilities straight from the definition of the counts."""
    node = context[len(context) - matched :]
    probs: list[float] = []

    def count(pattern: list[int]) -> int:
        return sum(s[i : i + len(pattern)] == pattern for s in sequences for i in range(len(s) - len(pattern) + 1))

    path = 1.0
    while len(probs) < budget:
        children = Counter({t: count([*node, t]) for t in range(4)})
        token, best = children.most_common(1)[0]
        if best == 0 or sorted(children.values())[-2] == best:  # ties may be broken either way
            break
        path *= best / count(node)
        if path < 0.1:
            break
        probs.append(path)
        node = [*node, token]
    return probs


@given(
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=25), min_size=1, max_size=3),
    st.lists(st.integers(0, 3), min_size=1, max_size=6),
)
def test_estimates_equal_counting_from_the_definition(sequences: list[list[int]], context: list[int]) -> None:
    index = index_of(*sequences)
    places = all_places(index, context)
    longest = places[0].matched if places else 0
    for size in range(1, len(context) + 1):
        occurrences = sum(s[i : i + size] == context[-size:] for s in sequences for i in range(len(s) - size + 1))
        assert sum(p.matched >= size for p in places) == occurrences
    if longest:
        starts = [p.start for p in places if p.matched == longest]
        found = path_walk(index.tokens, starts, 5, Limits(), longest, grows=False)
        naive = naive_path(sequences, context, longest, 5)
        assert np.cumprod(found.confidences)[: len(naive)].tolist() == pytest.approx(naive)


def test_a_session_prefers_the_better_of_own_text_and_past_outputs() -> None:
    drafter = SuffixDrafter()
    drafter.finish_request([90, 91, 1, 2, 3, 4, 5, 6], num_prompt=2)
    session = drafter.open(make_view([7, 8, 1, 2, 3]))
    assert session.outlook(8).available == 3
    assert session.propose(8, always).tokens == (4, 5, 6)
    view = make_view([1, 2, 3, 30, 31, 32, 33, 1, 2, 3])
    drafter.store = OutputStore(1000)
    assert drafter.open(view).propose(4, always).tokens == (30, 31, 32, 33)


def test_a_match_in_the_text_itself_counts_for_more_than_an_equal_one_in_past_outputs() -> None:
    text = [9, 1, 2, 3, 4, 5, 6, 9, 1, 2, 3]
    for weight, expected in ((1.0, (70, 71, 72)), (0.3, (4, 5, 6))):
        drafter = SuffixDrafter(SuffixOptions(past_weight=weight))
        drafter.finish_request([8, 1, 2, 3, 70, 71, 72, 73], num_prompt=0)
        assert drafter.open(make_view(text)).propose(3, always).tokens == expected


def test_prompts_of_finished_requests_are_not_stored() -> None:
    drafter = SuffixDrafter()
    drafter.finish_request([1, 2, 3, 4, 9], num_prompt=4)
    assert drafter.open(make_view([1, 2, 3])).outlook(4).available == 0


def test_short_drafts_are_beginnings_of_long_ones_in_both_shapes() -> None:
    tokens = np.random.default_rng(0).integers(0, 5, 300).tolist()
    for tree in (False, True):
        drafter = SuffixDrafter(SuffixOptions(factor=4.0), tree=tree)
        session = drafter.open(make_view(tokens))
        whole = session.propose(12, always)
        assert len(whole) == session.outlook(12).available
        for count in range(1, len(whole)):
            part = session.propose(count, always)
            assert part.tokens == whole.tokens[:count]
            assert part.parents is None or part.parents == (whole.parents or ())[:count]
        assert (whole.parents is None) == (not tree)


def test_nothing_follows_an_end_token() -> None:
    for tree in (False, True):
        session = SuffixDrafter(SuffixOptions(factor=4.0), tree=tree).open(make_view([1, 2, 3, 0, 4, 5, 1, 2, 3], end_ids=[0]))
        assert session.propose(8, always).tokens == (0,)


def test_a_period_goes_on_beyond_the_end_of_the_text() -> None:
    text = [9, 1, 2, 3, 1, 2, 3, 1, 2, 3]
    for tree in (False, True):
        session = SuffixDrafter(SuffixOptions(factor=4.0, min_prob=0.0), tree=tree).open(make_view(text))
        assert session.propose(10, always).tokens == (1, 2, 3, 1, 2, 3, 1, 2, 3, 1)


def test_evidence_grows_with_match_and_agreement() -> None:
    text = [10, 11, 12, 13, 14, 15, 16, 17, 18, 50]
    signals = []
    for length in (1, 2, 4, 8):
        tail = text[9 - length : 9]
        signals.append(SuffixDrafter().open(make_view([*text, 60, *tail])).outlook(8).signal)
    assert signals == sorted(set(signals))
    once = SuffixDrafter().open(make_view([3, 1, 2, 5, 8, 9, 1, 2])).outlook(8).signal
    agreed = SuffixDrafter().open(make_view([1, 2, 5, 1, 2, 5, 1, 2, 5, 1, 2])).outlook(8).signal
    split = SuffixDrafter().open(make_view([3, 1, 2, 5, 8, 1, 2, 6, 9, 1, 2])).outlook(8).signal
    assert agreed > once > split


def test_store_drops_the_oldest_requests_and_stays_within_its_bound() -> None:
    store = OutputStore(100)
    for request in range(50):
        store.add([1000 + request, 2000 + request, *range(request, request + 10)])
        assert len(store) <= 100
    assert ask_store(store, [1049, 2049]) == (49, 50, 51, 52)
    assert ask_store(store, [1000, 2000]) == ()
    bytes_now = store.memory_bytes()
    for request in range(50):
        store.add(list(range(request, request + 12)))
    assert store.memory_bytes() <= bytes_now + 28 * 100


def test_an_output_longer_than_the_store_keeps_its_end() -> None:
    store = OutputStore(16)
    store.add(list(range(20)))
    assert ask_store(store, [17, 18]) == (19,)
    assert ask_store(store, [3, 4]) == ()


def test_a_store_of_no_tokens_keeps_nothing() -> None:
    store = OutputStore(0)
    store.add([1, 2, 3])
    assert len(store) == 0


def test_store_survives_many_threads() -> None:
    store = OutputStore(500)
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        try:
            for _ in range(60):
                store.add(rng.integers(0, 6, 20).tolist())
                ask_store(store, rng.integers(0, 6, 10).tolist())
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(store) <= 500


def test_the_tree_form_is_registered() -> None:
    assert parse_spec("suffix+tree, ngram") == ["suffix+tree", "ngram"]


def test_memory_of_a_text_and_of_the_store_is_reported() -> None:
    drafter = SuffixDrafter()
    empty = drafter.memory_bytes()
    session = drafter.open(make_view([]))
    before = session.memory_bytes()
    view = make_view(list(range(3000)))
    longer = drafter.open(view)
    longer.outlook(4)
    assert longer.memory_bytes() >= before + 16 * 3000
    drafter.finish_request(view.tokens, num_prompt=0)
    assert drafter.memory_bytes() >= empty + 16 * 3000
