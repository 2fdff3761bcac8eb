"""`exl_ema`."""

from __future__ import annotations

import pytest

from paceline.control.exl_ema import ExlEma, ExlEmaOptions
from unit.control.kit import context, costs, lengths, record


def test_average_and_lengths_follow_a_worked_example() -> None:
    """10 at first; A = 2 sets the average; 2 of 2 counts as 3: 2 + 1.3 = 3.3; then 1: 3.3 - 0.65 * 2.3 = 1.805."""
    controller = ExlEma(ExlEmaOptions(), costs())
    assert controller.plan(context()).num_draft == 10
    assert lengths(controller, [2, 2, 1]) == [2, 4, 2]
    assert controller._averages[0].value == pytest.approx(1.805)


def test_skips_below_the_level_and_probes_every_sixteenth_round() -> None:
    controller = ExlEma(ExlEmaOptions(), costs())
    controller.observe(record(0, 10))
    plans = [controller.plan(context()) for _ in range(32)]
    assert [i for i, plan in enumerate(plans) if plan.num_draft] == [15, 31]
    assert plans[15].probe
    assert plans[15].num_draft == 2


def test_recovers_after_a_good_probe() -> None:
    controller = ExlEma(ExlEmaOptions(), costs())
    controller.observe(record(0, 10))
    controller.observe(record(2, 2))
    assert controller.plan(context()).num_draft == 4
