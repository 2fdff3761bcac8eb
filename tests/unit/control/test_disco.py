"""`disco`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from paceline.control.disco import DEFAULT_HEAD, Disco, DiscoOptions
from paceline.control.heads import LogisticHead
from paceline.records import DraftFeatures
from unit.control.kit import costs, record, shown


def test_logistic_score_gives_the_worked_value() -> None:
    head = LogisticHead(("max_prob", "entropy", "position"), (2.0, -0.5, -0.05), -0.2)
    features = DraftFeatures(2, max_prob=0.7, token_prob=0.7, entropy=0.8018)
    assert head.score(features) == pytest.approx(0.6991)
    assert head.probability(features) == pytest.approx(0.66799, abs=1e-5)


def test_goes_on_from_the_threshold_up(tmp_path: Path) -> None:
    path = tmp_path / "head.json"
    path.write_text(json.dumps(LogisticHead(("max_logit",), (1.0,), 0.0).to_json()))
    controller = Disco(DiscoOptions(head=str(path), threshold=0.5), costs())
    assert controller.keep_drafting(0, shown(max_prob=0.5001))
    assert not controller.keep_drafting(0, shown(max_prob=0.4999))


def test_last_rounds_acceptance_counts() -> None:
    controller = Disco(DiscoOptions(threshold=0.5), costs())
    doubtful = shown(max_prob=0.45, entropy=1.65)
    before = DEFAULT_HEAD.probability(doubtful, 1.0)
    after = DEFAULT_HEAD.probability(doubtful, 0.0)
    assert after < before
    controller = Disco(DiscoOptions(threshold=(before + after) / 2), costs())
    assert controller.keep_drafting(0, doubtful)
    controller.observe(record(0, 4))
    assert not controller.keep_drafting(0, doubtful)
    controller.finish(0)
    assert controller.keep_drafting(0, doubtful)
