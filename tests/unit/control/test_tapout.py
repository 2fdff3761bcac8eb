"""`tapout`."""

from __future__ import annotations

import random

import pytest

from paceline.control.tapout import TapOut, TapOutOptions, blended_reward, strategies, ucb1
from unit.control.kit import context, costs, record, shown


def test_ucb1_gives_the_worked_values() -> None:
    indices = [ucb1(mean, n, 10) for mean, n in ((0.5, 5), (0.6, 3), (0.36, 2))]
    assert indices == pytest.approx([1.459705, 1.838974, 1.877427], abs=1e-6)


def test_blended_reward_gives_the_worked_value() -> None:
    assert blended_reward(3, 5, 8) == pytest.approx(0.4875)


def test_every_strategy_is_tried_once_first() -> None:
    controller = TapOut(TapOutOptions(), costs())
    reasons = []
    for _ in controller.arms:
        plan = controller.plan(context())
        reasons.append(plan.reason)
        controller.observe(record(0, plan.num_draft, seconds=0.03))
    assert reasons == [s.name for s in strategies(12)]


def test_stop_rules_use_confidence_entropy_and_survival() -> None:
    rules = {s.name: s.stop for s in strategies(12) if s.stop is not None}
    assert rules["confidence 0.4"](shown(max_prob=0.39), 1.0)
    assert not rules["confidence 0.4"](shown(max_prob=0.41), 0.0)
    assert rules["entropy 0.6"](shown(entropy=0.61), 1.0)
    assert rules["survival 0.3"](shown(), 0.29)
    assert not rules["survival 0.3"](shown(), 0.31)


def test_survival_is_the_product_within_a_round() -> None:
    controller = TapOut(TapOutOptions(), costs())
    while controller.plan(context()).reason != "survival 0.3":
        controller.observe(record(0, 1, seconds=0.03))
    assert controller.keep_drafting(0, shown(1, max_prob=0.6))
    assert not controller.keep_drafting(0, shown(2, max_prob=0.4))


@pytest.mark.parametrize(
    ("alpha", "best"), [(0.0, {"plain"}), (0.97, {"fixed 8", "confidence 0.4", "entropy 0.6", "survival 0.3"})]
)
def test_settles_on_a_strategy_that_fits(alpha: float, best: set[str]) -> None:
    controller, rng, late = TapOut(TapOutOptions(), costs()), random.Random(0), 0
    for i in range(600):
        plan = controller.plan(context())
        late += i >= 300 and plan.reason in best
        accepted = next((j for j in range(plan.num_draft) if rng.random() >= alpha), plan.num_draft)
        controller.observe(record(accepted, plan.num_draft, seconds=0.02 + 0.002 * plan.num_draft))
    assert late > 180


def test_blended_reward_can_be_chosen() -> None:
    controller = TapOut(TapOutOptions(reward="blended", discount=1.0), costs())
    controller.plan(context())
    controller.observe(record(0, 0, seconds=0.02))
    controller.plan(context())
    controller.observe(record(1, 2, seconds=0.02))
    assert controller.arms[1].reward == pytest.approx(blended_reward(1, 2, 12))
