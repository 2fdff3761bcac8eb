"""What is fed to a draft behind a verification, and when the host may use it; the device's part is in test_cuda_following.py."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from paceline.execution.base import Segment
from paceline.execution.cuda.following import FED, Fed, Following, accepted, fits, matched
from paceline.execution.cuda.paging import PAGE, PagedCache, PagedSequence


class There:
    """An event that has happened."""

    def synchronize(self) -> None:
        pass


def cache_of() -> PagedCache:
    return PagedCache(1, 1, 2, 12, 6 * PAGE, 4, torch.device("cpu"))


def committed(cache: PagedCache, tokens: int) -> PagedSequence:
    sequence = cache.open()
    cache.stage(sequence, tokens)
    cache.keep(sequence, tokens)
    return sequence


@given(st.lists(st.integers(0, 3), min_size=1, max_size=8), st.lists(st.integers(-1, 3), min_size=8, max_size=8))
def test_acceptance_ends_at_the_first_token_that_the_target_would_not_choose(tokens: list[int], chosen: list[int]) -> None:
    count, last, following = accepted(tokens, chosen)
    assert tokens[1 : count + 1] == chosen[:count]
    assert count == len(tokens) - 1 or tokens[count + 1] != chosen[count]
    assert (last, following) == (tokens[count], max(chosen[count], 0))


def test_drafts_are_matched_with_what_verifies_them_in_order() -> None:
    cache = cache_of()
    one, other = cache.open(), cache.open()
    fed = [Fed(one, 9, (5, 6, 7)), Fed(other, 4, (8, 1))]
    plain, late, cut = Segment(cache.open(), (3,)), Segment(one, (5, 6, 7, -1)), Segment(other, (8, 1))
    assert matched(fed, [late, plain, cut]) == [(0, 4), (5, 2)]
    assert matched(fed, [plain, late]) is None  # one is missing
    assert matched(fed, [late, cut, Segment(plain.sequence, (3, 4))]) is None  # another drafter's
    assert matched(fed, [cut, late]) is None
    assert matched(fed, [late, Segment(other, (8, 1), (-1, 0))]) is None  # a tree


def test_two_rows_a_sequence_must_fit_a_forward() -> None:
    sequence = cache_of().open()
    assert [fits([Fed(sequence, 1, (2,))] * count) for count in (0, 1, 32, 33)] == [False, True, True, False]


@pytest.mark.parametrize("length", [10, PAGE - 4, PAGE - 3, PAGE - 2, PAGE - 1, PAGE])
@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_the_forward_is_taken_as_the_first_one_after_every_acceptance(length: int, count: int) -> None:
    """Three tokens were drafted, of which two were fed; the cache is then cut where acceptance ended."""
    cache, drafted = cache_of(), 3
    sequence = committed(cache, length + 1)  # with the pending token
    cache.stage(sequence, drafted - 1)
    cache.keep(sequence, length + drafted)
    cache.stage(sequence, 2)
    fed = Fed(sequence, length, (4, 5, 6))
    told = torch.tensor([[count, 9]], dtype=torch.int32)
    following = Following([fed], told, There())
    held = min(length + 1 + count, length + drafted)
    cache.truncate(sequence, held)
    feed = [7, 9][-(length + count + 2 - held) :]
    cache.stage(sequence, len(feed) + 4)
    assert following.rows([sequence], [feed]) == [FED - 1]
    assert following.rows([sequence], [[*feed[:-1], 8]]) is None  # another token
    assert following.rows([sequence], [[*feed, 9]]) is None  # another place
    assert following.rows([cache.open()], [feed]) is None  # another sequence


def test_a_slot_whose_page_went_to_another_sequence_is_not_the_one_that_was_written() -> None:
    cache = cache_of()
    sequence = committed(cache, PAGE - 2)
    cache.stage(sequence, 4)
    following = Following([Fed(sequence, PAGE - 2, (4, 5))], torch.tensor([[1, 9]], dtype=torch.int32), There())
    cache.truncate(sequence, PAGE - 3)  # gives the second page back
    committed(cache, 3)
    cache.stage(sequence, 1)
    cache.keep(sequence, PAGE - 2)
    cache.stage(sequence, 6)
    assert following.rows([sequence], [[5, 9]]) is None
    cache.truncate(sequence, PAGE - 3)


def test_the_page_of_the_next_two_tokens_stays_with_a_sequence_unless_it_is_shared() -> None:
    cache = cache_of()
    sequence = committed(cache, 2 * PAGE)
    free = cache.free_pages
    cache.truncate(sequence, PAGE - 2)
    assert cache.free_pages == free + 1
    sequence = committed(cache, 2 * PAGE)
    free = cache.free_pages
    cache.truncate(sequence, PAGE - 1)
    assert cache.free_pages == free
    twin = cache.fork(committed(cache, 2 * PAGE))
    cache.truncate(twin, PAGE - 1)
    assert len(twin.pages) == 1
