"""What records say of themselves."""

from __future__ import annotations

from paceline.records import Draft


def test_levels_of_a_draft_are_its_longest_path() -> None:
    assert Draft((4, 5, 6)).num_levels == 3
    assert Draft((4, 5, 6, 7), parents=(-1, -1, 0, 2)).num_levels == 3
    assert Draft((4, 5), parents=(-1, -1)).num_levels == 1
    assert Draft(()).num_levels == 0
    assert Draft((), parents=()).num_levels == 0
