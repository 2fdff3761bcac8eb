"""`disco`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from paceline.control.disco import Disco, DiscoOptions
from paceline.control.heads import LogisticHead
from paceline.records import DraftFeatures
from unit.control.kit import context, costs, record, shown


def test_logistic_score_gives_the_worked_value() -> None:
    head = LogisticHead(("max_prob", "entropy", "position"), (2.0, -0.5, -0.05), -0.2)
    features = DraftFeatures(2, max_prob=0.7, token_prob=0.7, entropy=0.8018)
    assert head.score(features) == pytest.approx(0.6991)
    assert head.probability(features) == pytest.approx(0.66799, abs=1e-5)


def controller_with(tmp_path: Path, head: LogisticHead, threshold: float = 0.5) -> Disco:
    path = tmp_path / "head.json"
    path.write_text(json.dumps(head.to_json()))
    controller = Disco(DiscoOptions(head=str(path), threshold=threshold), costs())
    controller.plan(context())
    return controller


def test_goes_on_from_the_threshold_up(tmp_path: Path) -> None:
    controller = controller_with(tmp_path, LogisticHead(("max_logit",), (1.0,), 0.0))
    assert controller.keep_drafting(0, shown(max_prob=0.5001))
    assert not controller.keep_drafting(0, shown(max_prob=0.4999))


def test_last_rounds_acceptance_counts(tmp_path: Path) -> None:
    """Log-odds 2 * recent - 1: above one half after a full acceptance, and at the start; below after a rejection."""
    controller = controller_with(tmp_path, LogisticHead(("recent",), (2.0,), -1.0))
    assert controller.keep_drafting(0, shown())
    controller.observe(record(0, 4))
    controller.plan(context())
    assert not controller.keep_drafting(0, shown())
    controller.finish(0)
    controller.plan(context())
    assert controller.keep_drafting(0, shown())
