"""What records say of themselves."""

from __future__ import annotations

from dataclasses import replace

import pytest

from paceline.records import Draft, Outlook, Verdict


def test_levels_of_a_draft_are_its_longest_path() -> None:
    assert Draft((4, 5, 6)).num_levels == 3
    assert Draft((4, 5, 6, 7), parents=(-1, -1, 0, 2)).num_levels == 3
    assert Draft((4, 5), parents=(-1, -1)).num_levels == 1
    assert Draft(()).num_levels == 0
    assert Draft((), parents=()).num_levels == 0


def test_rows_of_a_draft_have_their_own_paths() -> None:
    chain, tree = Draft((4, 5, 6)), Draft((4, 5, 6, 7), parents=(-1, -1, 0, 2))
    assert [chain.path(row) for row in range(4)] == [[], [4], [4, 5], [4, 5, 6]]
    assert [tree.path(row) for row in range(5)] == [[], [4], [5], [4, 6], [4, 6, 7]]


def test_each_emitted_token_comes_from_the_row_of_the_token_before_it() -> None:
    assert Verdict((), (9,)).rows == (0,)
    assert Verdict((0, 2, 3), (4, 6, 7, 9)).rows == (0, 1, 3, 4)


def test_light_records_are_made_compared_and_replaced_as_frozen_ones() -> None:
    one = Outlook("ngram", 3, signal=2)
    assert one == Outlook("ngram", available=3, signal=2) != Outlook("ngram", 3)
    assert hash(one) == hash(Outlook("ngram", 3, 2))
    assert replace(one, available=5) == Outlook("ngram", 5, 2)
    assert "available=3, signal=2" in repr(one)
    with pytest.raises(TypeError, match="available"):
        Outlook("ngram")  # type: ignore[call-arg]
