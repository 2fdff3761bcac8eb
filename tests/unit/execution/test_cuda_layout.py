"""What a captured forward is told about its rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.errors import ResourceError
from paceline.execution.cuda.capture import (
    GENERAL_ROWS,
    ROW_BUCKETS,
    Graphs,
    Layout,
    Rows,
    Shape,
    bucket,
    general,
    num_blocks,
    power_of_two,
)
from paceline.execution.cuda.memory import GIB, plan


def layout() -> Layout:
    return Layout(torch.zeros(4, 8, dtype=torch.int32), heads=3, head_dim=64, max_chunks=2)


def test_a_tree_is_described_by_depths_and_paths() -> None:
    """Worked example T1 of the notes on trees."""
    here = layout()
    parents = [-1, 0, 0, 1, 1, 2, 3]
    here.fill([Rows(1, 4, [3, 5, 6, 7, 8, 9, 10], parents)], Shape(7, 2, 5, 1))
    assert here.tokens[:7].tolist() == [3, 5, 6, 7, 8, 9, 10]
    assert here.depths[:7].tolist() == [0, 1, 1, 2, 2, 2, 3]
    assert here.lengths[:7].tolist() == [4] * 7
    leaf_paths = {3: [0, 1, 3], 4: [0, 1, 4], 5: [0, 2, 5], 6: [0, 1, 3, 6]}
    for node, path in leaf_paths.items():
        assert here.paths[node, : len(path)].tolist() == path
    assert here.blocks[:, :2].T.tolist() == [[0, 5, 1], [5, 2, 1]]


def test_a_tree_behind_a_chain_is_described_as_alone() -> None:
    together, alone, parents = layout(), layout(), [-1, 0, 0, 2]
    alone.fill([Rows(1, 4, [3, 5, 6, 7], parents)], Shape(4, 2, 4, 1))
    together.fill([Rows(2, 9, [1, 2, 8], None), Rows(1, 4, [3, 5, 6, 7], parents)], Shape(7, 2, 4, 1))
    for name in ("tokens", "lengths", "depths", "indices", "sequences"):
        assert torch.equal(getattr(together, name)[3:7], getattr(alone, name)[:4])
    for row, depth in enumerate([0, 1, 1, 2]):
        assert torch.equal(together.paths[3 + row, : depth + 1], alone.paths[row, : depth + 1])
    assert together.paths[2, :3].tolist() == together.depths[:3].tolist() == [0, 1, 2]
    assert together.lengths[:3].tolist() == [9] * 3
    assert together.blocks[:, :2].T.tolist() == [[0, 3, 2], [3, 4, 1]]


def test_a_twin_is_filled_from_memory_of_its_own() -> None:
    here = layout()
    twin = here.twin()
    twin.fill([Rows(2, 9, [1, 2], None)], Shape(2, 1, 2, 1))
    assert here.tokens.tolist() == [0] * 64
    assert not {stage.data_ptr() for stage in here._stages} & {stage.data_ptr() for stage in twin._stages}


def test_rows_that_only_fill_the_bucket_belong_to_no_sequence() -> None:
    here = layout()
    here.fill([Rows(2, 9, [1, 2], None)], Shape(4, 1, 5, 1))
    assert here.sequences[:4].tolist() == [2, 2, -1, -1]
    here.clear()
    assert (here.sequences == -1).all()
    assert (here.blocks == 0).all()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(1, 6), st.data())
def test_every_row_lies_in_exactly_one_block_of_its_own_sequence(counts: list[int], per_block: int, data: st.DataObject) -> None:
    batch = []
    for slot, count in enumerate(counts):
        parents = [-1] + [data.draw(st.integers(0, i - 1)) for i in range(1, count)]
        batch.append(Rows(slot % 4, 3 * slot, list(range(count)), parents if data.draw(st.booleans()) else None))
    here = layout()
    here.fill(batch, Shape(bucket(sum(counts)), 64, per_block, 1))
    seen = []
    for first, count, slot in here.blocks.T.tolist():
        assert count <= per_block
        for row in range(first, first + count):
            assert int(here.sequences[row]) == slot
            seen.append(row)
    assert seen == list(range(sum(counts)))
    row = 0
    for rows in batch:
        parents = rows.parents if rows.parents is not None else range(-1, len(rows.tokens) - 1)
        for node, parent in enumerate(parents):
            depth = int(here.depths[row + node])
            path = here.paths[row + node, : depth + 1].tolist()
            assert path[-1] == node
            if parent >= 0:
                assert path[:-1] == here.paths[row + parent, :depth].tolist()
        row += len(rows.tokens)


def test_buckets_hold_what_they_are_chosen_for() -> None:
    for rows in range(1, 65):
        assert bucket(rows) >= rows
        assert bucket(rows) in ROW_BUCKETS
    assert [power_of_two(n) for n in (0, 1, 2, 3, 4, 5, 9)] == [1, 1, 2, 4, 4, 8, 16]


def graphs_of(*shapes: Shape) -> Graphs:
    """As if these had been captured."""
    graphs = Graphs()
    graphs._graphs = dict.fromkeys(shapes)  # type: ignore[arg-type]
    return graphs


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 16), min_size=1, max_size=4), st.sampled_from([1, 2, 5]))
def test_any_batch_has_room_in_a_captured_shape_without_a_capture(counts: list[int], narrow: int) -> None:
    wide = 2 * narrow
    graphs = graphs_of(*(general(rows, blocks, wide, 8) for rows in GENERAL_ROWS for blocks in (1, rows)))
    wanted = Shape(bucket(sum(counts)), power_of_two(num_blocks(counts, narrow)), narrow, 8)
    chosen = graphs.choose(wanted, counts, wide)
    assert chosen in graphs._graphs
    assert chosen.rows - 8 < sum(counts) <= chosen.rows
    assert num_blocks(counts, chosen.block_tokens) <= chosen.blocks
    assert chosen == general(sum(counts), num_blocks(counts, wide), wide, 8)


def test_the_closest_captured_shape_serves() -> None:
    close, wide = Shape(12, 4, 10, 8), Shape(16, 16, 10, 8)
    graphs, wanted = graphs_of(close, wide, Shape(12, 4, 10, 16), Shape(12, 2, 10, 8)), Shape(9, 4, 5, 8)
    assert graphs.choose(wanted, [3, 3, 3], 10) == close
    assert graphs.choose(wide, [4] * 4, 10) == wide


def test_at_a_new_length_a_shape_for_any_batch_is_captured_first() -> None:
    graphs = graphs_of(Shape(8, 8, 10, 8))
    assert graphs.choose(Shape(2, 1, 5, 16), [2], 10) == Shape(8, 8, 10, 16)


def test_a_description_replaces_the_one_before() -> None:
    here = layout()
    here.fill([Rows(0, 5, list(range(20)), None)], Shape(20, 4, 5, 1))
    here.fill([Rows(3, 7, [4], None)], Shape(1, 1, 5, 1))
    assert np.count_nonzero(here.sequences.numpy() >= 0) == 1
    assert here.tokens[0] == 4


def test_the_budget_gives_the_cache_what_weights_buffers_and_the_reserve_leave() -> None:
    budget = plan(10 * GIB, weights=4 * GIB, buffers=GIB, page_bytes=GIB // 8, wanted_pages=1000, least_pages=4)
    assert budget.cache == 4 * GIB
    assert "weights 4.00 GiB" in str(budget)
    assert "reserve 1.00 GiB" in str(budget)


def test_a_budget_that_does_not_hold_one_sequence_is_refused_with_its_parts() -> None:
    with pytest.raises(ResourceError, match=r"weights 4\.00 GiB.*make 6\.50 GiB, and 6\.00 GiB are free; lower max_context"):
        plan(6 * GIB, weights=4 * GIB, buffers=GIB // 2, page_bytes=GIB // 8, wanted_pages=100, least_pages=8)
