"""Acceptance estimates: censored labels, discounts, signals, levels."""

from __future__ import annotations

import random

import pytest

from paceline.control.acceptance import (
    AcceptanceModel,
    PositionTable,
    Shift,
    WatchedShift,
    observed_labels,
    signal_bucket,
    temperature_tag,
)
from paceline.records import Plan
from unit.control.worlds import record


@pytest.mark.parametrize(("accepted", "drafted", "labels"), [(2, 4, (1, 1, 0)), (0, 4, (0,)), (4, 4, (1, 1, 1, 1)), (0, 0, ())])
def test_a_round_tells_about_positions_up_to_the_first_rejection(accepted: int, drafted: int, labels: tuple[float, ...]) -> None:
    assert observed_labels(record(Plan("draft", drafted), accepted)) == labels


def test_exact_acceptance_probabilities_are_taken_as_labels() -> None:
    assert observed_labels(record(Plan("draft", 3), 1, acceptance=(0.9, 0.4))) == (0.9, 0.4)


def test_a_round_cut_by_a_stop_condition_tells_nothing() -> None:
    assert observed_labels(record(Plan("draft", 4), 2, truncated=True)) == ()


def test_worked_example_of_discounted_counts() -> None:
    rates = PositionTable(discount=0.9, prior=[0.8] * 16, weight=3.0)
    rates.update((1, 1, 0))
    assert rates.means[:4] == pytest.approx([0.854054, 0.854054, 0.583784, 0.8], abs=1e-6)
    rates.update((0,))
    assert rates.means[:4] == pytest.approx([0.656813, 0.854054, 0.583784, 0.8], abs=1e-6)


def test_a_position_beyond_anything_seen_takes_the_last_one_seen() -> None:
    rates = PositionTable(discount=0.9, prior=[0.8] * 16, weight=3.0)
    rates.update((1, 1, 0))
    assert rates.rates(5) == pytest.approx([0.854054, 0.854054, 0.583784, 0.583784, 0.583784], abs=1e-6)
    assert len(rates.rates(63)) == 63


def test_positions_past_the_table_share_its_last_slot() -> None:
    rates = PositionTable(discount=0.9, prior=[0.5] * 16, weight=3.0)
    rates.update((1,) * 40)
    assert rates.seen == 16
    assert rates.rates(40)[-1] > 0.9


@pytest.mark.parametrize(("signal", "bucket"), [(0, 0), (1, 1), (8, 8), (9, 9), (16, 9), (17, 10), (500, 10)])
def test_signal_buckets(signal: int, bucket: int) -> None:
    assert signal_bucket(signal) == bucket


def first(model: AcceptanceModel, bucket: int, request: int = 0, task: str = "") -> float:
    return model.rates(request, task, "ngram", bucket, 1)[0]


def test_before_any_evidence_a_longer_match_is_worth_more() -> None:
    model = AcceptanceModel()
    rates = [first(model, bucket) for bucket in range(1, 11)]
    assert rates == sorted(rates)
    assert rates[0] < 0.3 < 0.8 < rates[-1]


def test_a_short_match_that_held_once_is_expected_to_hold_again() -> None:
    one, two, *_ = AcceptanceModel().rates(0, "", "ngram", 1, 4)
    assert one < 0.3 < 0.5 < two
    assert AcceptanceModel().rates(0, "", "model", 0, 20) == [0.7] * 20


def test_an_unseen_bucket_follows_the_drafters_other_buckets() -> None:
    good, bad = AcceptanceModel(), AcceptanceModel()
    for _ in range(30):
        good.update(0, "", "ngram", 2, (1, 1, 1))
        bad.update(0, "", "ngram", 2, (0,))
    fresh = AcceptanceModel()
    assert first(bad, 6, request=1) < first(fresh, 6) < first(good, 6, request=1)


def test_estimates_find_the_rates_of_each_position() -> None:
    rng, model, truth = random.Random(0), AcceptanceModel(), (0.8, 0.6, 0.4)
    for request in range(300):
        labels = []
        for rate in truth:
            labels.append(float(rng.random() < rate))
            if not labels[-1]:
                break
        model.update(request, "", "ngram", 3, labels)
    assert model.rates(999, "", "ngram", 3, 3) == pytest.approx(truth, abs=0.15)


def test_a_request_departs_from_its_pool_and_takes_its_odds_along_when_it_ends() -> None:
    model = AcceptanceModel()
    for request in range(50):
        model.update(request, "", "ngram", 3, (1,) if request % 2 else (0,))
    for _ in range(10):
        model.update(100, "", "ngram", 3, (1, 1))
    assert first(model, 3, request=100) > first(model, 3, request=101) + 0.1
    assert first(model, 4, request=100) > first(model, 4, request=101), "evidence carries over to other buckets"
    model.forget(100)
    assert first(model, 3, request=100) == first(model, 3, request=101)


def test_tasks_do_not_share_pools() -> None:
    model = AcceptanceModel()
    for _ in range(40):
        model.update(0, "code", "ngram", 3, (1, 1))
        model.update(1, "chat", "ngram", 3, (0,))
    assert first(model, 3, request=2, task="code") > 0.9
    assert first(model, 3, request=2, task="chat") < 0.1


def test_a_request_follows_a_change_within_a_few_rounds() -> None:
    model = AcceptanceModel()
    for _ in range(200):
        model.update(0, "", "ngram", 3, (0,))
    for _ in range(8):
        model.update(0, "", "ngram", 3, (1,))
    assert first(model, 3) > 0.4


def test_a_run_against_all_expectation_forgets_what_was_before() -> None:
    """Three hundred acceptances, then only rejections: after six of them the old evidence is gone."""
    shift = WatchedShift(1.0, 6.0)
    for _ in range(300):
        shift.update(1, hits=1.0, expected=0.8)
    believed = shift.odds
    for _ in range(6):
        shift.update(1, hits=0.0, expected=0.8)
    assert shift.total <= 6
    assert shift.odds < 1.0 < believed


def test_ordinary_bad_luck_is_no_change() -> None:
    rng, shift = random.Random(4), WatchedShift(0.99, 6.0)
    for _ in range(1000):
        shift.update(1, hits=float(rng.random() < 0.5), expected=0.5)
        assert 0.2 < shift.odds < 5.0


def test_doubt_is_full_at_no_gap_and_fades_with_gap_and_evidence() -> None:
    model = AcceptanceModel()
    assert model.doubt(0, "ngram", 0.3, 0.0) == 1.0
    before = model.doubt(0, "ngram", 0.3, 0.2)
    for _ in range(20):
        model.update(0, "", "ngram", 3, (0,))
    assert model.doubt(0, "ngram", 0.3, 0.2) < before < 1.0


def test_shift_of_odds_leaves_certainty_alone() -> None:
    shift = Shift(0.95, 5.0)
    shift.update(10, hits=9.0, expected=5.0)
    assert shift.odds > 1.0
    low, middle, sure = shift.apply([0.0, 0.5, 1.0])
    assert (low, sure) == (0.0, 1.0)
    assert middle > 0.5


def test_evidence_on_a_request_ages_with_tokens() -> None:
    young, old = Shift(1.0, 5.0), Shift(1.0, 5.0)
    for shift, later in ((young, 1), (old, 2048)):
        shift.update(20, hits=0.0, expected=10.0, now=0)
        shift.update(2, hits=2.0, expected=1.0, now=later)
    assert old.odds > young.odds


def test_snapshot_restores_estimates_with_less_weight() -> None:
    model = AcceptanceModel()
    for _ in range(200):
        model.update(0, "code", "ngram", 4, (1, 1, 0))
    other = AcceptanceModel()
    other.restore(model.snapshot())
    stored, fresh = (m.rates(7, "code", "ngram", 4, 3) for m in (other, model))
    assert stored == pytest.approx(fresh)
    other.update(7, "code", "ngram", 4, (0,))
    model.update(7, "code", "ngram", 4, (0,))
    assert other.rates(8, "code", "ngram", 4, 1) < model.rates(8, "code", "ngram", 4, 1)


@pytest.mark.parametrize("change", [{"bucket": 99}, {"hits": [1.0]}, {"totals": [0.0] * 16}, {"seen": 77}])
def test_damaged_snapshots_are_refused(change: dict[str, object]) -> None:
    model = AcceptanceModel()
    model.update(0, "", "ngram", 4, (1,))
    (pool,) = model.snapshot()
    with pytest.raises(ValueError, match="acceptance counts"):
        AcceptanceModel().restore([pool | change])


@pytest.mark.parametrize(
    ("task", "tag"), [("", ""), ("chat", ""), ("@1.0", "@1.0"), ("chat@0.7", "@0.7"), ("me@home", ""), ("me@home@0.7", "@0.7")]
)
def test_a_tasks_tag_tells_its_temperature(task: str, tag: str) -> None:
    assert temperature_tag(task) == tag


def test_a_match_is_trusted_less_at_a_high_temperature_and_a_draft_that_draws_is_not() -> None:
    model = AcceptanceModel()
    greedy, hot = (model.rates(0, task, "ngram", 4, 1)[0] for task in ("", "@1.0"))
    assert hot / (1 - hot) == pytest.approx(0.449 * greedy / (1 - greedy), rel=1e-3)
    assert model.rates(0, "", "model", 0, 2) == model.rates(0, "@1.0", "model", 0, 2)


def test_what_was_learnt_at_one_temperature_does_not_move_the_start_at_another() -> None:
    model = AcceptanceModel()
    fresh = model.rates(1, "other@1.0", "ngram", 4, 1)
    for _ in range(50):
        model.update(0, "", "ngram", 3, (0.0,))
    assert model.rates(1, "other@1.0", "ngram", 4, 1) == fresh
    assert model.rates(1, "other", "ngram", 4, 1) < model.rates(1, "", "unseen", 4, 1)
