"""`specdecpp`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from paceline.control.heads import HeadSet, LogisticHead
from paceline.control.specdecpp import SpecDecPp, SpecDecPpOptions, stop_threshold
from paceline.errors import OptionError
from unit.control.kit import context, costs, shown


def identity_head(folder: Path) -> str:
    """P(accept) = max_prob."""
    path = folder / "head.json"
    path.write_text(json.dumps(LogisticHead(("max_logit",), (1.0,), 0.0).to_json()))
    return str(path)


def tokens_drafted(controller: SpecDecPp, chances: list[float]) -> int:
    limit = controller.plan(context()).num_draft
    for position, chance in enumerate(chances[:limit], start=1):
        if not controller.keep_drafting(0, shown(position, max_prob=chance)):
            return position
    return min(limit, len(chances))


@pytest.mark.parametrize(("lag", "expected"), [(True, 4), (False, 3)])
def test_worked_example_with_and_without_lag(tmp_path: Path, lag: bool, expected: int) -> None:
    controller = SpecDecPp(SpecDecPpOptions(head=identity_head(tmp_path), lag=lag), costs())
    assert tokens_drafted(controller, [0.9, 0.8, 0.9, 0.7, 0.9]) == expected


def test_optimal_threshold_gives_the_worked_value() -> None:
    assert stop_threshold(4, 10) == pytest.approx(0.714286, abs=1e-6)


def test_shortest_draft_is_kept_and_each_round_starts_anew(tmp_path: Path) -> None:
    controller = SpecDecPp(SpecDecPpOptions(head=identity_head(tmp_path), k_min=2), costs())
    assert tokens_drafted(controller, [0.1, 0.1, 0.1]) == 2
    assert tokens_drafted(controller, [0.99] * 30) == 20


def test_the_round_is_judged_by_the_head_of_its_drafter(tmp_path: Path) -> None:
    sure, unsure = LogisticHead(("max_logit",), (0.0,), 5.0), LogisticHead(("max_logit",), (0.0,), -5.0)
    path = tmp_path / "heads.json"
    path.write_text(json.dumps(HeadSet({"any": sure, "model": unsure}).to_json()))
    controller = SpecDecPp(SpecDecPpOptions(head=str(path), k_min=1), costs())
    controller.plan(context(drafter="early_exit"))
    assert controller.keep_drafting(0, shown())
    controller.plan(context(drafter="model:some/folder"))
    assert not controller.keep_drafting(0, shown())


def test_unreadable_head_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="missing"):
        SpecDecPp(SpecDecPpOptions(head=str(tmp_path / "missing.json")), costs())
