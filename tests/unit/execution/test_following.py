"""What is fed to a draft behind a verification, and when the host may use it; the device's part is in test_cuda_following.py."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from paceline.execution.base import Decoding, Segment
from paceline.execution.cuda.following import Fed, Following, accepted, fits, matched, numbers_ahead
from paceline.execution.cuda.paging import PAGE, PagedCache, PagedSequence
from paceline.execution.draws import AHEAD, DrawLaw, Draws


class There:
    """An event that has happened."""

    def synchronize(self) -> None:
        pass


def cache_of() -> PagedCache:
    return PagedCache(1, 1, 2, 12, 6 * PAGE, 4, torch.device("cpu"))


def job(sequence: PagedSequence, feed: list[int], law: DrawLaw | None = None, numbers: tuple[int, ...] = ()) -> Decoding:
    return Decoding(sequence, feed, 4, lambda _: True, law, numbers)


def rows(following: Following, sequence: PagedSequence, feed: list[int]) -> list[int] | None:
    return following.rows([job(sequence, feed)], [sequence], [feed])


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
    fed = [Fed(one, 9, (5, 6, 7), 3), Fed(other, 4, (8, 1), 1)]
    plain, late, cut = Segment(cache.open(), (3,)), Segment(one, (5, 6, 7, -1)), Segment(other, (8, 1))
    assert matched(fed, [late, plain, cut]) == [(0, 4), (5, 2)]
    assert matched(fed, [plain, late]) is None  # one is missing
    assert matched(fed, [late, cut, Segment(plain.sequence, (3, 4))]) is None  # another drafter's
    assert matched(fed, [cut, late]) is None
    assert matched(fed, [late, Segment(other, (8, 1), (-1, 0))]) is None  # a tree


def test_drafts_that_are_drawn_go_on_with_the_targets_numbers_or_not_at_all() -> None:
    cache, law = cache_of(), DrawLaw(0.8)
    one, other = cache.open(), cache.open()
    fed = [Fed(one, 9, (5, 6), 2, law, (40, 41)), Fed(other, 4, (8,), 1)]
    drawn, greedy = Segment(one, (5, 6, -1), draws=Draws(law, (40, 41, 42), (43, 44, 45))), Segment(other, (8, -1))
    assert matched(fed, [drawn, greedy]) == [(0, 3), (3, 2)]
    assert numbers_ahead(fed, [drawn, Segment(cache.open(), (1,)), greedy]) == [[41, 42, 43, 44, 45], []]
    assert matched(fed, [Segment(one, (5, 6, -1), draws=Draws(law, (40, 41, 42))), greedy]) is None
    assert matched(fed, [Segment(one, (5, 6, -1), draws=Draws(law, (39, 41, 42), (43, 44, 45))), greedy]) is None
    assert matched(fed, [Segment(one, (5, 6, -1)), greedy]) is None


def test_two_rows_a_sequence_must_fit_a_forward() -> None:
    sequence = cache_of().open()
    assert [fits([Fed(sequence, 1, (2,), 1)] * count) for count in (0, 1, 32, 33)] == [False, True, True, False]


@pytest.mark.parametrize("length", [10, *range(PAGE - 8, PAGE + 1)])
@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_the_steps_are_taken_as_the_first_ones_after_every_acceptance(length: int, count: int) -> None:
    """Three tokens were drafted, of which two were fed; the cache is then cut where acceptance ended."""
    cache, drafted, law = cache_of(), 3, DrawLaw(0.8)
    sequence = committed(cache, length + 1)  # with the pending token
    cache.stage(sequence, drafted - 1)
    cache.keep(sequence, length + drafted)
    cache.stage(sequence, 1 + AHEAD)
    told = torch.tensor([[count, 9]], dtype=torch.int32)
    greedy = Following([Fed(sequence, length, (4, 5, 6), 3)], AHEAD, [[]], told, There())
    ahead = list(range(100, 106))
    drawn = Following([Fed(sequence, length, (4, 5, 6), 3, law, (99, 100, 101))], AHEAD, [ahead], told, There())
    held = min(length + 1 + count, length + drafted)
    cache.truncate(sequence, held)
    feed = [7, 9][-(length + count + 2 - held) :]
    cache.stage(sequence, len(feed) + 4)
    assert rows(greedy, sequence, feed) == [0]
    assert rows(greedy, sequence, [*feed[:-1], 8]) is None  # another token
    assert rows(greedy, sequence, [*feed, 9]) is None  # another place
    assert rows(greedy, cache.open(), feed) is None  # another sequence
    numbers = tuple(ahead[count : count + 3])
    for used, good in ((numbers, True), (numbers[:1], True), ((*numbers, 7), True), ((numbers[0], 7), False)):
        assert (drawn.rows([job(sequence, feed, law, used)], [sequence], [feed]) == [0]) is good
    assert drawn.rows([job(sequence, feed, DrawLaw(0.7), numbers)], [sequence], [feed]) is None
    assert rows(drawn, sequence, feed) is None


def test_a_slot_whose_page_went_to_another_sequence_is_not_the_one_that_was_written() -> None:
    cache = cache_of()
    sequence = committed(cache, PAGE - 2)
    cache.stage(sequence, 4)
    following = Following([Fed(sequence, PAGE - 2, (4, 5), 1)], 1, [[]], torch.tensor([[1, 9]], dtype=torch.int32), There())
    cache.truncate(sequence, PAGE // 2)  # gives the second page back
    committed(cache, 3)
    cache.stage(sequence, PAGE // 2 - 2)
    cache.keep(sequence, PAGE - 2)
    cache.stage(sequence, 6)
    assert rows(following, sequence, [5, 9]) is None


def test_the_page_of_the_next_tokens_stays_with_a_sequence_unless_it_is_shared() -> None:
    cache = cache_of()
    sequence = committed(cache, 2 * PAGE)
    free = cache.free_pages
    cache.truncate(sequence, PAGE - AHEAD - 1)
    assert cache.free_pages == free + 1
    sequence = committed(cache, 2 * PAGE)
    free = cache.free_pages
    cache.truncate(sequence, PAGE - AHEAD)
    assert cache.free_pages == free
    twin = cache.fork(committed(cache, 2 * PAGE))
    cache.truncate(twin, PAGE - AHEAD)
    assert len(twin.pages) == 1
