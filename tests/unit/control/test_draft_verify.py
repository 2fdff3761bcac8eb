"""`draft_verify`."""

from __future__ import annotations

import pytest

from paceline.control.draft_verify import DraftVerify, DraftVerifyOptions, ExitThreshold
from unit.control.kit import context, costs, record, shown


def test_threshold_and_rate_follow_the_worked_example() -> None:
    threshold = ExitThreshold(0.8)
    rates, values = [], []
    for accepted, drafted in [(6, 8), (8, 8), (5, 5), (3, 3), (4, 4)]:
        threshold.update(accepted, drafted, k_max=8)
        rates.append(threshold.rate)
        values.append(threshold.value)
    assert rates == pytest.approx([0.375, 0.6875, 0.84375, 0.921875, 0.960938], abs=1e-6)
    assert values == pytest.approx([0.801, 0.802, 0.803, 0.802, 0.801])


def test_full_drafts_with_good_acceptance_leave_the_threshold() -> None:
    threshold = ExitThreshold(0.8, rate=1.0)
    threshold.update(8, 8, k_max=8)
    assert threshold.value == pytest.approx(0.8)


def test_stops_on_the_drawn_tokens_probability() -> None:
    controller = DraftVerify(DraftVerifyOptions(), costs())
    assert controller.plan(context()).num_draft == 8
    assert controller.keep_drafting(0, shown(max_prob=0.99, token_prob=0.8))
    assert not controller.keep_drafting(0, shown(max_prob=0.99, token_prob=0.79))


def test_controller_learns_from_finished_rounds() -> None:
    controller = DraftVerify(DraftVerifyOptions(), costs())
    controller.observe(record(6, 8))
    controller.observe(record(2, 8, truncated=True))
    assert controller.threshold.value == pytest.approx(0.801)
