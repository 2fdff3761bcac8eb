"""`hf_heuristic` and `hf_confidence`."""

from __future__ import annotations

import pytest

from paceline.control.hf import HfConfidence, HfConfidenceOptions, HfHeuristic, HfHeuristicOptions, roc_threshold
from paceline.errors import OptionError
from unit.control.kit import context, costs, lengths, play, record, shown


def test_heuristic_gives_the_worked_lengths() -> None:
    assert lengths(HfHeuristic(HfHeuristicOptions(start=5), costs()), [5, 7, 2, 1]) == [7, 9, 8, 7]


def test_heuristic_never_falls_under_one() -> None:
    assert lengths(HfHeuristic(HfHeuristicOptions(start=2), costs()), [0, 0, 0])[-1] == 1


@pytest.mark.parametrize(("transient", "expected"), [(False, 7), (True, 5)])
def test_learnt_length_passes_to_the_next_request_unless_transient(transient: bool, expected: int) -> None:
    controller = HfHeuristic(HfHeuristicOptions(transient=transient), costs())
    controller.plan(context(request_id=1))
    controller.observe(record(5, 5, request_id=1))
    controller.finish(1)
    assert controller.plan(context(request_id=2)).num_draft == expected


def test_truncated_and_plain_rounds_teach_nothing() -> None:
    controller = HfHeuristic(HfHeuristicOptions(), costs())
    controller.observe(record(2, 5, truncated=True))
    controller.observe(record(0, 0))
    assert controller.plan(context()).num_draft == 5


def test_roc_threshold_gives_the_worked_value() -> None:
    probs = [0.9, 0.85, 0.6, 0.5, 0.4, 0.2]
    assert roc_threshold(probs, [True, False, True, True, False, False]) == 0.5


def test_roc_threshold_of_misleading_confidence_is_the_lowest() -> None:
    assert roc_threshold([0.2, 0.3, 0.4, 0.9, 0.95, 0.99], [True] * 3 + [False] * 3) == 0.2


def test_confidence_stops_at_the_token_under_the_threshold() -> None:
    controller = HfConfidence(HfConfidenceOptions(explore=0.0), costs())
    assert controller.plan(context()).num_draft == 20
    assert controller.keep_drafting(0, shown(1, max_prob=0.9, token_prob=0.4))
    assert not controller.keep_drafting(0, shown(2, max_prob=0.9, token_prob=0.39))


def test_threshold_moves_once_both_outcomes_are_known() -> None:
    controller = HfConfidence(HfConfidenceOptions(explore=0.0, update_every=1), costs())
    play(controller, 3, [shown(j, max_prob=p) for j, p in enumerate((0.9, 0.8, 0.7), start=1)])
    assert controller.threshold == 0.4
    play(controller, 2, [shown(j, max_prob=p) for j, p in enumerate((0.9, 0.8, 0.6, 0.1), start=1)])
    assert controller.threshold == 0.7


def test_tokens_past_the_first_rejection_are_not_labelled() -> None:
    controller = HfConfidence(HfConfidenceOptions(update_every=1), costs())
    play(controller, 1, [shown(j) for j in range(1, 9)])
    assert list(controller._matches) == [True, False]


def test_labels_are_bounded_by_the_window() -> None:
    controller = HfConfidence(HfConfidenceOptions(window=8), costs())
    for _ in range(5):
        play(controller, 4, [shown(j) for j in range(1, 5)])
    assert len(controller._probs) == 8


def test_exploration_ignores_a_share_of_the_stops() -> None:
    controller = HfConfidence(HfConfidenceOptions(explore=0.25), costs())
    kept = sum(controller.keep_drafting(0, shown(max_prob=0.1)) for _ in range(400))
    assert 60 < kept < 140


def test_zero_threshold_never_stops_and_never_learns() -> None:
    controller = HfConfidence(HfConfidenceOptions(threshold=0.0, update_every=1), costs())
    assert controller.keep_drafting(0, shown(max_prob=0.001))
    play(controller, 1, [shown(j, max_prob=0.1 * j) for j in range(1, 8)])
    assert controller.threshold == 0.0


@pytest.mark.parametrize("bad", [{"threshold": 1.5}, {"num_draft": 0}, {"window": 2}, {"explore": float("nan")}])
def test_bad_options_are_refused_by_name(bad: dict[str, float]) -> None:
    with pytest.raises(OptionError, match=next(iter(bad))):
        HfConfidenceOptions(**bad)  # type: ignore[arg-type]
