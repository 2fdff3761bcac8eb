"""`hedge`."""

from __future__ import annotations

import random

import pytest

from paceline.control.hedge import Hedge, HedgeOptions, expected_accepted, hedge_weights, survivals
from unit.control.kit import context, costs, record


def test_expected_accepted_length_gives_the_worked_value() -> None:
    g = (0.8, 0.7, 0.6)
    assert expected_accepted(g) == pytest.approx(1.696)
    exactly = [g[0] * (1 - g[1]), g[0] * g[1] * (1 - g[2]), g[0] * g[1] * g[2]]
    assert expected_accepted(g) == pytest.approx(sum(n * p for n, p in enumerate(exactly, start=1)))


def test_weights_give_the_worked_values() -> None:
    assert hedge_weights([1.69, 1.2], 0.5) == pytest.approx([0.560945, 0.439055], abs=1e-6)


def test_one_round_scores_every_length() -> None:
    """Accepted 2 of 3: lengths 0..3 would have emitted 1, 2, 3, 3 tokens, at the price of plain decoding (50 a second)."""
    controller = Hedge(HedgeOptions(k_max=3, discount=1.0, explore=0.0), costs())
    controller.plan(context())
    controller.observe(record(2, 3))
    seconds = [0.020, 0.023, 0.0255, 0.028]
    expected = [emitted - 50 * spent for emitted, spent in zip([1, 2, 3, 3], seconds, strict=True)]
    assert controller.gains == pytest.approx(expected)


def test_lengths_beyond_a_full_draft_are_credited_at_the_mean_rate() -> None:
    controller = Hedge(HedgeOptions(k_max=3, discount=1.0), costs())
    controller.plan(context())
    controller.observe(record(1, 1))
    mean = (1.6 + 1) / (2.0 + 1)
    assert controller.gains[3] + 50 * 0.028 == pytest.approx(1 + sum(survivals([1.0, mean, mean])))


@pytest.mark.parametrize(("alpha", "lowest", "highest"), [(0.0, 0.0, 0.3), (0.95, 2.8, 4.0)])
def test_settles_near_the_best_length(alpha: float, lowest: float, highest: float) -> None:
    controller, rng, planned = Hedge(HedgeOptions(k_max=4), costs()), random.Random(0), []
    for _ in range(300):
        drafted = controller.plan(context()).num_draft
        accepted = next((j for j in range(drafted) if rng.random() >= alpha), drafted)
        controller.observe(record(accepted, drafted))
        planned.append(drafted)
    assert lowest <= sum(planned[-100:]) / 100 <= highest
