"""Prices of rounds: the worked examples of the cost model, and costs that follow what is seen."""

from __future__ import annotations

import math

import pytest

from paceline.control.followed import Line, MedianFactor, Overlap, Scales, rows_bucket
from paceline.control.pricing import LearnedCosts, best_ratio, node_rates, worth_another
from paceline.records import Plan
from unit.control.worlds import MS, linear, record, table

RATES = [0.85, 0.8, 0.75, 0.7]
SECONDS = [20.0, 2 + 20.5 + 0.5, 4 + 21 + 0.5, 6 + 21.5 + 0.5, 8 + 26 + 0.5]
"""Draft step 2, verification 20, 20.5, 21, 21.5, 26, overhead 0.5; the fifth row is a cliff."""


def test_expected_tokens_of_equal_rates() -> None:
    assert best_ratio([0.8] * 4, [1.0] * 5) == (4, pytest.approx(3.3616))


@pytest.mark.parametrize(("rate", "draft", "length", "speedup"), [(0.8, 0.1, 6, 2.4696), (0.5, 0.05, 3, 1.630435)])
def test_best_length_of_equal_rates(rate: float, draft: float, length: int, speedup: float) -> None:
    k, emitted = best_ratio([rate] * 10, [1 + draft * k for k in range(11)])
    assert k == length
    assert emitted / (1 + draft * k) == pytest.approx(speedup, abs=1e-4)


def test_a_draft_as_dear_as_its_acceptance_breaks_even() -> None:
    k, emitted = best_ratio([0.3] * 5, [1 + 0.3 * k for k in range(6)])
    assert k == 1
    assert emitted / 1.3 == pytest.approx(1.0, abs=1e-12)


def test_best_length_by_position_and_measured_times() -> None:
    k, emitted = best_ratio(RATES, SECONDS)
    assert (k, emitted) == (3, pytest.approx(3.04))
    assert 1000 * emitted / SECONDS[k] == pytest.approx(108.5714, abs=1e-4)


@pytest.mark.parametrize(("drafted", "survival", "expected"), [(2, 0.68, True), (3, 0.51, False)])
def test_stop_rule_at_the_best_rate(drafted: int, survival: float, expected: bool) -> None:
    assert worth_another(survival, drafted, RATES, SECONDS, price=0.108571) is expected


def test_scan_sees_the_gain_behind_a_step_in_costs() -> None:
    seconds = [10.0, 16.0, 16.1, 16.2, 16.3, 16.4]
    assert best_ratio([0.9] * 5, seconds)[0] == 5
    assert best_ratio([0.9], seconds)[0] == 1
    assert best_ratio([0.9], seconds)[1] / seconds[1] < best_ratio([0.9] * 5, seconds)[1] / seconds[5]


def test_stop_rule_looks_past_a_dear_token() -> None:
    seconds = [10.0, 10.1, 14.0, 14.1, 14.2, 14.3]
    assert not worth_another(0.9, 1, [0.9] * 2, seconds, price=0.25)
    assert worth_another(0.9, 1, [0.9] * 5, seconds, price=0.25)


def test_buckets_of_rows_are_exact_and_then_double() -> None:
    assert [rows_bucket(n) for n in (1, 64, 65, 128, 129, 256, 257)] == [1, 64, 65, 65, 66, 66, 67]
    assert rows_bucket(10**9) == 80


def test_scales_follow_a_slower_machine_for_rows_never_seen() -> None:
    scales = Scales()
    for _ in range(50):
        scales.update(1, 1.5)
    assert scales.of(1) == pytest.approx(1.5, rel=0.01)
    assert scales.of(7) > 1.25


def test_scales_tell_a_dear_number_of_rows_from_a_slow_machine() -> None:
    scales = Scales()
    for _ in range(200):
        scales.update(1, 1.0)
        scales.update(5, 1.6)
    assert scales.of(1) == pytest.approx(1.0, rel=0.03)
    assert scales.of(5) == pytest.approx(1.6, rel=0.03)
    settled = scales.of(1)
    for _ in range(200):
        scales.update(5, 1.6)
    assert scales.of(1) == pytest.approx(settled, rel=0.05), "more rounds of five rows say nothing about one row"


def test_scales_recover_from_a_table_that_was_measured_under_heavy_load() -> None:
    scales = Scales()
    for _ in range(12):
        scales.update(1, 1 / 16)
    assert scales.of(1) == pytest.approx(1 / 16, rel=0.15)
    assert scales.of(4) < 1 / 4


def test_scales_clip_outliers() -> None:
    scales = Scales()
    for _ in range(50):
        scales.update(3, 1.0)
    scales.update(3, 100.0)
    assert scales.of(3) < 1.2


def test_median_factor_ignores_a_hiccup_and_believes_three_slow_rounds() -> None:
    factor = MedianFactor()
    factor.update(9.0, 1.0)
    assert factor.value == 1.0
    for _ in range(3):
        factor.update(2.0, 1.0)
    assert factor.value == 2.0


def test_median_factor_counts_a_batched_round_once() -> None:
    factor = MedianFactor()
    for _ in range(2 * 4):
        factor.update(2.0, 0.25)
    assert factor.value == 1.0


def test_line_learns_fixed_and_marginal_time() -> None:
    line = Line(0.0, 0.0, 0.0)
    for tokens in (1, 4, 2, 8, 3) * 10:
        line.learn(tokens, 0.5 + 0.25 * tokens)
    assert line.fixed == pytest.approx(0.5, rel=0.05)
    assert line.per_token == pytest.approx(0.25, rel=0.05)


def test_line_with_one_length_only_predicts_that_length() -> None:
    line = Line(0.0, 0.0, 0.0)
    for _ in range(30):
        line.learn(4, 2.0)
    assert line.fixed + 4 * line.per_token == pytest.approx(2.0)


def test_line_keeps_its_first_guess_as_worst_case() -> None:
    line = Line(1.0, 1.0, 4.0)
    for _ in range(100):
        line.learn(3, 0.3)
    assert line.fixed + 3 * line.per_token == pytest.approx(0.3, rel=0.05)
    assert line.worst(3) == pytest.approx(4.0)


def test_learnt_curve_follows_what_rounds_took_and_neighbours_share_it() -> None:
    costs = LearnedCosts(table(linear(20, 1)))
    for _ in range(100):
        costs.learn_round(100, 5, 1, 2 * 24 * MS)
    learnt = costs.learnt(1, 8, 100)
    assert learnt[4] == pytest.approx(2 * 24 * MS, rel=0.02)
    assert learnt[5] == pytest.approx(2 * 25 * MS, rel=0.4)


def test_speculative_rounds_do_not_move_the_price_of_a_plain_step() -> None:
    costs = LearnedCosts(table(linear(20, 1)))
    for _ in range(100):
        costs.learn_round(100, 5, 1, 3 * 24 * MS)
    assert costs.plain(100) == pytest.approx(20 * MS)
    for _ in range(5):
        costs.learn_plain(100, 1, 25 * MS, 24 * MS)
    assert costs.plain(100) == pytest.approx(25 * MS)


def test_price_of_a_plain_step_is_stale_once_forwards_take_another_time() -> None:
    costs = LearnedCosts(table(linear(20, 1)))
    plain, four = costs.measured(1, 0, 100)[0], costs.measured(4, 0, 100)[0]
    for _ in range(4):
        costs.learn_plain(100, 1, plain, plain)
        costs.learn_round(100, 4, 1, four)
    assert not costs.plain_is_stale
    for _ in range(10):
        costs.learn_round(100, 4, 1, 1.5 * four)
    assert costs.plain_is_stale
    costs.learn_plain(100, 1, 1.5 * plain, 1.5 * plain)
    assert not costs.plain_is_stale


def test_a_new_scale_of_the_table_is_seen() -> None:
    measured = table(linear(20, 1))
    costs = LearnedCosts(measured)
    assert costs.plain(100) == pytest.approx(20 * MS)
    measured.scale = 2.0
    assert costs.plain(100) == pytest.approx(40 * MS)


def test_a_drafter_unknown_to_the_table_is_priced_after_its_first_round() -> None:
    costs = LearnedCosts(table(linear(20, 1)))
    assert costs.line("new").worst(4) == 0.0
    costs.line("new").learn(4, 8 * MS)
    line = costs.line("new")
    assert line.fixed + 4 * line.per_token == pytest.approx(8 * MS)


def batched(overlap: Overlap, drafts: list[float], host: float, rounds: int = 30) -> None:
    for _ in range(rounds):
        for seconds in drafts:
            overlap.observe(len(drafts), seconds, host)


def test_drafts_made_one_after_another_cost_a_request_all_of_its_own() -> None:
    overlap = Overlap()
    batched(overlap, [2.0, 2.0, 2.0, 2.0], host=8.1)
    assert overlap.share(4) == pytest.approx(1.0, abs=0.05)


def test_drafts_made_together_are_shared() -> None:
    overlap = Overlap()
    batched(overlap, [2.0, 2.0, 2.0, 2.0], host=2.0)
    assert overlap.share(4) == pytest.approx(0.25, abs=0.05)


def test_a_round_with_one_draft_says_nothing_about_overlap() -> None:
    overlap = Overlap()
    batched(overlap, [2.0, 0.0, 0.0, 0.0], host=2.0)
    assert overlap.serial == 0.5


def test_a_run_of_scales_is_what_each_number_of_rows_gets() -> None:
    scales = Scales()
    for rows, ratio in ((1, 1.2), (3, 0.8), (62, 1.5), (70, 2.0)):
        scales.update(rows, ratio)
    for rows, count in ((1, 17), (60, 12)):
        assert scales.run(rows, count) == [scales.of(rows + extra) for extra in range(count)]


def test_nodes_of_a_tree_share_what_their_level_brings() -> None:
    nodes = node_rates([0.8, 0.5, 0.5, 0.5], 2.0)
    products = [math.prod(nodes[: k + 1]) for k in range(4)]
    assert products == pytest.approx([0.4, 0.4, 0.2, 0.2])
    assert node_rates([0.8, 0.5], 1.0) == [0.8, 0.5]


def draft_of_four(costs: LearnedCosts) -> float:
    fixed, each = costs.drafting("draft")
    return fixed + 4 * each


def test_plain_and_drafting_are_compared_under_the_load_that_forwards_show() -> None:
    """Speculative rounds become half as fast: the bank's plain price must not follow; that of choices must, and that of drafts."""
    costs = LearnedCosts(table(linear(20, 0.8), draft_ms=3))
    for _ in range(4):
        costs.learn_plain(100, 1, 20 * MS, 20 * MS)
    slow = {"num_accepted": 0, "draft_seconds": 24 * MS, "verify_seconds": 2 * 23.2 * MS}
    for _ in range(40):
        costs.learn_speculative(record(Plan("draft", 4), **slow), 5, 71 * MS, 0)
    assert costs.plain(100) == pytest.approx(20 * MS)
    assert 1.3 < costs.change < 2.0  # a part of it might be a matter of five rows
    assert draft_of_four(costs) == pytest.approx(24 * MS, rel=0.1)
    for _ in range(12):
        costs.learn_plain(100, 1, 20 * MS, 20 * MS, weight=4.0)  # the load is gone, which plain rounds alone show
    assert costs.change == pytest.approx(1.0, rel=0.1)
    assert draft_of_four(costs) < 20 * MS


def test_a_batch_takes_the_price_of_a_plain_step_from_sizes_like_it() -> None:
    costs = LearnedCosts(table(linear(20, 0.5)))
    for _ in range(3):
        costs.learn_plain(100, 16, 2 * costs.measured(16, 0, 100)[0], 40 * MS)
    assert costs.knows_plain(9)
    assert costs.plain(100, 9) == pytest.approx(2 * costs.measured(9, 0, 100)[0])
    assert not costs.knows_plain(3)
    assert not costs.knows_plain(1)  # its promise is held by rounds of its own
