"""Calibrated confidence of early exits: the fit, and the choice of an exit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from paceline.drafting.self_draft.calibration import Calibration
from paceline.drafting.self_draft.early_exit import EarlyExitDrafter
from paceline.execution.base import Segment
from paceline.records import DraftFeatures, Verdict
from unit.drafting.self_kit import COMPILED, PROMPT, all_of, generate, in_cache, make, target


def overconfident(factor: float = 2.5) -> tuple[torch.Tensor, list[int]]:
    """2000 rows whose labels follow softmax(row / factor)."""
    random = np.random.RandomState(0)
    scores = 1.5 * random.randn(2000, 5)
    probs = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    return torch.tensor(factor * scores).float(), [int(random.choice(5, p=row)) for row in probs]


def test_the_fit_follows_the_least_negative_log_likelihood() -> None:
    rows, labels = overconfident()
    fitted = Calibration()
    for row, label in zip(rows, labels, strict=True):
        fitted.learn(row, label)
    candidates = np.linspace(1.5, 4.0, 251)
    losses = [float(torch.nn.functional.cross_entropy(rows / t, torch.tensor(labels))) for t in candidates]
    best = float(candidates[int(np.argmin(losses))])
    assert best == pytest.approx(2.55, abs=0.05)
    assert fitted.temperature == pytest.approx(best, rel=0.02)


def test_calibrated_confidence_leaves_less_often_and_is_right_more_often() -> None:
    rows, labels = overconfident()
    fitted = Calibration()
    for row, label in zip(rows, labels, strict=True):
        fitted.learn(row, label)

    def exits(calibration: Calibration) -> tuple[float, float]:
        sure = [i for i, row in enumerate(rows) if calibration.confidence(row) >= 0.8]
        return len(sure) / len(rows), sum(int(rows[i].argmax()) == labels[i] for i in sure) / len(sure)

    raw, calibrated = exits(Calibration()), exits(fitted)
    assert raw == pytest.approx((0.579, 0.677), abs=0.015)
    assert calibrated == pytest.approx((0.117, 0.860), abs=0.02)


def test_a_classifier_that_is_right_as_often_as_it_says_keeps_temperature_one() -> None:
    rows, labels = overconfident(factor=1.0)
    fitted = Calibration()
    for row, label in zip(rows, labels, strict=True):
        fitted.learn(row, label)
    assert fitted.temperature == pytest.approx(1.0, rel=0.05)


def test_impossible_tokens_neither_break_nor_move_the_fit() -> None:
    row = torch.tensor([1.0, 0.5, -torch.inf])
    fitted = Calibration()
    fitted.learn(row, 2)
    assert (fitted.temperature, fitted.count) == (1.0, 0)
    fitted.learn(row, 1)
    assert fitted.count == 1
    assert 0.5 < fitted.confidence(row) < 1.0


@pytest.mark.parametrize("label", [0, 1])
def test_temperatures_stay_within_reach(label: int) -> None:
    fitted = Calibration()
    for _ in range(3000):
        fitted.learn(torch.tensor([40.0, 0.0]), label)
    assert 0.05 <= fitted.temperature <= 20.0


@COMPILED
def test_the_controller_is_told_the_calibrated_confidence() -> None:
    drafter = make("early_exit", layer=2, calibrate=True)
    assert isinstance(drafter, EarlyExitDrafter)
    generate(drafter, max_tokens=60)
    fitted = drafter.calibration(2, 0.0)
    assert fitted.count > 20
    assert fitted.temperature > 1.1  # random layers are sure and wrong
    view, told = in_cache(), list[DraftFeatures]()
    assert view.sequence is not None
    row = target().forward_part([Segment(view.sequence, PROMPT[-1:])], layers=2).logits[0].clone()
    draft = drafter.open(view).propose(2, lambda features: told.append(features) is None)
    assert told[0].max_prob == draft.confidences[0] == pytest.approx(fitted.confidence(row))
    assert told[0].max_prob < told[0].token_prob  # the raw one


@COMPILED
def test_a_round_leaves_at_the_first_exit_that_is_sure_enough() -> None:
    def exit_of(threshold: float) -> tuple[int, ...]:
        return all_of(make("early_exit", exits=(1, 5), threshold=threshold).open(in_cache()), 3).tokens

    always, never = (all_of(make("early_exit", layer=layer).open(in_cache()), 3).tokens for layer in (1, 5))
    assert always != never
    assert exit_of(0.0) == always
    assert exit_of(1.0) == never


@COMPILED
def test_only_positions_that_the_target_settled_are_learnt_from() -> None:
    drafter = make("early_exit", layer=2, calibrate=True)
    assert isinstance(drafter, EarlyExitDrafter)
    session = drafter.open(in_cache())
    draft = all_of(session, 4)
    session.observe(Verdict((0,), (draft.tokens[0], 7)), None)
    assert drafter.calibration(2, 0.0).count == 2
    session.observe(None, None)
    assert drafter.calibration(2, 0.0).count == 2
