"""What the pacer knows of drafts that state how sure they are."""

from __future__ import annotations

import pytest

from paceline.control.quality import DraftQuality
from paceline.records import DraftFeatures, Plan
from unit.control.worlds import record

SURE = DraftFeatures(1, 0.6, 0.6, 1.0)


def learn(quality: DraftQuality, accepted: int, rounds: int, **about: object) -> None:
    for _ in range(rounds):
        quality.states_confidence("model", str(about.get("task", ""))).asks = True
        quality.learn([record(Plan("model", 4), accepted, confidences=(0.6,) * 4, **about)], [0.02], 0)


def test_a_request_that_is_right_more_often_than_it_says_is_believed_more() -> None:
    quality = DraftQuality()
    learn(quality, 0, 40, request_id=7)
    learn(quality, 2, 40, request_id=7)
    quality.forget(7)
    confident = quality.states_confidence("model", "")
    common = quality.chance(9, "model", confident, SURE)
    assert common == pytest.approx(confident.model.chance(1, 0.6))
    learn(quality, 4, 4, request_id=1)
    learn(quality, 0, 4, request_id=2)
    assert quality.chance(1, "model", confident, SURE) > 1.3 * confident.model.chance(1, 0.6)
    assert quality.chance(2, "model", confident, SURE) < 0.75 * confident.model.chance(1, 0.6)


def test_each_temperature_has_a_calibration_of_its_own() -> None:
    quality = DraftQuality()
    learn(quality, 4, 60, task="")
    learn(quality, 0, 60, task="@1.0")
    greedy, hot = (quality.states_confidence("model", task).model.chance(1, 0.6) for task in ("", "@1.0"))
    assert greedy > 0.8
    assert hot < 0.2
    assert quality.confidence("model", "@0.7") is None
