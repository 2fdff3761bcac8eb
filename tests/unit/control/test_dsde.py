"""`dsde`."""

from __future__ import annotations

import pytest

from paceline.control.dsde import Dsde, DsdeOptions, draft_length, longest, scale_factor, variance_ratio
from unit.control.kit import context, costs, record


def test_formulas_give_the_worked_values() -> None:
    scale = scale_factor(0.1)
    assert scale == pytest.approx(0.221403, abs=1e-6)
    lengths = [draft_length(scale, ratio, 2, 10) for ratio in (1, 3, 6)]
    assert lengths == pytest.approx([8.22878, 4.68633, 2.0], abs=1e-5)
    assert longest(8, 0.1, 0.5) == pytest.approx(9.6)


def test_variance_ratio_of_constant_values_is_one() -> None:
    assert variance_ratio([0.3] * 30) == 1.0
    assert variance_ratio([]) == 1.0


def test_variance_ratio_exceeds_one_when_the_latest_values_swing() -> None:
    assert variance_ratio([0.0] * 20 + [1.0, 0.0] * 5) > 1.05
    assert variance_ratio([1.0, 0.0] * 10 + [0.5] * 10) == pytest.approx(0.0)


def played(controller: Dsde, rounds: int, acceptance: tuple[float, ...]) -> int:
    for _ in range(rounds):
        controller.plan(context())
        controller.observe(record(len(acceptance), len(acceptance), acceptance=acceptance))
    return controller.plan(context()).num_draft


def test_calibration_drafts_the_full_length_then_close_models_keep_it() -> None:
    controller = Dsde(DsdeOptions(calibration_rounds=3), costs())
    assert controller.plan(context()).num_draft == 12
    assert played(controller, 4, (1.0,) * 10) == 10


def test_distant_models_get_the_shortest_drafts() -> None:
    assert played(Dsde(DsdeOptions(calibration_rounds=3), costs()), 6, (0.3, 0.2)) == 2


def test_no_length_of_a_batch_exceeds_the_mean() -> None:
    controller = Dsde(DsdeOptions(calibration_rounds=2), costs())
    for request_id, acceptance in ((1, (1.0,) * 12), (2, (0.2,))):
        controller.observe(record(len(acceptance), len(acceptance), request_id=request_id, acceptance=acceptance))
        controller.plan(context(request_id=request_id))
    alone = controller.plan(context(request_id=1)).num_draft
    controller.plan(context(request_id=2, batch=2))
    together = controller.plan(context(request_id=1, batch=2)).num_draft
    assert together < alone
