"""Fitting heads from rounds, and judging them on rounds held out."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import numpy as np
import pytest

from paceline.control.heads import LogisticHead
from paceline.errors import OptionError
from paceline.records import DraftFeatures, StepRecord
from paceline.study.heads import fit_head, hold_out, judge, training_rows, weighted_auc
from paceline.study.trace import Round


def finished(accepted: int, drafted: int, *, request_id: int = 0, probs: Sequence[float] = ()) -> Round:
    record = StepRecord(request_id, "model", drafted, drafted, accepted, accepted + 1, 10)
    return Round(record, tuple(DraftFeatures(j, p, p, 1 - p, p / 2) for j, p in enumerate(probs, start=1)))


def coin_rounds(count: int, seed: int = 0) -> list[Round]:
    """One-token drafts that are accepted as often as they say."""
    rng, rounds = random.Random(seed), []
    for i in range(count):
        prob = rng.uniform(0.05, 0.95)
        rounds.append(finished(int(rng.random() < prob), 1, request_id=i, probs=(prob,)))
    return rounds


def test_training_rows_leave_unobserved_tokens_out() -> None:
    rounds = [finished(1, 4, probs=(0.9, 0.8, 0.7, 0.6)), finished(2, 2, probs=(0.5, 0.4))]
    x, y = training_rows(rounds, ("max_prob", "recent"))
    assert y.tolist() == [1, 0, 1, 1]
    np.testing.assert_allclose(x, [[0.9, 1.0], [0.8, 1.0], [0.5, 0.25], [0.4, 0.25]])


def test_fit_recovers_the_odds_that_made_the_labels() -> None:
    head = fit_head(coin_rounds(4000), ("max_logit",), l2=1e-6)
    assert head.weights[0] == pytest.approx(1.0, abs=0.1)
    assert head.bias == pytest.approx(0.0, abs=0.1)


def test_fit_without_features_is_refused() -> None:
    with pytest.raises(OptionError, match="no drafted token has features"):
        fit_head([finished(1, 2)], ("max_prob",))


def test_requests_are_held_out_whole() -> None:
    rounds = [finished(1, 1, request_id=i // 2) for i in range(24)]
    fit, held = hold_out(rounds, every=4)
    assert {r.record.request_id for r in held} == {3, 7, 11}
    assert len(fit) + len(held) == 24
    assert not {r.record.request_id for r in fit} & {r.record.request_id for r in held}


def test_a_head_that_knows_beats_the_constant_and_one_that_does_not_equals_it() -> None:
    rounds = coin_rounds(3000, seed=1)
    knows = judge(LogisticHead(("max_logit",), (1.0,), 0.0), rounds, rate=0.5)
    constant = judge(LogisticHead(("max_logit",), (0.0,), 0.0), rounds, rate=0.5)
    assert knows.num_tokens == 3000
    assert knows.log_loss < knows.constant_log_loss - 0.1
    assert knows.auc > 0.75
    assert knows.predicted == pytest.approx(knows.accepted, abs=0.02)
    assert constant.log_loss == pytest.approx(constant.constant_log_loss) == pytest.approx(math.log(2))
    assert constant.auc == 0.5


def test_auc_of_outcomes_and_of_probabilities() -> None:
    scores = np.array([0.1, 0.4, 0.4, 0.8])
    assert weighted_auc(scores, np.array([0.0, 0.0, 1.0, 1.0])) == pytest.approx(3.5 / 4)
    soft = np.array([0.25, 0.75])
    assert weighted_auc(np.array([0.2, 0.9]), soft) == pytest.approx((0.75 * 0.75 + 0.5 * (0.75 * 0.25 + 0.25 * 0.75)) / 1.0)
    assert weighted_auc(scores, np.ones(4)) == 0.5


def test_nothing_held_out_is_refused() -> None:
    with pytest.raises(OptionError, match="held out"):
        judge(LogisticHead(("max_prob",), (1.0,), 0.0), [], rate=0.5)
