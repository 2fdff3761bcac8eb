"""`specdecpp` and the head that it shares with `disco`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from paceline.control.heads import LogisticHead, logit
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


def test_built_in_head_trusts_confident_tokens_more() -> None:
    head = SpecDecPp(SpecDecPpOptions(), costs()).head
    sure, unsure = head.probability(shown(max_prob=0.99, entropy=0.05)), head.probability(shown(max_prob=0.2, entropy=2.5))
    assert sure > 0.8 > 0.5 > unsure


def test_logit_is_finite_at_the_ends() -> None:
    assert logit(0.0) == pytest.approx(-logit(1.0))


def test_unreadable_head_is_refused(tmp_path: Path) -> None:
    broken = tmp_path / "broken.json"
    broken.write_text('{"inputs": ["max_prob"], "weights": [1, 2], "bias": 0}')
    with pytest.raises(OptionError, match="weights"):
        SpecDecPp(SpecDecPpOptions(head=str(broken)), costs())
    with pytest.raises(OptionError, match="missing"):
        SpecDecPp(SpecDecPpOptions(head=str(tmp_path / "missing.json")), costs())


def test_unknown_head_input_is_refused() -> None:
    with pytest.raises(OptionError, match="choose from"):
        LogisticHead(("hidden_state",), (1.0,), 0.0)
