"""Worked numbers of the chain rules, by enumeration of the real code."""

import pytest
import torch

from paceline.records import Draft
from paceline.sampling import Purpose
from paceline.verification import leviathan
from paceline.verification.registry import create
from unit.verification.exact import (
    TableRows,
    approx,
    branching_draw,
    chain_draft,
    chain_law,
    constant,
    dist,
    first_token_law,
    mean_accepted,
    outcomes,
)

P, Q = dist(0.5, 0.3, 0.2), dist(0.2, 0.3, 0.5)
P4, Q4 = dist(0.4, 0.3, 0.2, 0.1), dist(0.1, 0.2, 0.3, 0.4)


def verify_law(name, tokens, p=P, q=Q):
    """Law of (accepted, last token) of one round on a given draft with the same rows everywhere."""
    draft = chain_draft(tokens, [q] * len(tokens))
    rows = TableRows([p] * (len(tokens) + 1))

    def run(branch):
        verdict = create(name).verify(rows, draft, branch, 0)
        return verdict.num_accepted, verdict.emitted[-1]

    return outcomes(run)


def chance_to_accept(law):
    return sum(probability for (accepted, _), probability in law.items() if accepted > 0)


@pytest.mark.parametrize(("token", "chance"), [(0, 1.0), (1, 1.0), (2, 0.4)])
def test_leviathan_accepts_by_the_ratio(token, chance):
    assert chance_to_accept(verify_law("leviathan", [token])) == pytest.approx(chance)


@pytest.mark.parametrize(("p", "q", "rate"), [(P, Q, 0.7), (P4, Q4, 0.6)])
@pytest.mark.parametrize("name", ["leviathan", "block"])
def test_one_token_is_accepted_with_the_overlap_of_both_laws(name, p, q, rate):
    law = chain_law(create(name), constant(p), constant(q), 1)
    assert mean_accepted(law) == pytest.approx(rate)
    assert first_token_law(law, len(p)) == approx(p.tolist())


def test_leviathan_recovers_from_the_residual():
    recovered = verify_law("leviathan", [3], P4, Q4)
    rejected = {last: probability for (accepted, last), probability in recovered.items() if accepted == 0}
    total = sum(rejected.values())
    assert [rejected.get(token, 0.0) / total for token in range(4)] == approx([0.75, 0.25, 0.0, 0.0])


def test_match_accepts_a_chosen_token_with_its_target_probability():
    draft = Draft((1,))
    law = outcomes(lambda branch: create("match").verify(TableRows([P, P]), draft, branch, 0).emitted)
    assert sum(v for k, v in law.items() if len(k) == 2) == pytest.approx(0.3)
    rejected = {k[0]: v for k, v in law.items() if len(k) == 1}
    assert [rejected.get(token, 0.0) / 0.7 for token in range(3)] == approx([0.714286, 0.0, 0.285714], 1e-6)


def test_block_beats_token_by_token_on_two_coins():
    p, q = constant(dist(1 / 3, 2 / 3)), constant(dist(2 / 3, 1 / 3))
    assert mean_accepted(chain_law(create("block"), p, q, 2)) == pytest.approx(11 / 9)
    assert mean_accepted(chain_law(create("leviathan"), p, q, 2)) == pytest.approx(10 / 9)


@pytest.mark.parametrize(("k", "block", "token"), [(1, 0.7, 0.7), (2, 1.25, 1.19), (3, 1.695, 1.533)])
def test_expected_accepted_tokens_of_the_running_example(k, block, token):
    assert mean_accepted(chain_law(create("block"), constant(P), constant(Q), k)) == pytest.approx(block)
    assert mean_accepted(chain_law(create("leviathan"), constant(P), constant(Q), k)) == pytest.approx(token)


def test_block_lets_a_later_good_token_pay_for_an_earlier_bad_one():
    assert sum(p for (accepted, _), p in verify_law("block", [2, 0]).items() if accepted == 2) == pytest.approx(1.0)
    assert chance_to_accept(verify_law("leviathan", [2, 0])) == pytest.approx(0.4)


def test_block_accepts_all_or_nothing_where_the_shorter_prefix_has_no_share():
    law = verify_law("block", [2, 2])
    assert sum(p for (accepted, _), p in law.items() if accepted == 2) == pytest.approx(0.16)
    assert law[0, 0] == pytest.approx(0.84)


def test_block_falls_back_to_the_prefix_before_the_bad_token():
    law = verify_law("block", [2, 0, 2])
    assert sum(p for (accepted, _), p in law.items() if accepted == 3) == pytest.approx(0.4)
    assert law[2, 0] == pytest.approx(0.6)


def test_block_on_a_point_mass_gains_nothing():
    """p(x_j) = .6, .5, .7 with one-hot q: h = .428571, .113924, .21, and P(A >= j) is the product of p."""
    rows = [dist(0.6, 0.4), dist(0.5, 0.5), dist(0.7, 0.3), dist(0.5, 0.5)]
    draft = chain_draft([0, 0, 0], [dist(1.0, 0.0)] * 3)
    law = outcomes(lambda branch: create("block").verify(TableRows(rows), draft, branch, 0).num_accepted)
    assert law[3] == pytest.approx(0.21)
    assert law[2] == pytest.approx((1 - 0.21) * 0.113924, rel=1e-5)
    assert law[1] == pytest.approx((1 - 0.21) * (1 - 0.113924) * 0.428571, rel=1e-5)
    assert law[1] + law[2] + law[3] == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("temperature", "rate"),
    [(0.5, 0.9373), (0.7, 0.9058), (1.0, 0.8689), (1.5, 0.8087)],
)
def test_the_draft_temperature_is_free_as_long_as_the_same_q_is_divided_by(temperature, rate):
    p = torch.softmax(dist(2.0, 1.0, 0.0), dim=0)
    q = torch.softmax(dist(1.6, 1.2, 0.0) / temperature, dim=0)
    law = chain_law(create("leviathan"), constant(p), constant(q), 1)
    assert mean_accepted(law) == pytest.approx(rate, abs=5e-5)
    assert first_token_law(law, 3) == approx(p.tolist())


def test_truncating_the_draft_as_the_target_raises_acceptance():
    p = constant(dist(0.6, 0.4, 0.0))
    assert mean_accepted(chain_law(create("leviathan"), p, constant(dist(0.3, 0.3, 0.4)), 1)) == pytest.approx(0.6)
    assert mean_accepted(chain_law(create("leviathan"), p, constant(dist(0.5, 0.5, 0.0)), 1)) == pytest.approx(0.9)


def wrong_q_law(name, drawn_from, divided_by, p):
    """One drafted token drawn from one law and verified against another."""
    marginal = torch.zeros(len(p), dtype=torch.float64)
    for token, chance in enumerate(drawn_from.tolist()):
        for (accepted, last), probability in verify_law(name, [token], p, divided_by).items() if chance else ():
            marginal[token if accepted else last] += chance * probability
    return marginal.tolist()


@pytest.mark.parametrize("name", ["leviathan", "block"])
def test_dividing_by_another_q_than_the_drawn_one_shows_as_bias(name):
    p = dist(0.6, 0.4, 0.0)
    assert wrong_q_law(name, dist(0.5, 0.5, 0.0), dist(0.3, 0.3, 0.4), p) == approx([0.5, 0.5, 0.0])
    assert wrong_q_law(name, dist(0.3, 0.3, 0.4), dist(0.3, 0.3, 0.4), p) == approx(p.tolist())


def test_dropping_a_drawn_token_of_low_probability_shows_as_bias_and_keeping_it_does_not():
    p, q = dist(0.5, 0.5), dist(0.8, 0.2)
    kept = first_token_law(chain_law(create("leviathan"), constant(p), constant(q), 1), 2)
    verified = verify_law("leviathan", [0], p, q)
    dropped = 0.8 * sum(v for (accepted, last), v in verified.items() if accepted or last == 0) + 0.2 * p[0]
    assert kept == approx([0.5, 0.5])
    assert float(dropped) == pytest.approx(0.6)


MUTANTS = {
    "target": (lambda p, q: p, P, Q, [0.35, 0.39, 0.26]),
    "absolute difference": (lambda p, q: (p - q).abs(), P, Q, [0.35, 0.30, 0.35]),
    "reversed": (lambda p, q: (q - p).clamp(min=0), P, Q, [0.2, 0.3, 0.5]),
    "argmax": (lambda p, q: (p - q == (p - q).max()).double(), P4, Q4, [0.5, 0.2, 0.2, 0.1]),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_enumeration_sees_a_wrong_residual(mutant, monkeypatch):
    wrong, p, q, biased = MUTANTS[mutant]
    monkeypatch.setattr(leviathan, "residual", lambda p, q, weight=1.0: (wrong(p, q), float(wrong(p, q).sum())))
    law = chain_law(create("leviathan"), constant(p), constant(q), 1)
    assert first_token_law(law, len(p)) == approx(biased)


def test_the_enumeration_sees_a_shared_coin(monkeypatch):
    """One number for all positions of a block."""
    rule = create("block")

    def one_coin(random):
        class Shared:
            def uniform(self, position, purpose, index=0):
                return random.uniform(position, purpose, 0)

        return Shared()

    draft = chain_draft([0, 0, 0], [dist(1.0, 0.0)] * 3)
    rows = TableRows([dist(0.6, 0.4), dist(0.5, 0.5), dist(0.7, 0.3), dist(0.5, 0.5)])
    law = outcomes(lambda branch: rule.verify(rows, draft, one_coin(branch), 0).num_accepted)
    assert law[1] + law[2] + law[3] == pytest.approx(0.428571, abs=1e-6)


@pytest.mark.parametrize(("name", "expected"), [("leviathan", [[0.7], [0.7, 0.7]]), ("block", [[0.7], [0.7, 1.0]])])
def test_labels_are_the_exact_conditional_acceptance(name, expected):
    """x = (2, 2): under the block rule the second token is certain once the first is kept."""
    draft = chain_draft([2, 2], [Q, Q])
    labels = outcomes(lambda branch: create(name).verify(TableRows([P, P, P]), draft, branch, 0).acceptance)
    assert [list(values) for values in sorted(labels)] == [approx(values) for values in expected]


def test_block_labels_average_to_its_acceptance_at_the_second_position():
    def run(branch):
        tokens = [branching_draw(Q, branch.uniform(0, Purpose.DRAFT, j)) for j in range(2)]
        draft = chain_draft(tokens, [Q, Q])
        verdict = create("block").verify(TableRows([P, P, P]), draft, branch, 0)
        return verdict.num_accepted, verdict.acceptance

    law = outcomes(run)
    reached = sum(v for (accepted, _), v in law.items() if accepted >= 1)
    kept = sum(v for (accepted, _), v in law.items() if accepted == 2)
    labelled = sum(v * labels[1] for (accepted, labels), v in law.items() if accepted >= 1)
    assert labelled == pytest.approx(kept)
    assert 0 < kept < reached
