"""Drafts whose rows name their tokens themselves."""

from __future__ import annotations

from paceline.records import Draft
from paceline.verification.walk import follow


class Looked(list[int]):
    """Tokens of rows that know which of them were looked at."""

    def __init__(self, tokens: list[int]) -> None:
        super().__init__(tokens)
        self.rows: set[int] = set()

    def __getitem__(self, row: int) -> int:  # type: ignore[override]
        self.rows.add(row)
        return super().__getitem__(row)


def test_rows_beyond_the_first_refused_token_are_not_looked_at() -> None:
    chosen = Looked([5, 6, 1, 9, 9])
    verdict = follow(Draft((5, 6, 7, 8)), chosen)
    assert verdict is not None
    assert (verdict.path, verdict.emitted, verdict.acceptance) == ((0, 1), (5, 6, 1), (1.0, 1.0, 0.0))
    assert chosen.rows == {0, 1, 2}


def test_a_chain_that_agrees_throughout_is_followed_by_the_last_row() -> None:
    verdict = follow(Draft((5, 6)), [5, 6, 3])
    assert verdict is not None
    assert (verdict.path, verdict.emitted, verdict.acceptance) == ((0, 1), (5, 6, 3), (1.0, 1.0))


def test_a_row_without_a_token_counts_only_where_it_is_reached() -> None:
    assert follow(Draft((5, 6)), [5, -1, 3]) is None
    assert follow(Draft((5, 6)), [4, -1, -1]) is not None


def test_a_tree_is_followed_where_a_child_carries_the_token() -> None:
    draft = Draft((5, 6, 7, 8, 9), (-1, -1, 1, 1, 3))
    chosen = Looked([6, 1, 8, 1, 9, 4])
    verdict = follow(draft, chosen)
    assert verdict is not None
    assert (verdict.path, verdict.emitted, verdict.acceptance) == ((1, 3, 4), (6, 8, 9, 4), (1.0, 1.0, 1.0))
    assert chosen.rows == {0, 2, 4, 5}
    refused = follow(draft, [6, 1, 3, 1, 1, 1])
    assert refused is not None
    assert (refused.path, refused.emitted, refused.acceptance) == ((1,), (6, 3), (1.0, 0.0))
    assert follow(draft, [6, 1, -1, 1, 1, 1]) is None
    assert follow(draft, [5, 2, -1, -1, -1, -1]) is not None
