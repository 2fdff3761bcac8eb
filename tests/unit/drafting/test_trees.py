from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from paceline.drafting.tree_plan import best_first, choose_size, from_counts, sequoia
from paceline.drafting.tree_search import Growth, expand_and_rerank, grow_best, grow_slots, opt_tree
from paceline.drafting.trees import best_path_first, depths, merge, path_scores, select, shape_of, top_nodes
from paceline.records import Draft

# The toy distribution of the worked examples, by path; letters stand for tokens.
TOY = {
    "": "a.6 b.3 c.1",
    "a": "d.5 e.4 f.1",
    "b": "g.9 h.05 i.05",
    "c": "x.8 y.2",
    "ad": "j.7 k.2 l.1",
    "ae": "m.6 n.3 o.1",
    "bg": "p.95 q.03 r.02",
}


def toy_children(path: str) -> list[tuple[int, float]]:
    return [(ord(item[0]), float(item[1:])) for item in TOY.get(path, "z1.").split()]


def toy_expand(growth: Growth, frontier: Sequence[int]) -> list[list[tuple[int, float]]]:
    return [toy_children("".join(map(chr, growth.path(node)))) for node in frontier]


def words(draft: Draft) -> set[str]:
    assert draft.parents is not None
    found: list[str] = []
    for token, parent in zip(draft.tokens, draft.parents, strict=True):
        found.append((found[parent] if parent >= 0 else "") + chr(token))
    return set(found)


def expected_emitted(draft: Draft) -> float:
    assert draft.parents is not None
    return 1.0 + sum(path_scores(draft.parents, draft.confidences))


def test_template_by_counts_is_prefix_closed_and_nested() -> None:
    counts = {(0,): 60, (1,): 20, (0, 0): 36, (0, 1): 12, (1, 0): 12, (0, 0, 0): 22, (2,): 10}
    paths = from_counts(counts, 4)
    assert paths == [(0,), (0, 0), (0, 0, 0), (1,)]
    assert 1 + sum(counts[path] for path in paths) / 100 == pytest.approx(2.38)
    assert from_counts(counts, 2) == paths[:2]


def test_expand_and_rerank_worked_example() -> None:
    growth = expand_and_rerank(toy_expand, 5, width=2, levels=3)
    assert len(growth.tokens) == 10
    draft = growth.draft(5, "toy")
    assert words(draft) == {"a", "b", "ad", "bg", "bgp"}
    assert expected_emitted(draft) == pytest.approx(2.7265)


def test_expand_and_rerank_stops_where_nothing_can_enter_the_tree() -> None:
    passes = []

    def counting(growth: Growth, frontier: Sequence[int]) -> list[list[tuple[int, float]]]:
        passes.append(list(frontier))
        return toy_expand(growth, frontier)

    draft = expand_and_rerank(counting, 2, width=3, levels=8).draft(2, "toy")
    assert words(draft) == {"a", "b"}  # the third, ad, ties with b and was made later
    assert len(passes) < 8


def test_nothing_is_grown_below_end_tokens() -> None:
    growth = expand_and_rerank(toy_expand, 8, width=2, levels=4, end_ids={ord("b")})
    assert not any(word.startswith("b") and len(word) > 1 for word in words(growth.draft(8, "toy")))
    growth = opt_tree(toy_expand, 8, width=8, levels=4, least_gain=0.0, end_ids={ord("a")})
    assert not any(word.startswith("a") and len(word) > 1 for word in words(growth.draft(8, "toy")))


@pytest.mark.parametrize(("least_gain", "levels"), [(0.2, 3), (0.5, 2)])
def test_opt_tree_worked_example(least_gain: float, levels: int) -> None:
    passes = []

    def counting(growth: Growth, frontier: Sequence[int]) -> list[list[tuple[int, float]]]:
        passes.append(list(frontier))
        return toy_expand(growth, frontier)

    draft = opt_tree(counting, 4, width=4, levels=9, least_gain=least_gain).draft(4, "toy")
    assert len(passes) == levels
    assert words(draft) == {"a", "b", "ad", "bg"}
    assert expected_emitted(draft) == pytest.approx(2.47)


def test_best_first_growth_gives_the_optimal_tree() -> None:
    growth = grow_best(5, lambda growth, node: toy_children("".join(map(chr, growth.path(node)))))
    draft = growth.draft(5, "toy")
    assert words(draft) == {"a", "b", "ad", "bg", "bgp"}
    assert expected_emitted(draft) == pytest.approx(2.7265)
    assert len(grow_best(5, lambda growth, node: ()).tokens) == 0


def test_slots_are_filled_by_the_chance_that_they_are_reached() -> None:
    left: dict[str, list[tuple[int, float]]] = {}
    names = [""]

    def fill(parent: int) -> tuple[int, float, bool] | None:
        path = names[parent + 1]
        rest = left.setdefault(path, toy_children(path))
        if not rest:
            return None
        token, prob = rest.pop(0)
        names.append(path + chr(token))
        return token, prob / (prob + sum(p for _, p in rest)), True

    tokens, parents, _ = grow_slots(5, fill)
    assert [chr(token) for token in tokens[:3]] == ["a", "d", "b"]
    assert set(names[1:]) == {"a", "ad", "b", "ae", "adj"}
    full = {"a": 0.6, "ad": 0.3, "b": 0.3, "ae": 0.24, "adj": 0.21}
    assert 1 + sum(full[name] for name in names[1:]) == pytest.approx(2.65)
    assert depths(parents) == [len(name) for name in names[1:]]


def test_merge_is_the_union_of_tries() -> None:
    def union(*chains: list[int]) -> Draft:
        return merge([Draft(tuple(chain)) for chain in chains], "merged", 63)

    draft = union([1, 2, 3], [1, 2, 4], [5], [1, 6])
    assert (draft.tokens, draft.parents) == ((1, 2, 3, 4, 5, 6), (-1, 0, 1, 1, -1, 0))
    draft = union([1, 2], [3, 2])
    assert (draft.tokens, draft.parents) == ((1, 2, 3, 2), (-1, 0, -1, 2))


def test_merge_keeps_the_largest_confidence_and_the_best_paths() -> None:
    first = Draft((1, 2), confidences=(0.5, 0.5))
    second = Draft((1, 3), parents=(-1, -1), confidences=(0.9, 0.1))
    merged = merge([first, second], "merged", 63)
    assert (merged.tokens, merged.confidences) == ((1, 2, 3), (0.9, 0.5, 0.1))
    assert merge([Draft((1,))], "merged", 4).confidences[0] < 1.0
    assert merge([first, second], "merged", 2).tokens == (1, 2)
    with pytest.raises(ValueError, match="point-mass"):
        merge([Draft((1,), draft_probs=torch.ones(1, 2))], "merged", 4)


def test_sequoia_worked_example() -> None:
    table = sequoia((0.6, 0.2, 0.1), 32, 31)
    sizes = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
    values = (1, 1.6, 1.96, 2.176, 2.5056, 2.7456, 3.0674, 3.306, 3.6268, 3.8324)
    assert [table.values[m][31] for m in sizes] == pytest.approx(values, abs=5e-5)
    # the note counts the root as a level
    assert [table.values[8][levels - 1] for levels in (3, 4, 5, 6)] == pytest.approx([2.56, 2.716, 2.7456, 2.7456])
    assert set(table.paths(8, 7)) == {(0,), (0, 0), (0, 0, 0), (0, 0, 0, 0), (1,), (0, 1), (1, 0)}


@given(st.lists(st.floats(0.01, 0.9), min_size=1, max_size=4), st.integers(1, 14))
def test_best_first_equals_the_programme_without_a_depth_limit(probs: list[float], nodes: int) -> None:
    probs = sorted((p / max(1.0, sum(probs)) for p in probs), reverse=True)
    table = sequoia(probs, nodes, nodes)
    paths, expected = best_first(probs, nodes - 1)
    assert expected == pytest.approx(table.values[nodes][nodes])
    programme = table.paths(nodes, nodes)
    assert len(programme) == len(paths) == nodes - 1
    product = [float(np.prod([probs[rank] for rank in path])) for path in programme]
    assert 1 + sum(product) == pytest.approx(expected)
    shape_of(programme)


def test_bounded_trees_stay_within_their_depth() -> None:
    paths, expected = best_first((0.6, 0.2, 0.1), 7, max_depth=2)
    assert max(map(len, paths)) == 2
    assert expected == pytest.approx(2.56)
    with pytest.raises(ValueError, match="must not increase"):
        best_first((0.2, 0.6), 4)


VERIFY_BF16 = {1: 1, 2: 0.99, 3: 1.07, 4: 1.07, 6: 1.12, 8: 1.16, 12: 1.30, 16: 1.38, 24: 1.59, 32: 1.71}


@pytest.mark.parametrize(
    ("level_cost", "nodes", "levels", "expected", "rate"),
    [(0.0, 16, None, 3.306, 2.396), (0.05, 8, 3, 2.716, 2.073), (0.25, 8, 2, 2.56, 1.542)],
)
def test_size_from_measured_costs(level_cost: float, nodes: int, levels: int | None, expected: float, rate: float) -> None:
    choice = choose_size(sequoia((0.6, 0.2, 0.1), 32, 12), VERIFY_BF16, level_cost)
    assert choice.nodes == nodes
    assert levels is None or choice.levels == levels
    assert choice.expected_emitted == pytest.approx(expected, abs=5e-4)
    assert choice.rate == pytest.approx(rate, abs=5e-4)


def test_a_hopeless_draft_gets_no_tree() -> None:
    choice = choose_size(sequoia((0.02,), 8, 7), {m: 1 + 0.05 * (m - 1) for m in range(1, 9)}, 0.1)
    assert (choice.nodes, choice.levels, choice.rate) == (1, 0, 1.0)


def test_shapes_put_the_best_path_first_and_refuse_orphans() -> None:
    shape = shape_of([(1,), (0, 0), (0,), (0, 1), (0, 0, 0)])
    assert (shape.parents, shape.ranks) == ((-1, 0, 1, 0, -1), (0, 0, 0, 1, 1))
    with pytest.raises(ValueError, match="no parent"):
        shape_of([(0,), (1, 0)])


def random_parents(draw: st.DataObject) -> list[int]:
    count = draw.draw(st.integers(1, 20))
    return [draw.draw(st.integers(-1, i - 1)) for i in range(count)]


@given(st.data())
def test_reordering_keeps_the_tree_and_puts_the_best_child_next(data: st.DataObject) -> None:
    parents = random_parents(data)
    confidences = [data.draw(st.floats(0.05, 1.0)) for _ in parents]
    scores = path_scores(parents, confidences)
    draft = Draft(tuple(range(len(parents))), tuple(parents), confidences=tuple(confidences))
    order = best_path_first(parents, scores)
    moved = select(draft, order)
    assert moved.parents is not None
    assert all(parent < i for i, parent in enumerate(moved.parents))
    assert {(token, moved.tokens[p] if p >= 0 else -1) for token, p in zip(moved.tokens, moved.parents, strict=True)} == set(
        enumerate(parents)
    )
    place = {old: new for new, old in enumerate(order)}
    for node in (-1, *range(len(parents))):
        siblings = [i for i, parent in enumerate(parents) if parent == node]
        if siblings:
            first = min(siblings, key=place.__getitem__)
            assert scores[first] == max(scores[i] for i in siblings)
            assert place[first] == (place[node] + 1 if node >= 0 else 0)


@given(st.data())
def test_the_best_nodes_are_prefix_closed(data: st.DataObject) -> None:
    parents = random_parents(data)
    scores = path_scores(parents, [data.draw(st.sampled_from([0.25, 0.5, 1.0])) for _ in parents])
    kept = top_nodes(scores, data.draw(st.integers(1, len(parents))))
    assert all(parents[i] == -1 or parents[i] in kept for i in kept)
