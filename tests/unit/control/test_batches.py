"""What rounds of a batch teach the pacer: reading that is shared, time outside forward and draft, rounds that are told late."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from paceline.control.base import RoundContext
from paceline.control.pacer import Pacer, PacerOptions
from paceline.costs import CostTable, DraftCost
from paceline.records import DraftFeatures, Outlook, Plan, StepRecord

MS = 1e-3
BATCH = 8


def table() -> CostTable:
    """Flat forwards; a draft reads a token in 20 microseconds by the table."""
    return CostTable([1, 64, 65, 128], [0], [[5 * MS, 6 * MS, 11 * MS, 12 * MS]], 0.0, {"draft": DraftCost(0.5 * MS, 0.0, 20e-6)})


def contexts(lag: int = 0) -> list[RoundContext]:
    outlook = Outlook("draft", 16, catch_up=lag, together=True)
    return [RoundContext(i, 200, 16, (outlook,), BATCH, "", 96) for i in range(BATCH)]


def finished(plans: list[Plan], *, outside: float = 0.0, reading: float = 0.0, warmup: bool = False) -> list[StepRecord]:
    """The round's records: all drafts accepted, steps shared."""
    longest = max(plan.num_draft for plan in plans)
    drafting = 0.5 * MS * longest + reading if longest else 0.0
    rows = BATCH + sum(plan.num_draft for plan in plans)
    verify = table().t_verify(rows, 0)
    return [
        StepRecord(
            request_id=i,
            drafter=plan.drafter,
            num_planned=plan.num_draft,
            num_drafted=plan.num_draft,
            num_accepted=plan.num_draft,
            num_emitted=plan.num_draft + 1,
            context_length=200,
            draft_seconds=drafting if plan.num_draft else 0.0,
            verify_seconds=verify,
            round_seconds=verify + drafting + outside,
            batch_size=BATCH,
            batch_rows=rows,
            batch_emitted=rows,
            warmup=warmup,
            batch_draft_seconds=drafting,
            expected_seconds=plan.expected_seconds,
        )
        for i, plan in enumerate(plans)
    ]


def observe(controller: Pacer, records: list[StepRecord]) -> None:
    for record in records:
        controller.observe(record)


def ready() -> Pacer:
    """One that knows what a plain round takes."""
    controller = Pacer(PacerOptions(start=50.0, explain=True), table())
    for _ in range(4):
        observe(controller, finished([Plan(None, 0)] * BATCH, outside=0.1 * MS))
    return controller


@pytest.mark.parametrize("warmup", [False, True])
def test_prompts_that_are_read_together_are_not_each_ones_own_time(warmup: bool) -> None:
    """Each of eight records holds the time in which all were read. Taken for its own, reading soon cost a hundred times as much."""
    controller = ready()
    plans = controller.plan_batch(contexts(lag=200))
    assert all(plan.num_draft for plan in plans)
    reading = BATCH * 200 * 10e-6
    observe(controller, finished(plans, reading=reading, outside=0.1 * MS, warmup=warmup))
    assert 9e-6 < controller._costs.catch_up("draft", 1) < 21e-6
    for _ in range(20):
        plans = controller.plan_batch(contexts(lag=200))
        observe(controller, finished(plans, reading=reading, outside=0.1 * MS))
    assert controller._costs.catch_up("draft", 1) == pytest.approx(10e-6, rel=0.1)


def test_a_capture_in_a_first_round_says_nothing_about_reading() -> None:
    controller = ready()
    before = controller._costs.catch_up("draft", 1)
    plans = controller.plan_batch(contexts(lag=200))
    observe(controller, [replace(r, round_seconds=10 * MS) for r in finished(plans, reading=0.5, warmup=True)])
    assert controller._costs.catch_up("draft", 1) == before


def test_time_outside_forward_and_draft_is_priced() -> None:
    """Planning, judging and committing for eight sequences once cost nothing in the plan, and a third of a round in truth."""
    controller = ready()
    for _ in range(12):
        plans = controller.plan_batch(contexts())
        observe(controller, finished(plans, outside=2 * MS))
    (seconds,) = {plan.expected_seconds for plan in controller.plan_batch(contexts()) if plan.num_draft}
    drafted = max(plan.num_draft for plan in plans)
    rows = BATCH + sum(plan.num_draft for plan in plans)
    assert seconds == pytest.approx(table().t_verify(rows, 0) + 0.5 * MS * drafted + 2 * MS, rel=0.05)


def test_who_is_left_alone_is_not_stopped_by_the_rule_of_its_last_batch() -> None:
    controller = ready()
    plans = controller.plan_batch(contexts())
    assert controller._joint.keep_drafting(0, DraftFeatures(1, 0.9, 0.9, 0.3, 0.5)) is not None
    observe(controller, finished(plans, outside=0.1 * MS))
    assert controller._joint.keep_drafting(0, DraftFeatures(1, 0.9, 0.9, 0.3, 0.5)) is None


def test_drafting_is_not_priced_twice_where_a_record_does_not_tell_it_apart() -> None:
    controller = ready()
    for _ in range(12):
        plans = controller.plan_batch(contexts())
        observe(controller, [replace(r, batch_draft_seconds=0.0) for r in finished(plans, outside=0.1 * MS)])
    plans = controller.plan_batch(contexts())
    (seconds,) = {plan.expected_seconds for plan in plans if plan.num_draft}
    drafted = max(plan.num_draft for plan in plans)
    rows = BATCH + sum(plan.num_draft for plan in plans)
    assert seconds <= 1.1 * (table().t_verify(rows, 0) + 0.5 * MS * drafted)


def test_a_round_may_be_planned_before_the_last_one_is_told() -> None:
    """The bank counts what both were granted, and each round is told apart from the other."""
    prompt, late = ready(), ready()
    for controller in (prompt, late):
        controller._bank.slack = 0.1
    first = late.plan_batch(contexts(lag=200))
    granted = late._bank.granted
    second = late.plan_batch(contexts())
    assert late._bank.granted > granted > 0.0
    observe(late, finished(first, reading=BATCH * 200 * 10e-6))
    third = late.plan_batch(contexts())
    assert late._bank.granted >= sum(late._joint._stakes) > 0.0
    observe(late, finished(second))
    observe(late, finished(third))
    assert not late._joint._stakes
    observe(prompt, finished(prompt.plan_batch(contexts(lag=200)), reading=BATCH * 200 * 10e-6))
    assert late._costs.catch_up("draft", 1) == pytest.approx(prompt._costs.catch_up("draft", 1), rel=0.05)


def test_an_interruption_of_drafts_that_share_their_steps_is_not_charged_as_if_each_had_its_own() -> None:
    """A pause of 120 ms once emptied the bank for hundreds of rounds: eight drafts of their own might have taken half of it."""
    controller = ready()
    for _ in range(40):
        observe(controller, finished(controller.plan_batch(contexts())))
    before = controller._bank.slack
    plans = controller.plan_batch(contexts())
    refused = {"num_accepted": 0, "num_emitted": 1, "batch_emitted": BATCH}
    observe(controller, [replace(r, round_seconds=r.round_seconds + 0.12, **refused) for r in finished(plans)])
    assert before - controller._bank.slack < 25 * MS


def test_what_clearly_does_not_pay_is_asked_for_ever_less_often() -> None:
    controller = ready()
    asked: list[int] = []
    for number in range(200):
        if controller.plan_unseen("", BATCH) is None:
            plans = controller.plan_batch(contexts())
            asked.append(number)
        else:
            plans = [Plan(None, 0)] * BATCH
        refused = {"num_accepted": 0, "num_emitted": 1, "batch_emitted": BATCH}
        observe(controller, [replace(r, **refused) for r in finished(plans)])
    rests = [later - sooner for sooner, later in pairwise(asked)]
    assert max(rests[len(rests) // 2 :]) >= 32
    for _ in range(60):  # and soon found again where it does
        if controller.plan_unseen("", BATCH) is None:
            plans = controller.plan_batch(contexts())
        observe(controller, finished(plans))
    assert any(plan.num_draft for plan in plans)
