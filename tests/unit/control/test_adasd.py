"""`adasd_like`, stop side."""

from __future__ import annotations

import pytest

from paceline.control.adasd import AdaSdLike, AdaSdOptions, MidpointThreshold
from unit.control.kit import context, costs, play, shown


def test_midpoint_gives_the_worked_values() -> None:
    threshold = MidpointThreshold(min_count=1)
    for entropy in (0.2, 0.4):
        threshold.add(entropy, accepted=True)
    threshold.add(1.6, accepted=False)
    assert threshold.value == pytest.approx(0.95)
    threshold.add(0.5, accepted=True)
    assert threshold.value == pytest.approx(0.983333, abs=1e-6)


def test_no_threshold_before_both_classes_have_enough_tokens() -> None:
    threshold = MidpointThreshold(min_count=2)
    for _ in range(5):
        threshold.add(0.1, accepted=True)
    threshold.add(2.0, accepted=False)
    assert threshold.value is None


def test_stops_above_the_midpoint_and_learns_up_to_the_first_rejection() -> None:
    controller = AdaSdLike(AdaSdOptions(min_count=1), costs())
    assert controller.keep_drafting(0, shown(entropy=9.0))
    play(controller, 1, [shown(1, entropy=0.2), shown(2, entropy=1.8), shown(3, entropy=5.0)])
    assert controller.threshold.value == pytest.approx(1.0)
    assert controller.keep_drafting(0, shown(entropy=0.99))
    assert not controller.keep_drafting(0, shown(entropy=1.01))


def test_relaxed_acceptances_teach_nothing() -> None:
    controller = AdaSdLike(AdaSdOptions(min_count=1), costs())
    features = [shown(1, entropy=0.2), shown(2, entropy=3.0), shown(3, entropy=2.0)]
    play(controller, 2, features, divergence=(0.1, 0.4, 0.5), relaxed=(1,))
    assert (controller.threshold.accepted_sum, controller.threshold.rejected_sum) == pytest.approx((0.2, 2.0))
    assert (controller.tolerance.accepted_sum, controller.tolerance.rejected_sum) == pytest.approx((0.1, 0.5))


def test_tolerance_is_the_worked_midpoint_of_divergences() -> None:
    controller = AdaSdLike(AdaSdOptions(min_count=1), costs())
    assert play(controller, 2, [shown(j) for j in (1, 2, 3)], divergence=(0.10, 0.20, 0.50)).tolerance is None
    assert controller.plan(context()).tolerance == pytest.approx(0.325)


def test_without_a_relaxed_rule_there_is_no_tolerance() -> None:
    controller = AdaSdLike(AdaSdOptions(min_count=1), costs())
    for _ in range(5):
        assert play(controller, 1, [shown(1), shown(2)]).tolerance is None
