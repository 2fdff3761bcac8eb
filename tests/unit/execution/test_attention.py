"""Who sees whom in a packed row, and the fused form against the readable one."""

import pytest
import torch

from paceline.errors import ModelError
from paceline.execution.attention import PackedSegment, fused_attention, interface_attention, reference_attention
from paceline.execution.kvcache import KVCache

CPU = torch.device("cpu")


def cache_of(length):
    cache = KVCache(1, 1000)
    cache.stage(range(-1, length - 1))
    cache.accept(range(length))
    return cache


def segment(parents, prefix, chain=False):
    return PackedSegment(cache_of(prefix), parents, chain, 0)


def bits(mask, prefix):
    return [sum(1 << j for j, seen in enumerate(row[prefix:].tolist()) if seen) for row in mask]


def test_tree_positions_and_ancestors():
    """Trees note, test T1, with 4 committed tokens."""
    tree = segment([-1, 0, 0, 1, 1, 2, 3], prefix=4)
    assert tree.positions == [4, 5, 5, 6, 6, 6, 7]
    mask = tree.mask(None, CPU)
    assert bits(mask, 4) == [1, 3, 5, 11, 19, 37, 75]
    assert mask[:, :4].all()


def test_batch_of_trees_has_own_positions_and_masks():
    """Trees note, test T10 (packed, so without padding)."""
    first, second = segment([-1, 0, 0, 1], prefix=6), segment([-1, 0], prefix=4)
    assert (first.positions, second.positions) == ([6, 7, 7, 8], [4, 5])
    assert bits(first.mask(None, CPU), 6) == [1, 3, 5, 11]
    assert bits(second.mask(None, CPU), 4) == [1, 3]


def test_a_chain_is_causal_and_one_token_needs_no_mask():
    assert bits(segment(range(-1, 3), 2, chain=True).mask(None, CPU), 2) == [1, 3, 7, 15]
    assert segment([-1], 50, chain=True).mask(None, CPU) is None


def test_window_counts_positions_not_slots():
    """Both children of the root share position 3: a window of 2 hides position 1 from both, though their slots differ."""
    mask = segment([-1, 0, 0], prefix=2).mask(2, CPU)
    assert mask.int().tolist() == [[0, 1, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 1, 0, 1]]


def test_a_window_wider_than_the_text_is_no_window():
    rows = segment([-1], prefix=5)
    assert rows.mask(6, CPU) is None
    assert rows.mask(5, CPU).int().tolist() == [[0, 1, 1, 1, 1, 1]]


@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
@pytest.mark.parametrize("masked", [True, False])
def test_fused_equals_reference_equals_plain_formula(heads, masked):
    torch.manual_seed(0)
    query, keys, values = torch.randn(heads[0], 3, 8), torch.randn(heads[1], 7, 8), torch.randn(heads[1], 7, 8)
    mask = torch.rand(3, 7) > 0.4
    mask[:, 0] = True
    wide_keys, wide_values = (x.repeat_interleave(heads[0] // heads[1], 0) for x in (keys, values))
    scores = torch.einsum("htd,hsd->hts", query, wide_keys) * 0.3
    if masked:
        scores[:, ~mask] = -torch.inf
    expected = torch.einsum("hts,hsd->thd", scores.softmax(-1), wide_values)
    given = mask if masked else None
    torch.testing.assert_close(reference_attention(query, keys, values, given, 0.3), expected)
    torch.testing.assert_close(fused_attention(query, keys, values, given, 0.3), expected)


def test_softcap_bounds_scores():
    query, keys = torch.full((1, 1, 1), 100.0), torch.tensor([[[1.0], [-1.0]]])
    values = torch.tensor([[[1.0], [0.0]]])
    weight = reference_attention(query, keys, values, None, 1.0, softcap=0.5).item()
    assert weight == pytest.approx(1 / (1 + torch.e**-1.0), rel=1e-5)


@pytest.mark.parametrize(
    ("extra", "reason"),
    [({"s_aux": torch.zeros(1)}, "s_aux"), ({"dropout": 0.1}, "dropout"), ({"is_causal": False}, "later tokens")],
)
def test_demands_that_would_be_ignored_are_refused(extra, reason):
    module = torch.nn.Module()
    module.layer_idx = 0
    with pytest.raises(ModelError, match=reason):
        interface_attention(module, *(torch.zeros(1, 1, 1, 4) for _ in range(3)), None, pack=[], **extra)


def test_a_mask_built_by_the_model_is_refused():
    with pytest.raises(ModelError, match="mask of its own"):
        interface_attention(torch.nn.Module(), *(torch.zeros(1, 1, 1, 4) for _ in range(4)), pack=[])
