"""The cache keeps exactly the committed tokens, whatever was drafted, and copies nothing on a chain."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.errors import OptionError
from paceline.execution.base import Segment
from paceline.execution.hf import HFRunner
from paceline.execution.kvcache import KVCache
from unit.execution.toy_sources import ToySource, feed, random_tokens

TREE = [-1, 0, 0, 1, 1, 2, 3]


def staged(cache, parents):
    """Write slot markers: the key of slot s is s, the value -s, in both layers."""
    cache.stage(parents)
    slots = torch.arange(cache.length, cache.length + len(parents), dtype=torch.float32).reshape(1, -1, 1)
    for layer in range(2):
        cache.write(layer, slots, -slots)


def committed_slots(cache):
    keys, values = cache.committed(1)
    assert torch.equal(keys, -values)
    return keys.flatten().tolist()


def test_accepted_path_is_compacted_to_consecutive_slots():
    """Trees note, test T2: prefix 4, path [0, 1, 3]: slots 4, 5, 7 move to 4, 5, 6; length 7."""
    cache = KVCache(2, 100)
    staged(cache, range(-1, 3))
    cache.accept(range(4))
    staged(cache, TREE)
    cache.accept([0, 1, 3])
    assert cache.length == 7
    assert committed_slots(cache) == [0, 1, 2, 3, 4, 5, 7]
    assert cache.moved_rows == 2 * 2  # one row, keys and values, two layers


def test_chain_rollback_copies_nothing():
    cache = KVCache(2, 1000)
    staged(cache, range(-1, 9))
    cache.accept(range(10))
    address = cache.committed(0)[0].data_ptr()
    for accepted in (3, 0, 5, 10, 1):
        staged(cache, range(-1, 9))
        cache.accept(range(accepted))
    cache.truncate(4)
    assert cache.moved_rows == 0
    assert cache.committed(0)[0].data_ptr() == address


def test_first_branch_of_a_tree_is_not_moved():
    cache = KVCache(2, 100)
    staged(cache, [-1, 0, 1, 0])
    cache.accept([0, 1, 2])
    assert cache.moved_rows == 0


def test_growth_keeps_committed_tokens_and_stops_at_the_limit():
    cache = KVCache(2, 600)
    for _ in range(60):
        staged(cache, range(-1, 9))
        cache.accept(range(10))
    assert committed_slots(cache) == list(range(600))
    assert cache.committed(0)[0].stride(0) == 600


@pytest.mark.parametrize("rows", [[1], [0, 5], [0, 2, 1], [0, 0], [0, 1, 3, 7], [-1]])
def test_rows_that_are_no_path_are_refused(rows):
    cache = KVCache(2, 100)
    staged(cache, TREE)
    with pytest.raises(OptionError, match="root-to-leaf"):
        cache.accept(rows)


def test_rows_are_accepted_only_once():
    cache = KVCache(2, 100)
    staged(cache, [-1, 0])
    cache.accept([0])
    with pytest.raises(OptionError, match="root-to-leaf"):
        cache.accept([0])


@pytest.mark.parametrize("length", [-1, 3])
def test_truncation_outside_the_committed_part_is_refused(length):
    cache = KVCache(2, 100)
    staged(cache, [-1, 0])
    cache.accept([0, 1])
    with pytest.raises(OptionError, match=f"length = {length}"):
        cache.truncate(length)


@pytest.fixture(scope="module")
def runner():
    torch.set_num_threads(1)
    return HFRunner(ToySource("llama"))


def draw_tree(data, size):
    return [data.draw(st.integers(-1, i - 1), label="parent") for i in range(size)]


def draw_path(data, parents):
    node = data.draw(st.integers(-1, len(parents) - 1), label="leaf")
    path = []
    while node >= 0:
        path.insert(0, node)
        node = parents[node]
    return path


@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_cache_equals_one_built_afresh_after_any_history(runner, data):
    sequence, committed = runner.open(), []
    for step in range(data.draw(st.integers(1, 5), label="steps")):
        if data.draw(st.booleans(), label="truncate"):
            keep = data.draw(st.integers(0, len(committed)), label="keep")
            runner.truncate(sequence, keep)
            committed = committed[:keep]
        size = data.draw(st.integers(1, 8), label="size")
        chain = data.draw(st.booleans(), label="chain")
        parents = list(range(-1, size - 1)) if chain else draw_tree(data, size)
        tokens = random_tokens(size, seed=step)
        runner.forward([Segment(sequence, tokens, None if chain else parents)])
        path = draw_path(data, parents)
        runner.accept(sequence, path)
        committed += [tokens[i] for i in path]
    fresh = runner.open()
    if committed:
        feed(runner, fresh, committed)
        for layer in range(2):
            for ours, anew in zip(sequence.committed(layer), fresh.committed(layer), strict=True):
                torch.testing.assert_close(ours, anew, rtol=1e-5, atol=1e-5)
    after = feed(runner, sequence, [7]).logits
    torch.testing.assert_close(after, feed(runner, fresh, [7]).logits, rtol=1e-5, atol=1e-5)
