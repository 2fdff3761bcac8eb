"""Calibrated confidence."""

from __future__ import annotations

import json
import math
import random

import pytest

from paceline.control.confidence import ConfidenceModel


def test_worked_example_of_the_initial_curve() -> None:
    model = ConfidenceModel()
    chances = [model.chance(1, p) for p in (0.3, 0.6, 0.9, 0.99)]
    assert chances == pytest.approx([0.348952, 0.500683, 0.710664, 0.890666], abs=1e-6)


@pytest.mark.parametrize("max_prob", [0.0, 1.0, 1e-300, 1 - 1e-16])
def test_extreme_confidences_are_clamped(max_prob: float) -> None:
    assert 0.0 <= ConfidenceModel().chance(3, max_prob) <= 1.0


def taught(slope: float, intercept: float, rounds: int = 2000) -> ConfidenceModel:
    rng, model = random.Random(1), ConfidenceModel()
    for _ in range(rounds):
        shown, labels = [], []
        for _ in range(4):
            shown.append(rng.uniform(0.05, 0.98))
            feature = math.log(shown[-1] / (1 - shown[-1]))
            labels.append(float(rng.random() < 1 / (1 + math.exp(-slope * feature - intercept))))
            if not labels[-1]:
                break
        model.update(shown, labels)
    return model


@pytest.mark.parametrize(("slope", "intercept"), [(1.0, 0.0), (0.6, 1.0), (2.0, -1.0)])
def test_learns_the_curve_that_made_the_labels(slope: float, intercept: float) -> None:
    model = taught(slope, intercept)
    for p in (0.3, 0.6, 0.9):
        feature = math.log(p / (1 - p))
        assert model.chance(1, p) == pytest.approx(1 / (1 + math.exp(-slope * feature - intercept)), abs=0.12)


def test_confidence_that_means_nothing_is_ignored() -> None:
    rng, model = random.Random(2), ConfidenceModel()
    for _ in range(1000):
        model.update([rng.uniform(0.05, 0.98)], [float(rng.random() < 0.7)])
    assert model.chance(1, 0.95) - model.chance(1, 0.3) < 0.25


def test_slope_never_turns_negative() -> None:
    rng, model = random.Random(3), ConfidenceModel()
    for _ in range(1000):
        p = rng.uniform(0.05, 0.98)
        model.update([p], [float(rng.random() > p)])
    assert model.chance(1, 0.9) >= model.chance(1, 0.2)


def test_positions_have_levels_of_their_own() -> None:
    model = ConfidenceModel()
    for i in range(600):
        model.update([0.8, 0.8], [1.0, float(i % 3 == 0)])
    assert model.chance(1, 0.8) > 0.85
    assert model.chance(2, 0.8) == pytest.approx(1 / 3, abs=0.1)


def test_unanimous_labels_do_not_blow_up_the_fit() -> None:
    model = ConfidenceModel()
    for _ in range(3000):
        model.update([0.9, 0.9], [1.0, 1.0])
    assert 0.9 < model.chance(1, 0.9) <= 1.0
    for _ in range(1000):
        model.update([0.9, 0.9], [0.0])
    assert model.chance(1, 0.9) < 0.4


def test_only_observed_positions_are_learnt() -> None:
    model = ConfidenceModel()
    model.update([0.9, 0.9, 0.9, 0.9], [1.0, 0.0])
    assert model.labels == 2


def test_reliability_compares_predicted_with_observed() -> None:
    bins = taught(1.0, 0.0).reliability()
    assert len(bins) >= 5
    assert [b.predicted for b in bins] == sorted(b.predicted for b in bins)
    for b in bins:
        if b.labels > 200:
            assert b.accepted == pytest.approx(b.predicted, abs=0.12)


def test_snapshot_survives_json() -> None:
    model = taught(1.5, 0.3, rounds=300)
    other = ConfidenceModel()
    other.restore(json.loads(json.dumps(model.snapshot())))
    assert other.chance(2, 0.7) == model.chance(2, 0.7)
    assert other.labels == model.labels


def test_damaged_snapshot_is_refused() -> None:
    with pytest.raises(ValueError, match="intercepts"):
        ConfidenceModel().restore({"slope": 1.0, "intercepts": [0.0], "labels": 3})
