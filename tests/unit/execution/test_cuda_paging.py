"""Pages of keys and values: shared by forks, copied when written to, given back, never handed out twice."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.errors import OptionError, ResourceError
from paceline.execution.cuda.paging import PAGE, PagedCache, PagedSequence


def small_cache(pages: int = 12, sequences: int = 4) -> PagedCache:
    return PagedCache(1, 1, 2, pages, 6 * PAGE, sequences, torch.device("cpu"))


def write(cache: PagedCache, sequence: PagedSequence, values: list[int]) -> None:
    """Stage tokens, and store a number as each one's key and its negative as its value."""
    start = sequence.committed
    cache.stage(sequence, len(values))
    pages, offsets = cache.addresses(sequence, start, start + len(values))
    numbers = torch.tensor(values, dtype=torch.bfloat16)[:, None, None]
    cache.keys[0][pages, :, offsets] = numbers.expand(-1, 1, 2)
    cache.values[0][pages, :, offsets] = -numbers.expand(-1, 1, 2)


def read(cache: PagedCache, sequence: PagedSequence) -> list[int]:
    pages, offsets = cache.addresses(sequence, 0, sequence.committed)
    keys, values = (pool[0][pages, 0, offsets, 0].tolist() for pool in (cache.keys, cache.values))
    assert values == [-key for key in keys]
    return [int(key) for key in keys]


def test_a_fork_shares_whole_pages_and_copies_the_one_it_writes_to() -> None:
    cache = small_cache()
    sequence = cache.open()
    write(cache, sequence, [1] * (PAGE + 10))
    cache.accept(sequence, range(PAGE + 10))
    free = cache.free_pages
    twin = cache.fork(sequence)
    assert cache.free_pages == free
    write(cache, twin, [7])
    cache.accept(twin, [0])
    assert cache.free_pages == free - 1
    assert twin.pages[0] == sequence.pages[0]
    assert twin.pages[1] != sequence.pages[1]
    assert read(cache, twin) == [1] * (PAGE + 10) + [7]
    assert read(cache, sequence) == [1] * (PAGE + 10)


def test_a_chain_is_accepted_without_moving_anything() -> None:
    cache = small_cache()
    sequence = cache.open()
    write(cache, sequence, [1, 2, 3, 4])
    cache.accept(sequence, [0, 1])
    assert cache.moved_rows == 0
    assert read(cache, sequence) == [1, 2]


def test_a_path_of_a_tree_is_moved_together_across_pages() -> None:
    """Worked example T2 of the notes on trees: slots 4, 5, 7 become 4, 5, 6."""
    cache = small_cache()
    sequence = cache.open()
    write(cache, sequence, [100, 101, 102, 103])
    cache.accept(sequence, range(4))
    write(cache, sequence, [3, 5, 6, 7, 8, 9, 10])
    cache.accept(sequence, [0, 1, 3])
    assert read(cache, sequence) == [100, 101, 102, 103, 3, 5, 7]
    assert cache.moved_rows == 1
    write(cache, sequence, list(range(57, 121)))
    cache.accept(sequence, [0, 50, 63])
    assert read(cache, sequence)[7:] == [57, 107, 120]


@pytest.mark.parametrize("rows", [[1, 0], [0, 0], [0, 5], [-1]])
def test_rows_that_are_no_increasing_path_of_the_segment_are_refused(rows: list[int]) -> None:
    cache = small_cache()
    sequence = cache.open()
    write(cache, sequence, [1, 2, 3])
    with pytest.raises(OptionError, match="strictly increasing"):
        cache.accept(sequence, rows)


def test_memory_that_is_used_up_is_reported_with_its_figures() -> None:
    cache = small_cache(pages=2)
    sequence = cache.open()
    with pytest.raises(ResourceError, match=r"3 pages of 64 tokens needed, 2 free"):
        cache.stage(sequence, 2 * PAGE + 1)


def test_too_many_sequences_are_refused() -> None:
    cache = small_cache(sequences=1)
    cache.open()
    with pytest.raises(ResourceError, match="1 are open"):
        cache.open()


def test_a_context_beyond_the_limit_is_refused() -> None:
    cache = small_cache()
    with pytest.raises(ResourceError, match="the limit is 384"):
        cache.stage(cache.open(), 6 * PAGE + 1)


def test_a_closed_sequence_is_refused_and_closing_twice_is_harmless() -> None:
    cache = small_cache()
    sequence = cache.open()
    cache.stage(sequence, 5)
    cache.close(sequence)
    cache.close(sequence)
    assert cache.free_pages == 12
    with pytest.raises(OptionError, match="closed"):
        cache.stage(sequence, 1)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_after_any_history_each_sequence_holds_its_own_tokens_and_all_pages_come_back(data: st.DataObject) -> None:
    cache = small_cache()
    held: dict[int, tuple[PagedSequence, list[int]]] = {}
    number = names = 0
    for _ in range(data.draw(st.integers(1, 25))):
        action = data.draw(st.sampled_from(["open", "fork", "write", "truncate", "close"]))
        if action == "open" and len(held) < 4:
            names += 1
            held[names] = cache.open(), []
        elif held:
            name = data.draw(st.sampled_from(sorted(held)))
            sequence, tokens = held[name]
            if action == "fork" and len(held) < 4:
                names += 1
                held[names] = cache.fork(sequence), list(tokens)
            elif action == "write" and len(tokens) < 2 * PAGE:
                new = [(number := (number + 1) % 200) for _ in range(data.draw(st.integers(1, 50)))]
                path = [i for i in range(len(new)) if i == 0 or data.draw(st.booleans())]
                write(cache, sequence, new)
                cache.accept(sequence, path)
                tokens += [new[i] for i in path]
            elif action == "truncate":
                del tokens[data.draw(st.integers(0, len(tokens))) :]
                cache.truncate(sequence, len(tokens))
            elif action == "close":
                cache.close(sequence)
                del held[name]
        for sequence, tokens in held.values():
            assert read(cache, sequence) == tokens
            assert cache.tables[sequence.slot, : len(sequence.pages)].tolist() == sequence.pages
    for sequence, _ in held.values():
        cache.close(sequence)
    assert cache.free_pages == 12
