"""`mdp`."""

from __future__ import annotations

import random

import pytest

from paceline.control.mdp import Mdp, MdpOptions, StopModel, bin_of, state_index
from unit.control.kit import context, costs, record, shown


def test_state_index_gives_the_worked_value() -> None:
    entropy, divergence = bin_of(0.8018, 6.0, 20), bin_of(0.2749, 8.0, 20)
    assert (entropy, divergence) == (2, 0)
    assert state_index(entropy, divergence, 3, 20, 9) == 363


def test_values_outside_the_range_fall_into_the_end_bins() -> None:
    assert bin_of(99.0, 6.0, 20) == 19
    assert bin_of(-1.0, 6.0, 20) == 0


def test_solution_prices_the_next_token_and_what_may_follow() -> None:
    """Two tokens, one bin: 10 rounds, 8 accept the first, 6 both."""
    model = StopModel(1, 1, 2)
    for accepted in [2] * 6 + [1] * 2 + [0] * 2:
        model.learn(0, [0, 0], accepted)
    second, first = 0.6 - 0.5, 0.8 - 0.1
    worth = model.solve(price=1.0, marginal_seconds=[0.1, 0.5])
    assert worth[model.index(0, 0, 1)] == pytest.approx(second)
    assert worth[model.index(0, 0, 0)] == pytest.approx(first + second)


def test_rarely_seen_states_borrow_from_their_neighbours() -> None:
    model = StopModel(3, 1, 2)
    for _ in range(20):
        model.learn(0, [1, 1], 2)
    worth = model.solve(1.0, [0.1, 0.1])
    assert worth[model.index(2, 0, 1)] == pytest.approx(worth[model.index(1, 0, 1)])
    assert worth[model.index(2, 0, 0)] == 0.0


def test_acceptance_is_shrunk_towards_the_mean_of_the_position() -> None:
    """Two recent bins, 10 visits each, 10 and 0 accepted: mean 0.5, so (10 + 1) / 12 and 1 / 12."""
    model = StopModel(1, 2, 1)
    for _ in range(10):
        model.learn(0, [0], 1)
        model.learn(1, [0], 0)
    worth = model.solve(price=0.0, marginal_seconds=[0.0])
    assert worth[model.index(0, 0, 0)] == pytest.approx(11 / 12)
    assert worth[model.index(0, 1, 0)] == pytest.approx(1 / 12)


def trained(alpha_sure: float, alpha_unsure: float) -> Mdp:
    controller, rng = Mdp(MdpOptions(explore=0.1), costs()), random.Random(0)
    for _ in range(400):
        drafted = controller.plan(context(max_draft=4)).num_draft
        alphas, count = [], 0
        for position in range(1, drafted + 1):
            sure = rng.random() < 0.5
            alphas.append(alpha_sure if sure else alpha_unsure)
            count = position
            if not controller.keep_drafting(0, shown(position, entropy=0.1 if sure else 3.0)):
                break
        accepted = next((j for j in range(count) if rng.random() >= alphas[j]), count)
        controller.observe(record(accepted, count, seconds=0.02 + 0.0025 * count))
    return controller


def test_learns_to_stop_at_uncertain_tokens() -> None:
    controller = trained(alpha_sure=1.0, alpha_unsure=0.05)
    kept = {0.1: 0, 3.0: 0}
    for _ in range(100):
        controller.plan(context())
        for entropy in kept:
            kept[entropy] += controller.keep_drafting(0, shown(1, entropy=entropy))
    assert kept[0.1] > 90
    assert kept[3.0] < 25


def test_learns_to_switch_off() -> None:
    controller = trained(alpha_sure=0.0, alpha_unsure=0.0)
    assert sum(controller.plan(context()).num_draft > 0 for _ in range(100)) < 25


def test_explores_at_full_length_until_the_first_solution() -> None:
    controller = Mdp(MdpOptions(first_solve=3, explore=0.0), costs())
    for _ in range(3):
        plan = controller.plan(context())
        assert (plan.num_draft, plan.probe) == (8, True)
        controller.observe(record(0, 8, seconds=0.04))
    assert not controller.plan(context()).probe
