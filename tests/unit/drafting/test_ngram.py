from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.drafting.ngram import NgramDrafter, NgramOptions, NgramSession
from paceline.errors import OptionError
from toys import make_view
from unit.drafting.kit import always


def session(tokens: list[int], *, max_size: int = 4, min_size: int = 1, end_ids: tuple[int, ...] = ()) -> NgramSession:
    drafter = NgramDrafter(NgramOptions(max_size=max_size, min_size=min_size))
    return drafter.open(make_view(tokens, end_ids=end_ids))


def test_longest_match_wins_and_the_latest_occurrence_continues() -> None:
    found = session([5, 6, 7, 8, 5, 6, 9, 4, 5, 6], max_size=3)
    assert found.outlook(3).available == 3
    assert found.propose(3, always).tokens == (9, 4, 5)


def test_nothing_is_proposed_without_an_earlier_occurrence() -> None:
    found = session([1, 2, 3, 4])
    assert found.outlook(8).available == 0
    assert found.propose(8, always).tokens == ()


def test_a_period_goes_on_beyond_the_end_of_the_text() -> None:
    assert session([7, 7, 7], max_size=2).propose(1, always).tokens == (7,)
    assert session([7, 7, 7], max_size=2).propose(5, always).tokens == (7,) * 5
    assert session([1, 2, 3, 1, 2]).propose(7, always).tokens == (3, 1, 2, 3, 1, 2, 3)


def test_drafts_end_with_an_end_token() -> None:
    found = session([1, 2, 3, 0, 4, 1, 2], end_ids=(0,))
    assert found.outlook(5).available == 2
    assert found.propose(5, always).tokens == (3, 0)


def test_signal_grows_with_the_matched_length() -> None:
    text = list(range(1, 30))
    signals = []
    for length in (1, 2, 3, 5, 6, 15, 16, 25):
        tokens = [50, *text, 60, 70, *text[-length:]]
        signals.append(session(tokens).outlook(4).signal)
    assert signals[2] == signals[3]
    assert signals[4] == signals[5]
    assert signals[6] == signals[7]
    assert sorted(set(signals)) == [signals[i] for i in (0, 1, 2, 4, 6)]


def test_signal_tells_agreement_from_contradiction() -> None:
    once = session([1, 2, 3, 9, 8, 1, 2]).outlook(4).signal
    agreed = session([1, 2, 3, 9, 1, 2, 3, 8, 1, 2]).outlook(4).signal
    contested = session([1, 2, 4, 9, 1, 2, 3, 8, 1, 2]).outlook(4).signal
    assert contested < once < agreed


def test_short_matches_are_ignored_when_asked() -> None:
    assert session([1, 2, 3, 1], min_size=2).outlook(4).available == 0
    assert session([1, 2, 3, 1, 2], min_size=2).outlook(4).available == 4


def test_outlook_and_draft_agree_and_respect_the_limit() -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 4, 60).tolist()
    for limit in range(1, 20):
        found = session(list(tokens), end_ids=(3,))
        outlook = found.outlook(limit)
        assert len(found.propose(limit, always)) == outlook.available <= limit


@given(st.lists(st.integers(0, 3), min_size=2, max_size=60), st.integers(1, 5), st.integers(1, 10))
def test_growing_index_equals_a_search_from_scratch(tokens: list[int], max_size: int, num_tokens: int) -> None:
    view = make_view(tokens[:1])
    growing = NgramDrafter(NgramOptions(max_size=max_size)).open(view)
    for token in tokens[1:]:
        view.tokens.append(token)
        growing.outlook(num_tokens)
    drafted = growing.propose(num_tokens, always).tokens
    expected: list[int] = []
    for size in range(min(max_size, len(tokens) - 1), 0, -1):
        tail = tokens[-size:]
        starts = [i + size for i in range(len(tokens) - size) if tokens[i : i + size] == tail]
        if starts:
            text = list(tokens)
            for i in range(num_tokens):
                text.append(text[starts[-1] + i])
            expected = text[len(tokens) :]
            break
    assert list(drafted) == expected


def test_options_are_checked() -> None:
    with pytest.raises(OptionError, match="max_size = 0"):
        NgramOptions(max_size=0)
    with pytest.raises(OptionError, match="min_size = 5"):
        NgramOptions(min_size=5)
