"""Tree rules: worked numbers, exact enumeration of the real code, and what wrong implementations would give."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.records import Draft
from paceline.sampling import CounterRandom, Purpose
from paceline.verification import rrs
from paceline.verification.registry import create
from unit.verification.exact import (
    KINDS,
    TableRows,
    approx,
    branching_draw,
    chain_draft,
    chain_law,
    constant,
    dist,
    extend,
    first_token_law,
    mean_accepted,
    outcomes,
    random_models,
    target_law,
    target_rows,
    total_variation,
    tree_draft,
    tree_law,
)

P, Q = dist(0.1, 0.2, 0.3, 0.4), dist(0.4, 0.3, 0.2, 0.1)
RATIO_RULES = ["rrs", "traversal"]


def siblings_law(name, p, q, k, without_replacement, edit=lambda draft: draft):
    """Law of a round with k sampled children of the pending token."""
    return tree_law(create(name), constant(p), lambda branch: edit(tree_draft(branch, constant(q), [k], without_replacement)))


CELLS = [
    (dist(0.2, 0.5, 0.3), dist(0.5, 0.3, 0.2), True, [0.7, 0.98, 1.0]),
    (P, Q, True, [0.6, 0.764286, 0.840298, 1.0]),
    (P, Q, False, [0.6, 0.72, 0.768, 0.7912]),
    (dist(0.5, 0.3, 0.2), dist(0.2, 0.3, 0.5), False, [0.7, 0.76]),
    (dist(0.5, 0.3, 0.2), dist(0.2, 0.3, 0.5), True, [0.7, 0.82]),
]


@pytest.mark.parametrize("name", RATIO_RULES)
@pytest.mark.parametrize("cell", range(len(CELLS)))
def test_acceptance_of_one_among_k_siblings(name, cell):
    p, q, without_replacement, expected = CELLS[cell]
    for k, rate in enumerate(expected, start=1):
        if k > 2 and not without_replacement and name == "traversal":
            continue  # the same law by many more branches
        law = siblings_law(name, p, q, k, without_replacement)
        assert mean_accepted(law) == pytest.approx(rate, abs=1e-6)
        assert first_token_law(law, len(p)) == approx(p.tolist())


@pytest.mark.parametrize(("tokens", "rate"), [((0, 1), 0.3), ((3, 2), 0.7), ((1, 1), 0.2)])
def test_match_accepts_a_chosen_child_with_the_mass_of_the_children(tokens, rate):
    draft = Draft(tokens, (-1, -1))
    law = tree_law(create("match"), constant(P), lambda branch: draft)
    assert mean_accepted(law) == pytest.approx(rate)
    assert first_token_law(law, 4) == approx(P.tolist())
    labels = outcomes(lambda branch: create("match").verify(TableRows([P] * 3), draft, branch, 0).acceptance)
    assert [list(values) for values in labels] == [approx([rate])]


@pytest.mark.parametrize("k", [1, 2])
def test_match_on_drawn_children(k):
    """verification.md 3.2: sum p(x) (1 - (1 - q(x))^k)."""
    p, q = dist(0.5, 0.3, 0.2), dist(0.2, 0.3, 0.5)
    assert mean_accepted(siblings_law("match", p, q, k, False)) == pytest.approx({1: 0.29, 2: 0.483}[k])


def not_renormalised(draft):
    """The second sibling's row loses the first one's token and keeps its other values."""
    rows = draft.draft_probs.clone()
    rows[1, draft.tokens[0]] = 0.0
    return Draft(draft.tokens, draft.parents, rows)


def without_duplicates(draft):
    kept = [i for i, token in enumerate(draft.tokens) if token not in draft.tokens[:i]]
    return Draft(tuple(draft.tokens[i] for i in kept), (-1,) * len(kept), draft.draft_probs[kept])


def dropped_below(threshold, among):
    """Children of a low probability are thrown away after the draw."""

    def edit(draft):
        tokens = draft.tokens
        left = [1.0, 1.0 - float(draft.draft_probs[0, tokens[0]])]
        kept = [i for i in range(len(tokens)) if i not in among or float(draft.draft_probs[i, tokens[i]]) / left[i] >= threshold]
        rows = draft.draft_probs[kept]
        return Draft(tuple(tokens[i] for i in kept), (-1,) * len(kept), rows, without_replacement=draft.without_replacement)

    return edit


@pytest.mark.parametrize(
    ("k", "without_replacement", "edit", "biased"),
    [
        (2, True, not_renormalised, [0.1, 0.2, 0.34337, 0.35663]),
        (2, False, without_duplicates, [0.1, 0.2, 0.32679, 0.37321]),
        (1, True, dropped_below(0.25, (0,)), [0.13, 0.26, 0.19, 0.42]),
        (2, True, dropped_below(0.35, (1,)), [0.1, 0.2, 0.24821, 0.45179]),
    ],
)
def test_the_enumeration_sees_wrong_sibling_handling(k, without_replacement, edit, biased):
    assert first_token_law(siblings_law("rrs", P, Q, k, without_replacement), 4) == approx(P.tolist())
    assert first_token_law(siblings_law("rrs", P, Q, k, without_replacement, edit), 4) == approx(biased, 1e-5)


def test_a_ratio_test_on_chosen_children_shows_as_bias():
    draft = Draft((0, 1), (-1, -1), torch.stack([Q, Q]))
    law = tree_law(create("rrs"), constant(P), lambda branch: draft)
    assert first_token_law(law, 4) == approx([0.25, 0.0, 0.05357, 0.69643], 1e-5)


def test_recovering_from_the_target_instead_of_the_residual_shows_as_bias(monkeypatch):
    monkeypatch.setattr(rrs, "residual", lambda p, q, weight=1.0: (p, 1.0))
    assert first_token_law(siblings_law("rrs", P, Q, 1, True), 4) == approx([0.14, 0.28, 0.32, 0.26])


def test_a_low_probability_token_that_is_kept_may_end_the_draft():
    """One more sibling only after a first one of probability 0.25 or more."""

    def make(branch):
        draft = tree_draft(branch, constant(Q), [1], True)
        if float(Q[draft.tokens[0]]) < 0.25:
            return draft
        left = Q.clone()
        left[draft.tokens[0]] = 0.0
        second = branching_draw(left, branch.uniform(0, Purpose.DRAFT, 1))
        return Draft((*draft.tokens, second), (-1, -1), torch.stack([Q, Q]), without_replacement=True)

    assert first_token_law(tree_law(create("rrs"), constant(P), make), 4) == approx(P.tolist())


def test_rows_that_the_drafter_has_already_reduced_come_out_the_same():
    def reduced(draft):
        rows = draft.draft_probs.clone()
        rows[1, draft.tokens[0]] = 0.0
        rows[1] /= rows[1].sum()
        return Draft(draft.tokens, draft.parents, rows, without_replacement=True)

    for name in RATIO_RULES:
        plain = siblings_law(name, P, Q, 2, True)
        assert total_variation(siblings_law(name, P, Q, 2, True, reduced), plain) < 1e-12


@pytest.mark.parametrize("name", [*RATIO_RULES, "match"])
@pytest.mark.parametrize("without_replacement", [True, False])
@given(seed=st.integers(0, 10_000), kind=st.sampled_from(KINDS), shape=st.sampled_from([(2,), (3,), (1, 2), (2, 1)]))
@settings(max_examples=8, deadline=None, derandomize=True)
def test_the_emitted_law_is_the_targets_on_trees(name, without_replacement, seed, kind, shape):
    target, draft = random_models(seed, kind, 3)
    law = tree_law(create(name), target, lambda branch: tree_draft(branch, draft, shape, without_replacement))
    assert sum(law.values()) == pytest.approx(1.0, abs=1e-12)
    length = len(shape) + 1
    assert total_variation(extend(law, target, length), target_law(target, length)) < 1e-12


@pytest.mark.parametrize("without_replacement", [True, False])
def test_traversal_accepts_at_least_as_much_as_top_down(without_replacement):
    target, draft = random_models(2, "dense", 3)
    accepted = {
        name: mean_accepted(tree_law(create(name), target, lambda b: tree_draft(b, draft, (1, 2), without_replacement)))
        for name in RATIO_RULES
    }
    assert accepted["traversal"] > accepted["rrs"] + 1e-6


@pytest.mark.parametrize(("tree", "chain"), [("rrs", "leviathan"), ("traversal", "block")])
def test_tree_rules_on_a_chain_are_the_chain_rules(tree, chain):
    target, draft = random_models(8, "sparse", 3)
    assert total_variation(chain_law(create(tree), target, draft, 2), chain_law(create(chain), target, draft, 2)) < 1e-12
    random = CounterRandom(5)
    for position in range(50):
        tokens = (position % 3, position // 3 % 3)
        proposal = chain_draft(tokens, [draft(()), draft(tokens[:1])])
        rows = target_rows(proposal, target)
        one, other = (create(name).verify(rows, proposal, random, position) for name in (tree, chain))
        assert (one.path, one.emitted) == (other.path, other.emitted)


def test_greedy_walks_the_tree_along_argmax():
    """trees.md T1's tree: tokens 5 6 below the root, 7 8 below 5, 9 below 6, 10 below 7."""
    draft = Draft((5, 6, 7, 8, 9, 10), (-1, -1, 0, 0, 1, 2))

    def row(token):
        return torch.nn.functional.one_hot(torch.tensor(token), 12).double()

    best = {0: 5, 1: 7, 3: 11}
    rows = TableRows([row(best.get(i, 0)) for i in range(7)])
    verdict = create("greedy").verify(rows, draft, CounterRandom(0), 4)
    assert (verdict.path, verdict.emitted, verdict.acceptance) == ((0, 2), (5, 7, 11), (1.0, 1.0, 0.0))
    leaf = create("greedy").verify(TableRows([row({**best, 3: 10}.get(i, 0)) for i in range(7)]), draft, CounterRandom(0), 4)
    assert (leaf.path, leaf.emitted, leaf.acceptance) == ((0, 2, 5), (5, 7, 10, 0), (1.0, 1.0, 1.0))


def test_all_lossless_rules_agree_at_temperature_zero():
    random = CounterRandom(1)
    one_hot = torch.eye(4, dtype=torch.float64)
    rows = TableRows([one_hot[i] for i in (1, 2, 3, 0)])
    for tokens in ((1, 2, 3), (1, 0, 3), (2, 2, 2)):
        draft = chain_draft(tokens, [one_hot[token] for token in tokens])
        verdicts = [create(name).verify(rows, draft, random, 0) for name in ("greedy", "match", "leviathan", "block", "rrs")]
        assert len({(v.path, v.emitted) for v in verdicts}) == 1
