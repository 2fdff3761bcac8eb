"""Logistic heads, sets of them, and those that come with the package."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from paceline.control.heads import FEATURES, HeadSet, LogisticHead, logit, shipped
from paceline.errors import OptionError
from unit.control.kit import shown

SURE, UNSURE = LogisticHead(("max_logit",), (1.0,), 2.0), LogisticHead(("max_logit",), (1.0,), -2.0)


def test_logit_is_finite_at_the_ends() -> None:
    assert logit(0.0) == pytest.approx(-logit(1.0))


def test_a_drafter_has_the_head_of_its_kind_or_the_common_one() -> None:
    heads = HeadSet({"any": SURE, "model": UNSURE})
    assert [heads.of(name) for name in ("model:a/b", "model+tree", "early_exit", "")] == [UNSURE, UNSURE, SURE, SURE]


def test_heads_survive_json_and_a_single_head_serves_all(tmp_path: Path) -> None:
    path = tmp_path / "heads.json"
    heads = HeadSet({"any": SURE, "model": UNSURE})
    path.write_text(json.dumps(heads.to_json()))
    assert HeadSet.load(str(path)) == heads
    path.write_text(json.dumps(SURE.to_json()))
    assert HeadSet.load(str(path)).of("model:x") == SURE


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"inputs": ["max_prob"], "weights": [1, 2], "bias": 0}', "weights"),
        ('{"inputs": ["hidden_state"], "weights": [1], "bias": 0}', "choose from"),
        ('{"heads": {"model": {"inputs": ["max_prob"], "weights": [1], "bias": 0}}}', "no head for `any`"),
        ("[]", "not a readable head"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "heads.json"
    path.write_text(text)
    with pytest.raises(OptionError, match=reason):
        HeadSet.load(str(path))


@pytest.mark.parametrize("name", ["specdecpp", "disco"])
def test_shipped_heads_trust_confident_tokens_more(name: str) -> None:
    for head in shipped(name).heads.values():
        sure, unsure = shown(max_prob=0.99, entropy=0.05), shown(max_prob=0.2, entropy=3.5)
        assert head.probability(sure) > head.probability(unsure)
        assert head.note
        assert set(head.inputs) <= set(FEATURES)
