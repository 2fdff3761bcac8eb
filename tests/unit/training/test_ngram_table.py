"""What answers are counted into: chances by hand, and against a plain implementation with dictionaries."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.drafting.ngram_table import WIDTH, NgramTable
from paceline.errors import OptionError
from paceline.training.ngram_table import DISCOUNT, Answer, TableOptions, count_ngrams

STEP = 1 / 256
"""Chances are kept in such steps."""


def table_of(*answers: Sequence[int] | Answer, orders: int = 2, min_count: int = 1, **options: float) -> NgramTable:
    """Of answers without prompts, and with nothing pruned unless asked for."""
    made = [answer if isinstance(answer, Answer) else Answer(answer, 0) for answer in answers]
    return count_ngrams(made, TableOptions(orders=orders, min_count=min_count, **{"min_gain": 0.0} | options), "")  # type: ignore[arg-type]


def after(table: NgramTable, *context: int) -> dict[int, float]:
    return dict(table.after(context))


def chances(expected: dict[int, float]) -> object:
    return pytest.approx(expected, abs=STEP)


def test_chances_are_smoothed_as_on_paper() -> None:
    # After 2: twice 3 and once 4 make (2 - 0.75) / 3 and (1 - 0.75) / 3; two kinds give up 2 * 0.75 / 3 = 0.5 to a floor of 0.0001.
    table = table_of([1, 2, 3], [1, 2, 4], [5, 2, 3])
    after_2 = {3: 1.25 / 3 + 0.5e-4, 4: 0.25 / 3 + 0.5e-4}
    assert after(table, 2) == chances(after_2)
    assert after(table, 1) == chances({2: 1.25 / 2})
    # After 1 2: once each, and 0.75 of the mass follows the chances after 2.
    assert after(table, 1, 2) == chances({3: 0.125 + 0.75 * after_2[3], 4: 0.125 + 0.75 * after_2[4]})
    # After 5 2 nobody said 4: it is known from the chances after 2 alone.
    assert after(table, 5, 2) == chances({3: 0.25 + 0.75 * after_2[3], 4: 0.75 * after_2[4]})
    assert after(table, 9, 2) == after(table, 2)


def test_what_never_followed_a_context_may_still_be_likelier_than_what_did() -> None:
    usual = [[8, 2, 3]] * 20
    table = table_of(*usual, [1, 2, 4], [1, 2, 5], [1, 2, 6])
    assert next(iter(after(table, 1, 2))) == 3
    assert len(after(table, 1, 2)) == WIDTH


def test_an_answer_counts_an_ngram_once() -> None:
    assert after(table_of([1, 2, 1, 2, 1, 2], [1, 3]), 1) == chances({2: 0.125, 3: 0.125})


def test_contexts_do_not_reach_from_one_answer_into_the_next() -> None:
    table = table_of([1, 2], [3, 4], orders=3)
    assert set(after(table, 2, 3)) == {4}
    assert len(table.checks) == 2


def test_prompts_are_context_and_are_not_counted() -> None:
    table = table_of(Answer([7, 8, 9], 2))
    assert set(after(table, 8)) == {9}
    assert after(table, 7) == {}
    assert len(table.checks) == 2  # 8, and 7 8


def test_likeliest_tokens_are_counted_after_what_was_written() -> None:
    table = table_of(Answer([1, 2, 3], 1, likeliest=[4, 5]))
    assert [set(after(table, token)) for token in (1, 2, 4)] == [{4}, {5}, set()]


def test_contexts_that_were_counted_too_seldom_are_left_out() -> None:
    answers = ([1, 2, 1, 2, 1, 2], [1, 2], [3, 2])
    assert len(table_of(*answers, orders=1).checks) == 3
    table = table_of(*answers, orders=1, min_count=2)
    assert len(table.checks) == 1
    assert set(after(table, 1)) == {2}


def test_contexts_that_say_what_the_shorter_one_says_are_left_out() -> None:
    answers = ([1, 2, 3], [1, 2, 4], [5, 2, 3])  # 3 has 0.42 after 2, 0.44 after 1 2, 0.56 after 5 2
    table = table_of(*answers, min_gain=0.08)
    assert after(table, 1, 2) == after(table, 2)
    assert after(table, 5, 2) != after(table, 2)
    contrary = table_of(*answers, *[[6, 2, 7]] * 2, min_gain=1.0)
    assert next(iter(after(contrary, 2))) == 3
    assert next(iter(after(contrary, 6, 2))) == 7
    assert after(contrary, 5, 2) == after(contrary, 2)


def test_the_most_frequent_contexts_are_kept() -> None:
    table = table_of([1, 2, 3], [1, 2, 4], [5, 2, 3], max_contexts=1)
    assert len(table.checks) == 1
    assert set(after(table, 2)) == {3, 4}


def test_answers_shorter_than_the_longest_context_are_counted_as_far_as_they_go() -> None:
    table = table_of([5, 6], orders=4)
    assert set(after(table, 5)) == {6}


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        ([], "no token that the model wrote"),
        ([Answer([1, 2], 2)], "no token that the model wrote"),
        ([Answer([1], 0)], "has one before it"),
        ([Answer([1, -1], 0)], "token ids from -1 to 1"),
        ([Answer([1, 1 << 20], 0)], "1048576; must be from 0"),
        ([Answer([1, 2], 1, likeliest=[-5])], "token ids from -5"),
    ],
)
def test_answers_that_cannot_be_counted_are_refused(answers: list[Answer], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        table_of(*answers)


CONTRADICTIONS = [(-1, None, "first = -1"), (3, None, "0 to 2"), (1, [1, 2], "2 ids for 1")]


@pytest.mark.parametrize(("first", "likeliest", "words"), CONTRADICTIONS)
def test_an_answer_that_contradicts_itself_is_refused(first: int, likeliest: list[int] | None, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        Answer([1, 2], first, likeliest)


REFUSED = [("orders", 0), ("orders", 9), ("min_count", 0), ("min_gain", 2.0), ("max_contexts", 0)]


@pytest.mark.parametrize(("option", "value"), REFUSED)
def test_options_out_of_range_are_refused_by_name(option: str, value: float) -> None:
    with pytest.raises(OptionError, match=f"{option} = "):
        TableOptions(**{option: value})  # type: ignore[arg-type]


class Counts:
    """The definition: for every context the answers in which each token follows it."""

    def __init__(self, answers: Sequence[Answer], orders: int) -> None:
        self.texts: dict[tuple[int, ...], dict[int, set[int]]] = {}
        for number, answer in enumerate(answers):
            for at in range(answer.first, len(answer.tokens)):
                label = answer.tokens[at] if answer.likeliest is None else answer.likeliest[at - answer.first]
                for order in range(1, min(orders, at) + 1):
                    following = self.texts.setdefault(tuple(answer.tokens[at - order : at]), {})
                    following.setdefault(label, set()).add(number)

    def chance(self, context: tuple[int, ...], token: int) -> float:
        if not context:
            return 1e-4
        counts = {label: len(texts) for label, texts in self.texts[context].items()}
        total = sum(counts.values())
        own = max(counts.get(token, 0) - DISCOUNT, 0.0) / total
        return own + DISCOUNT * len(counts) / total * self.chance(context[1:], token)


tokens = st.integers(0, 5)


@st.composite
def answers(draw: st.DrawFn) -> Answer:
    text = draw(st.lists(tokens, min_size=2, max_size=12))
    first = draw(st.integers(0, len(text) - 1))
    size = len(text) - first
    return Answer(text, first, draw(st.none() | st.lists(tokens, min_size=size, max_size=size)))


@given(st.lists(answers(), min_size=1, max_size=6), st.integers(1, 4))
def test_nothing_pruned_a_table_gives_the_best_of_the_definition(given_answers: list[Answer], orders: int) -> None:
    counts = Counts(given_answers, orders)
    if not counts.texts:
        return
    table = table_of(*given_answers, orders=orders)
    assert len(table.checks) == len(counts.texts)
    for context in counts.texts:
        found = table.after((9, *context))
        true = {token: counts.chance(context, token) for token in range(6)}
        assert [chance for _, chance in found] == sorted((chance for _, chance in found), reverse=True)
        for token, chance in found:
            assert chance == pytest.approx(true[token], abs=0.51 * STEP)
        best = [chance for chance in sorted(true.values(), reverse=True)[:WIDTH] if chance >= 1.001 * STEP]
        assert len(found) >= len(best)
        assert [chance for _, chance in found][: len(best)] == pytest.approx(best, abs=0.51 * STEP)
