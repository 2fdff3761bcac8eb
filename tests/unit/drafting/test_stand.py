from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import scipy.stats
import torch

from paceline.config import SamplingParams
from paceline.drafting.rows import top_tokens
from paceline.drafting.sparse import SparseRow
from paceline.drafting.stand import NgramMemory, StandDrafter, StandOptions, distribution
from paceline.records import Verdict
from paceline.sampling import to_probs
from toys import make_view
from unit.drafting.kit import always

SAMPLED = SamplingParams(temperature=1.0)


def test_visits_are_averaged_over_the_union_and_the_best_stay() -> None:
    memory = NgramMemory(10, keep=3)
    memory.add((1, 2), SparseRow((10, 11, 12), (0.6, 0.3, 0.05)))
    memory.add((1, 2), SparseRow((13, 10, 11), (0.5, 0.2, 0.1)))
    row = memory.get((1, 2))
    assert row is not None
    assert dict(zip(row.ids, row.probs, strict=True)) == pytest.approx({10: 0.4, 13: 0.25, 11: 0.2})
    memory.add((1, 2), SparseRow((13, 10), (0.9, 0.05)))
    row = memory.get((1, 2))
    assert row is not None
    assert dict(zip(row.ids, row.probs, strict=True)) == pytest.approx({13: 0.46667, 10: 0.28333, 11: 0.13333}, abs=1e-5)
    assert memory.visits((1, 2)) == 3


def test_memory_is_bounded_and_drops_the_least_recently_used() -> None:
    memory = NgramMemory(2)
    row = SparseRow((1,), (1.0,))
    memory.add((1,), row)
    memory.add((2,), row)
    memory.get((1,))
    memory.add((3,), row)
    assert len(memory) == 2
    assert memory.get((2,)) is None
    assert memory.get((1,)) is not None


def test_children_drawn_one_after_another_follow_the_gumbel_law() -> None:
    row = SparseRow((0, 1, 2), (0.5, 0.3, 0.2))
    rng = np.random.default_rng(0)
    counts: Counter[tuple[int, int]] = Counter()
    for _ in range(20_000):
        first = row.draw(rng.random())
        counts[first, row.draw(rng.random(), [first])] += 1
    law = {(0, 1): 0.3, (0, 2): 0.2, (1, 0): 0.2142857, (1, 2): 0.0857143, (2, 0): 0.125, (2, 1): 0.075}
    observed = [counts[pair] for pair in law]
    assert scipy.stats.chisquare(observed, [20_000 * p for p in law.values()]).pvalue > 1e-6


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(temperature=0.7),
        SamplingParams(temperature=1.0, top_k=3),
        SamplingParams(temperature=1.3, top_p=0.6),
        SamplingParams(temperature=0.5, min_p=0.2, top_k=4),
    ],
)
def test_shaping_equals_the_targets_own(sampling: SamplingParams) -> None:
    probs = torch.softmax(torch.tensor([2.0, 1.5, 1.0, 0.2, -1.0]), dim=0)
    row = SparseRow(tuple(range(5)), tuple(probs.tolist())).shaped(sampling)
    dense = torch.zeros(5)
    dense[list(row.ids)] = torch.tensor(row.probs)
    assert torch.allclose(dense, to_probs(probs.log(), sampling), atol=1e-6)


def test_features_describe_the_row() -> None:
    features = SparseRow((4, 9), (0.75, 0.25)).features(2, 9)
    assert (features.position, features.max_prob, features.token_prob, features.margin) == (2, 0.75, 0.25, 0.5)
    assert features.entropy == pytest.approx(0.562335, abs=1e-6)


def test_stored_distributions_are_the_rows_own_probabilities() -> None:
    logits = torch.linspace(0, 3, 30)
    row = distribution(top_tokens(logits[None], 10, totals=True)[0])
    assert row.ids == tuple(range(29, 19, -1))
    assert row.probs == pytest.approx(torch.softmax(logits, 0)[list(row.ids)].tolist(), rel=1e-5)


def filled(*, tree: bool = False) -> StandDrafter:
    drafter = StandDrafter(16, StandOptions(max_context=3, min_context=1), tree=tree)
    drafter.learn([1], SparseRow((2, 3, 4), (0.6, 0.3, 0.1)))
    drafter.learn([2], SparseRow((5, 6), (0.8, 0.2)))
    drafter.learn([1, 2], SparseRow((7,), (1.0,)))
    return drafter


def test_the_longest_known_context_decides() -> None:
    drafter = filled()
    for text, length, ids in (([9, 2], 1, (7, 5, 6)), ([1, 2], 2, (7,)), ([3, 1], 1, (2, 3, 4))):
        size, row = drafter.look_up(text) or (0, SparseRow((), ()))
        assert (size, row.ids) == (length, ids)
    assert drafter.look_up([9]) is None


def test_greedy_chains_take_the_most_probable_tokens() -> None:
    draft = filled().open(make_view([0, 1])).propose(5, always)
    assert draft.tokens == (2, 7)
    assert draft.draft_probs is None


def test_sampled_chains_carry_their_rows() -> None:
    view = make_view([0, 1], sampling=SAMPLED, seed=3)
    draft = filled().open(view).propose(5, always)
    assert draft.draft_probs is not None
    assert draft.draft_probs[0, [2, 3, 4]].tolist() == pytest.approx([0.6, 0.3, 0.1])
    assert draft.draft_probs.sum(1).tolist() == pytest.approx([1.0] * len(draft))
    assert all(draft.draft_probs[i, token] > 0 for i, token in enumerate(draft.tokens))
    assert draft.confidences[0] == pytest.approx(0.6)


def test_sampled_trees_draw_siblings_without_replacement() -> None:
    for seed in range(20):
        draft = filled(tree=True).open(make_view([0, 1], sampling=SAMPLED, seed=seed)).propose(12, always)
        assert draft.without_replacement
        assert draft.parents is not None
        pairs = list(zip(draft.parents, draft.tokens, strict=True))
        assert len(set(pairs)) == len(pairs)
        assert all(draft.confidences[i] == pytest.approx(0.6) for i, parent in enumerate(draft.parents) if parent == -1)


def test_greedy_trees_are_point_mass() -> None:
    draft = filled(tree=True).open(make_view([0, 1])).propose(3, always)
    assert draft.draft_probs is None
    assert not draft.without_replacement
    assert {2} <= set(draft.tokens)


def test_a_round_teaches_the_contexts_of_all_its_rows() -> None:
    drafter = filled()
    view = make_view([0, 1])
    session = drafter.open(view)
    assert session.propose(2, always).tokens == (2, 7)
    logits = torch.zeros(3, 16)
    logits[0, 8], logits[1, 9], logits[2, 10] = 9.0, 9.0, 9.0
    view.tokens += [2, 9]
    session.observe(Verdict((0,), (2, 9)), logits)
    for context, best in (([0, 1], 8), ([0, 1, 2], 9), ([1, 2, 7], 10)):
        row = drafter.memory.get(tuple(context))
        assert row is not None
        assert row.ids[0] == best


def test_evidence_grows_with_context_and_certainty() -> None:
    drafter = StandDrafter(16, StandOptions(max_context=2, min_context=1))
    drafter.learn([1], SparseRow((2, 3), (0.5, 0.3)))
    drafter.learn([4], SparseRow((2, 3), (0.9, 0.1)))
    drafter.learn([5, 6], SparseRow((2, 3), (0.5, 0.3)))
    drafter.learn([7, 8], SparseRow((2, 3), (0.9, 0.1)))
    signals = [drafter.open(make_view(text)).outlook(4).signal for text in ([0, 1], [0, 4], [5, 6], [7, 8])]
    assert signals == [1, 2, 3, 4]


def test_memory_is_reported() -> None:
    drafter = StandDrafter(16)
    assert drafter.memory_bytes() == 0
    drafter.learn([1, 2], SparseRow((3,), (1.0,)))
    assert drafter.memory_bytes() > 0
