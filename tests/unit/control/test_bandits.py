"""`ucb` and `exp3`."""

from __future__ import annotations

import random

import pytest

from paceline.control.bandits import Exp3, Exp3Options, LengthBandit, Ucb, UcbOptions, exp3_weights, ucb_index
from paceline.errors import OptionError
from unit.control.kit import context, costs, record


def test_index_gives_the_worked_values() -> None:
    indices = [ucb_index(mean, n, 10, 3, 4, 0.1) for mean, n in ((2.5, 5), (3.0, 3), (1.8, 2))]
    assert indices == pytest.approx([6.748802, 8.719212, 9.171163], abs=1e-6)


def test_exp3_weights_follow_the_worked_rounds() -> None:
    losses = [0.0, 0.0, 0.0]
    assert exp3_weights(losses, 1) == pytest.approx([1 / 3] * 3)
    losses[0] += (4 + 1 - 2) / 4 / (1 / 3)
    assert losses[0] == pytest.approx(2.25)
    assert exp3_weights(losses, 2) == pytest.approx([0.160309, 0.419846, 0.419846], abs=1e-6)
    assert exp3_weights(losses, 3) == pytest.approx([0.185540, 0.407230, 0.407230], abs=1e-6)


def test_exp3_learns_the_published_loss_where_rounds_cost_nothing_extra() -> None:
    controller = Exp3(Exp3Options(lengths=(1, 4)), costs())
    controller.learn(0, value=2.0, chance=1 / 3)
    controller.learn(1, value=5.0, chance=0.419846)
    assert controller.losses == pytest.approx([2.25, 0.0, 0.0])


def test_time_is_charged_at_the_price_of_sums() -> None:
    controller = Ucb(UcbOptions(lengths=(1,)), costs())
    controller.plan(context())
    controller.observe(record(1, 1, seconds=0.025))
    price = controller.price.value(0.020)
    assert price == pytest.approx(80.0)
    assert controller.arms[1].mean(price) == pytest.approx(2 - 80 * 0.005)


def world(controller: LengthBandit, alpha: float, step: float, rounds: int) -> list[int]:
    """Planned lengths where a round of k drafted tokens takes 20 ms + k * step."""
    rng, planned = random.Random(1), []
    for _ in range(rounds):
        drafted = controller.plan(context()).num_draft
        accepted = next((j for j in range(drafted) if rng.random() >= alpha), drafted)
        controller.observe(record(accepted, drafted, seconds=0.020 + step * drafted))
        planned.append(drafted)
    return planned


def test_ucb_tries_every_length_and_settles_on_the_fastest() -> None:
    planned = world(Ucb(UcbOptions(), costs()), alpha=0.9, step=0.001, rounds=600)
    assert set(planned[:4]) == {1, 2, 4, 8}
    assert planned[-200:].count(8) > 150


def test_ucb_switches_off_when_time_is_dear() -> None:
    planned = world(Ucb(UcbOptions(), costs()), alpha=0.1, step=0.010, rounds=400)
    assert planned[-100:].count(0) > 95


def test_exp3_leans_towards_the_fastest_length() -> None:
    planned = world(Exp3(Exp3Options(lengths=(1, 8)), costs()), alpha=0.95, step=0.001, rounds=1500)
    assert planned[-500:].count(8) > 300


def test_exp3_repeats_with_its_seed() -> None:
    runs = [world(Exp3(Exp3Options(seed=3), costs()), 0.7, 0.002, 50) for _ in range(2)]
    assert runs[0] == runs[1]


def test_rounds_without_a_draft_belong_to_no_length() -> None:
    controller = Ucb(UcbOptions(), costs())
    controller.plan(context(available=0))
    controller.observe(record(0, 0, seconds=0.02))
    assert sum(arm.count for arm in controller.arms) == 0


def test_unordered_lengths_are_refused() -> None:
    with pytest.raises(OptionError, match="lengths"):
        UcbOptions(lengths=(4, 2))
