"""Which tokens of a batch's drafts get a place in the forward, against a search over all rounds."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.control.base import RoundContext
from paceline.control.joint import JointDraft, JointRound, Share, allocate, best_round, weigh
from paceline.records import Outlook

RATES = st.lists(st.floats(0.05, 1.0), min_size=1, max_size=3)


def share(
    rates: list[float], drafter: str = "draft", line: tuple[float, float] = (0.0, 0.0), once: float = 0.0, request: int = 0
) -> Share:
    outlook = Outlook(drafter, len(rates))
    return Share(RoundContext(request, 100, 8, (outlook,)), outlook, rates, *line, once)


def expected(rates: list[float], count: int) -> float:
    """Accepted tokens of the first `count`, by definition."""
    chance = total = 0.0
    for j in range(count):
        chance = rates[j] * (chance if j else 1.0)
        total += chance
    return total


@given(drafts=st.lists(RATES, min_size=1, max_size=4), steps=st.lists(st.floats(0.0, 0.5), min_size=13, max_size=13))
@settings(max_examples=60)
def test_with_free_drafts_the_scan_finds_the_best_of_all_rounds(drafts: list[list[float]], steps: list[float]) -> None:
    forwards = [1.0]
    for step in steps:
        forwards.append(forwards[-1] + step)
    shares = [share(rates) for rates in drafts]
    found = allocate(shares, forwards, 0.0, 0.0)
    batch = len(drafts)

    def speed(counts: tuple[int, ...]) -> float:
        emitted = sum(expected(rates, count) for rates, count in zip(drafts, counts, strict=True))
        return (batch + emitted) / forwards[sum(counts)]

    rounds = [c for c in product(*(range(len(rates) + 1) for rates in drafts)) if sum(c) > 0]
    best = found.best(batch)
    found.give(best)
    counts = tuple(one.num_draft for one in shares)
    likely = all(rate > 0.3 for rates in drafts for rate in rates)  # else some are no candidates
    assert sum(counts) == best
    assert speed(counts) == pytest.approx((batch + found.emitted[best]) / found.seconds[best])
    if likely:
        assert speed(counts) == pytest.approx(max(map(speed, rounds)))
    assert sum(one.emitted for one in shares) == pytest.approx(batch + found.emitted[best])


def test_the_worked_example_of_the_notes() -> None:
    """7.6: drafting 6 ms, verification 20 + 1.2 (2 + n); survivals .9, .72, .36 and .6, .3, .12: lengths 3 and 2."""
    shares = [share([0.9, 0.8, 0.5]), share([0.6, 0.5, 0.4])]
    found = allocate(shares, [26.0 + 1.2 * (2 + n) for n in range(7)], 0.0, 0.0)
    speeds = [1000.0 * (2 + found.emitted[n]) / found.seconds[n] for n in range(1, 7)]
    assert speeds == pytest.approx([97.973, 117.532, 131.875, 137.952, 141.860, 140.449], abs=1e-3)
    found.give(found.best(2))
    assert [one.num_draft for one in shares] == [3, 2]


def test_a_hopeless_draft_is_still_a_candidate_with_its_first_token() -> None:
    """Batches of drafts that were never accepted once ended in an error."""
    found = allocate([share([0.001, 0.9])], [10.0, 11.0, 12.0], 0.0, 0.0)
    assert (found.order, found.best(1)) == ([0], 1)


@pytest.mark.parametrize(("serial", "host"), [(0.0, 1.0 + 0.5 * 3), (1.0, 2 * 1.0 + 0.5 * 5), (0.5, 0.5 * 2.5 + 0.5 * 4.5)])
def test_shared_steps_are_paid_once_and_others_by_each(serial: float, host: float) -> None:
    line = (1.0, 0.5)
    found = allocate([share([0.9, 0.9, 0.9], line=line), share([0.8, 0.8], line=line)], [10.0] * 7, serial, 0.0)
    assert found.seconds[-1] == pytest.approx(10.0 + host)


def test_what_a_draft_must_catch_up_is_paid_with_its_first_token() -> None:
    found = allocate([share([0.9, 0.8], once=2.0)], [10.0, 11.0, 12.0], 0.0, 0.25)
    assert found.seconds == pytest.approx([10.0, 13.25, 14.5])


def test_a_round_with_a_draft_pays_for_what_is_done_once_and_has_no_more_tokens_than_it_may() -> None:
    found = allocate([share([0.9, 0.8]), share([0.7])], [10.0, 11.0, 12.0, 13.0], 0.0, 0.25, 2.0, most=2)
    assert found.seconds == pytest.approx([10.0, 13.25, 14.5])
    assert found.order == [0, 0]


@given(drafts=st.lists(st.tuples(RATES, st.integers(1, 500)), min_size=1, max_size=6))
def test_who_has_more_rounds_left_counts_for_more(drafts: list[tuple[list[float], int]]) -> None:
    shares = [share(rates, request=i) for i, (rates, _) in enumerate(drafts)]
    for one, (_, remaining) in zip(shares, drafts, strict=True):
        one.context = replace(one.context, remaining=remaining)
    weigh(shares)
    weights = [one.weight for one in shares]
    assert sum(weights) == pytest.approx(len(weights))
    assert max(weights) <= 4.001 * min(weights)
    left = [remaining / (1.0 + expected(rates, len(rates))) for rates, remaining in drafts]
    assert sorted(weights) == pytest.approx([weights[i] for i in sorted(range(len(left)), key=left.__getitem__)])


def test_places_go_to_those_that_would_end_last() -> None:
    """Of two sequences the one that is right less often has as much left: it gets the place of the other one's second token."""
    shares = [share([0.9, 0.7], request=0), share([0.5, 0.5], request=1)]
    assert allocate(shares, [10.0, 10.1, 10.2, 14.0, 15.0], 0.0, 0.0).order[:2] == [0, 0]
    shares[0].context = replace(shares[0].context, remaining=20)
    shares[1].context = replace(shares[1].context, remaining=60)
    weigh(shares)
    found = allocate(shares, [10.0, 10.1, 10.2, 14.0, 15.0], 0.0, 0.0)
    assert sorted(found.order[:2]) == [0, 1]
    assert shares[0].weight < 1.0 < shares[1].weight
    assert found.emitted[-1] == pytest.approx(shares[0].weight * 0.9 * 1.7 + 0.5 * 1.5)  # a weight is no gain


@given(
    drafts=st.lists(st.tuples(RATES, st.sampled_from(["draft", "other"]), st.floats(0.5, 2.0)), min_size=1, max_size=5),
    steps=st.lists(st.floats(0.0, 0.5), min_size=15, max_size=15),
    serial=st.sampled_from([0.0, 0.5, 1.0]),
    most=st.one_of(st.none(), st.integers(1, 15)),
)
@settings(max_examples=100)
def test_all_depths_at_once_are_the_best_scan_of_every_depth(
    drafts: list[tuple[list[float], str, float]], steps: list[float], serial: float, most: int | None
) -> None:
    forwards = [10.0]
    for step in steps:
        forwards.append(forwards[-1] + step)
    lines = {"draft": (0.3, 0.7), "other": (0.1, 0.2)}
    shares = [share(rates, name, lines[name], 0.05 * i, i) for i, (rates, name, _) in enumerate(drafts)]
    for one, (_, _, weight) in zip(shares, drafts, strict=True):
        one.weight = weight
    batch, prices = len(drafts) + 1, (forwards, serial, 0.01, 0.3, most)
    scans = [allocate(shares, *prices, deepest) for deepest in range(1, 4)]
    want = max((batch + scan.emitted[m]) / scan.seconds[m] for scan in scans for m in [scan.best(batch)])
    found, count = best_round(shares, *prices, batch=batch)
    assert (batch + found.emitted[count]) / found.seconds[count] == pytest.approx(want)
    like = next(scan for scan in scans if scan.order == found.order)
    assert found.seconds == pytest.approx(like.seconds)
    assert found.emitted == pytest.approx(like.emitted)


def test_a_step_that_all_would_pay_for_is_not_taken_for_a_likely_draft_alone() -> None:
    """Sixteen sequences whose drafts are nearly always right: those with the larger weights once got five tokens, others one, for
    the price of five steps instead of three."""
    shares = [share([0.97] * 8, line=(0.2, 0.56), request=i) for i in range(16)]
    for i, one in enumerate(shares):
        one.weight = 1.2 if i % 2 else 0.8
    forwards = [4.1 + 0.02 * rows for rows in range(129)]
    found, count = best_round(shares, forwards, 0.0, 0.0, 0.8, 48, batch=16)
    found.give(count)
    assert [one.num_draft for one in shares] == [3] * 16


def draft(common: JointRound, request: int, given: int, *, ahead: bool = False) -> JointDraft:
    """One of six tokens at most; a step takes half a second."""
    one = share([0.9] * 6, line=(0.0, 0.5), request=request)
    one.outlook = Outlook("draft", 6, together=True, ahead=int(ahead))
    one.num_draft = given
    return common.join(one, stops=True)


def test_all_go_on_while_they_are_worth_a_step_together() -> None:
    common = JointRound(price=1.0, row=0.1, serial=0.0)
    one, other = draft(common, 0, 4), draft(common, 1, 4)
    one.survival, other.survival = 0.5, 0.3
    assert common.goes_on(one, 1)
    assert common.goes_on(other, 1)  # 0.35 and 0.17 tokens beyond the rows' worth, for half a second
    other.survival = 0.1
    assert not common.goes_on(other, 2)  # not worth its row
    assert not common.goes_on(one, 2)  # not worth the step alone


def test_who_drafts_by_itself_pays_for_its_own_steps_only() -> None:
    common = JointRound(price=1.0, row=0.1, serial=1.0)
    one, other = draft(common, 0, 4), draft(common, 1, 4)
    one.survival, other.survival = 0.7, 0.5
    assert common.goes_on(one, 1)  # 0.63 tokens for a row and a step of its own
    assert not common.goes_on(other, 1)  # 0.45


def test_a_row_that_is_left_is_not_worth_a_step_that_nobody_else_takes() -> None:
    common = JointRound(price=1.0, row=0.1, serial=0.0)
    short, *others = [draft(common, i, 3) for i in range(4)]
    short.survival = 0.0
    assert not common.goes_on(short, 1)
    assert common.free_rows == 2
    for one in others:
        one.survival = 0.45
        assert common.goes_on(one, 1)
    for one in others:  # all three may, who were given it: 0.18 tokens each beyond the row's worth, for half a second
        one.survival = 0.31
        assert common.goes_on(one, 2)
    assert not common.goes_on(others[0], 3)  # two rows are left: 0.36
    others[1].survival = others[2].survival = 0.9
    assert common.goes_on(others[1], 3)


@pytest.mark.parametrize("ahead", [False, True])
def test_rows_are_handed_on_and_never_more_than_were_planned(ahead: bool) -> None:
    common = JointRound(price=0.1, row=0.1, serial=0.0)
    hopeless, eager, content = draft(common, 0, 5, ahead=ahead), draft(common, 1, 2, ahead=ahead), draft(common, 2, 3)
    hopeless.survival = 0.0
    assert not common.goes_on(hopeless, 1)
    drafted = 1 + ahead
    assert common.free_rows == 5 - drafted
    position = 1
    while common.goes_on(eager, position):
        position += 1
    assert position + ahead == min(2 + 5 - drafted, 6)
    assert drafted + (position + ahead) + content.share.num_draft + common.free_rows == 5 + 2 + 3
