"""`adaedl`."""

from __future__ import annotations

import math

import pytest

from paceline.control.adaedl import AdaEdl, AdaEdlOptions, acceptance_bound
from unit.control.kit import costs, record, shown


def entropy(*probs: float) -> float:
    return -sum(p * math.log(p) for p in probs)


def test_bound_gives_the_worked_values() -> None:
    assert acceptance_bound(entropy(0.7, 0.2, 0.1)) == pytest.approx(0.599546, abs=1e-6)
    assert acceptance_bound(entropy(0.95, 0.03, 0.02)) == pytest.approx(0.784516, abs=1e-6)


def test_negative_bound_stops_at_any_threshold() -> None:
    controller = AdaEdl(AdaEdlOptions(threshold=0.0), costs())
    assert not controller.keep_drafting(0, shown(entropy=5.1))
    assert controller.keep_drafting(0, shown(entropy=4.9))


def test_low_acceptance_raises_the_threshold() -> None:
    controller = AdaEdl(AdaEdlOptions(step=0.5), costs())
    assert controller.keep_drafting(0, shown(entropy=1.7))
    for _ in range(4):
        controller.observe(record(0, 10))
    assert not controller.keep_drafting(0, shown(entropy=1.7))
