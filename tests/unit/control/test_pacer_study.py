"""What the pacer puts off until a device works by itself, and what it does not."""

from __future__ import annotations

import pytest

from paceline.control.base import RoundContext
from paceline.control.pacer import Pacer, PacerOptions
from paceline.costs import CostTable, DraftCost
from paceline.records import Outlook, Plan
from unit.control.worlds import MS, record

BATCH = 8


def pacer() -> Pacer:
    costs = CostTable([1, 64], [0], [[20 * MS, 20 * MS]], 0.0, {"draft": DraftCost(per_token=1 * MS)})
    return Pacer(PacerOptions(eps=0.0), costs)


def context(request: int) -> RoundContext:
    return RoundContext(request, 100, 10, (Outlook("draft", 10, together=True),), BATCH)


def play(controller: Pacer, accepted: int, seconds: float) -> list[Plan]:
    """A round of the batch in which at most `accepted` tokens of each draft are accepted."""
    plans = controller.plan_batch([context(request) for request in range(BATCH)])
    kept = [min(accepted, plan.num_draft) for plan in plans]
    rows = sum(plan.num_draft + 1 for plan in plans)
    for request, (plan, count) in enumerate(zip(plans, kept, strict=True)):
        whole = seconds if rows > BATCH else 20 * MS
        times = {"verify_seconds": 20 * MS, "round_seconds": whole, "draft_seconds": 1 * MS * plan.num_draft}
        about = {"batch_size": BATCH, "batch_rows": rows, "batch_emitted": sum(kept) + BATCH}
        controller.observe(record(plan, count, request_id=request, **times, **about))
    return plans


def first_rate(controller: Pacer) -> float:
    return controller._quality.rates(0, "", "draft", 0, 4)[0]


def test_lessons_of_a_drafted_batch_wait_for_time_and_its_costs_do_not() -> None:
    controller = pacer()
    controller.study()
    for _ in range(8):  # plain rounds, whose price must be known, are among them
        play(controller, 2, 30 * MS)
        controller.study()
    rate, slack = first_rate(controller), controller._bank.slack
    plans = play(controller, 9, 45 * MS)
    assert any(plan.num_draft for plan in plans)
    assert not any(plan.probe for plan in plans)
    assert controller._bank.slack != pytest.approx(slack)
    assert first_rate(controller) == pytest.approx(rate)
    controller.study()
    assert first_rate(controller) > rate
    known = first_rate(controller)
    controller.study()
    assert first_rate(controller) == pytest.approx(known)


def test_without_anybody_who_has_time_lessons_are_learnt_at_once() -> None:
    controller = pacer()
    rate = first_rate(controller)
    play(controller, 9, 30 * MS)
    assert first_rate(controller) > rate


def test_lessons_that_wait_are_learnt_when_a_request_ends() -> None:
    controller = pacer()
    controller.study()
    rate = first_rate(controller)
    play(controller, 9, 30 * MS)
    controller.finish(3)
    assert controller._quality.rates(1, "", "draft", 0, 4)[0] > rate
