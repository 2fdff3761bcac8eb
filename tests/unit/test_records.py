"""What records say of themselves."""

from __future__ import annotations

from paceline.records import Draft, Verdict


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
