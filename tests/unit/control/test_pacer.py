"""The pacer: what it chooses, what it may lose, how it follows change."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.control.base import RoundContext
from paceline.control.pacer import Pacer, PacerOptions
from paceline.costs import CostTable, DraftCost
from paceline.errors import OptionError
from paceline.records import DraftFeatures, Outlook, Plan, StepRecord
from unit.control.worlds import MS, START, linear, record, simulate, table

# The synthetic check of the control notes: draft step 3 ms, verification 20 + 0.8 (n - 1) ms, overhead 1 ms.
CHECK = table(linear(20, 0.8), draft_ms=3, overhead_ms=1)


def check() -> CostTable:
    return CostTable.from_json(CHECK.to_json())


def pacer(costs: CostTable | None = None, **options: object) -> Pacer:
    return Pacer(PacerOptions(**options), costs or check())  # type: ignore[arg-type]


def context(*outlooks: Outlook, **about: object) -> RoundContext:
    values: dict[str, object] = {"request_id": 0, "context_length": 100, "max_draft": 10, "outlooks": outlooks}
    return RoundContext(**(values | about))  # type: ignore[arg-type]


DRAFT = Outlook("draft", 10)


def play(controller: Pacer, accepted: int, outlook: Outlook = DRAFT, costs: CostTable = CHECK, **about: object) -> Plan:
    """One round of one request in which at most `accepted` drafted tokens are accepted."""
    plan = controller.plan(context(outlook, **about))
    k = plan.num_draft
    draft, verify = costs.t_draft(outlook.drafter, k), costs.t_verify(k + 1, 100)
    seconds = draft + verify + (costs.round_overhead if k else 0.0)
    controller.observe(
        record(
            plan,
            min(accepted, k),
            signal=outlook.signal if k else 0,
            draft_seconds=draft,
            verify_seconds=verify,
            round_seconds=seconds,
            request_id=about.get("request_id", 0),
            task=about.get("task", ""),
        )
    )
    return plan


# ---------- the choice ----------


@pytest.mark.parametrize(
    "nothing", [context(), context(Outlook("draft", 0)), context(DRAFT, max_draft=0), context(Outlook("a", 0), Outlook("b", 0))]
)
def test_plain_when_nothing_can_be_drafted(nothing: RoundContext) -> None:
    plan = pacer().plan(nothing)
    assert (plan.drafter, plan.num_draft) == (None, 0)


@given(
    available=st.lists(st.integers(0, 80), max_size=4),
    max_draft=st.integers(-1, 63),
    batch_size=st.integers(1, 40),
    signal=st.integers(0, 100),
    lag=st.integers(0, 5000),
)
def test_plans_keep_to_the_limits(available: list[int], max_draft: int, batch_size: int, signal: int, lag: int) -> None:
    outlooks = [Outlook(f"d{i}", n, signal, lag) for i, n in enumerate(available)]
    plan = pacer().plan(context(*outlooks, max_draft=max_draft, batch_size=batch_size))
    if plan.drafter is None:
        assert plan.num_draft == 0
    else:
        assert 1 <= plan.num_draft <= min(max_draft, available[int(plan.drafter[1:])])


def test_settles_on_the_best_length_of_the_worked_example() -> None:
    """Acceptance .85, .8, .75, .7 by position with a cliff at five rows: three tokens are best."""
    costs = table([20, 20.5, 21, 21.5, 26, 26.5, 27, 27.5, 28, 28.5, 29], draft_ms=2, overhead_ms=0.5)
    rng, controller, planned = random.Random(0), pacer(costs), []
    for _ in range(1500):
        accepted = next((j for j, a in enumerate((0.85, 0.8, 0.75, 0.7, 0.5)) if rng.random() >= a), 5)
        planned.append(play(controller, accepted, costs=costs).num_draft)
    late = [k for k in planned[-500:] if k]
    assert late.count(3) > 0.8 * len(late)


def test_sees_past_a_step_in_verification_cost() -> None:
    """The second row doubles the price, the others are free: short drafts never pay, long ones do."""
    costs = table([20] + [36] * 20)
    controller = pacer(costs)
    planned = [play(controller, 10, costs=costs).num_draft for _ in range(50)]
    assert planned[-1] == 10
    assert pacer(costs).plan(context(Outlook("draft", 1))).num_draft == 0


def test_context_dependent_costs_change_the_length() -> None:
    short, long = [20 * MS + 0.2 * MS * n for n in range(12)], [40 * MS + 12 * MS * n for n in range(12)]
    costs = CostTable(list(range(1, 13)), [0, 8192], [short, long], 0.0, {"draft": DraftCost()})
    assert pacer(costs).plan(context(DRAFT, context_length=64)).num_draft > 4
    assert pacer(costs).plan(context(DRAFT, context_length=8000)).num_draft <= 3


def test_takes_the_drafter_that_pays_more() -> None:
    costs = table(linear(20, 0.8), draft_ms=8)
    costs.drafters["ngram"] = DraftCost(0.0, 0.1 * MS)
    controller = pacer(costs)
    weak, strong, model = Outlook("ngram", 10, 1), Outlook("ngram", 10, 8), Outlook("draft", 10)
    assert controller.plan(context(strong, model)).drafter == "ngram"
    for _ in range(40):
        play(controller, 0, weak, costs)
        play(controller, 4, model, costs)
    assert controller.plan(context(weak, model)).drafter == "draft"


def test_a_long_match_is_trusted_before_a_short_one() -> None:
    costs = table(linear(20, 8))
    assert pacer(costs).plan(context(Outlook("draft", 10, 1))).num_draft == 0
    assert pacer(costs).plan(context(Outlook("draft", 10, 8))).num_draft >= 2


def test_catching_up_is_part_of_the_price() -> None:
    costs = check()
    costs.drafters["draft"] = DraftCost(3 * MS, 0.0, 5 * MS)
    assert pacer(costs).plan(context(Outlook("draft", 10, catch_up=0))).num_draft > 0
    assert pacer(costs).plan(context(Outlook("draft", 10, catch_up=8))).num_draft == 0


def test_a_drafter_that_lost_is_tried_while_another_wins_and_takes_over_when_it_is_better() -> None:
    costs = table(linear(20, 0.8), draft_ms=5)
    costs.drafters["other"] = DraftCost(0.5 * MS)
    controller = pacer(costs)
    for _ in range(40):
        play(controller, 0, Outlook("other", 10), costs)
    drafters = []
    for _ in range(600):
        plan = controller.plan(context(Outlook("other", 10), DRAFT))
        k, drafter = plan.num_draft, plan.drafter or ""
        drafting, verify = costs.t_draft(drafter, k), costs.t_verify(k + 1, 100)
        times = {"draft_seconds": drafting, "verify_seconds": verify, "round_seconds": drafting + verify}
        controller.observe(record(plan, min(8 if drafter == "other" else 2, k), **times))
        drafters.append(drafter)
    assert drafters[:50].count("draft") > 40
    assert drafters[-50:].count("other") > 40


# ---------- batches ----------


def batch(number: int, *outlooks: Outlook, **about: object) -> list[RoundContext]:
    return [context(*outlooks, request_id=i, batch_size=number, **about) for i in range(number)]


def test_a_batch_with_linear_cost_drafts_nothing() -> None:
    costs = CostTable([1, 256], [0], [[1 * MS, 256 * MS]], 0.0, {"ngram": DraftCost()})
    assert all(plan.num_draft == 0 for plan in pacer(costs).plan_batch(batch(16, Outlook("ngram", 10, 8))))


def test_a_batch_with_flat_cost_drafts() -> None:
    costs = CostTable([1, 256], [0], [[20 * MS, 20.5 * MS]], 0.0, {"ngram": DraftCost()})
    assert all(plan.num_draft >= 8 for plan in pacer(costs).plan_batch(batch(16, Outlook("ngram", 10, 8))))


@pytest.mark.parametrize(("drafting", "drafts"), [(1, False), (2, False), (12, True)])
def test_those_who_draft_together_must_pay_for_the_shared_steps(drafting: int, drafts: bool) -> None:
    """A step of the draft takes as long for one as for all."""
    costs = CostTable([1, 256], [0], [[20 * MS, 21 * MS]], 0.0, {"draft": DraftCost(per_token=4 * MS)})
    contexts = batch(16, Outlook("draft", 4, together=True))
    contexts[drafting:] = [replace(one, outlooks=(Outlook("draft", 0),)) for one in contexts[drafting:]]
    plans = pacer(costs, start=8.0).plan_batch(contexts)
    assert [plan.num_draft > 0 for plan in plans] == [drafts and i < drafting for i in range(16)]


def test_a_step_in_the_cost_of_a_forward_is_not_crossed_by_the_batch() -> None:
    """One forward of 64 rows or two: sixteen sequences share the 48 rows that are left, instead of the first ones taking all."""
    costs = CostTable([1, 64, 65, 128], [0], [[6 * MS, 8 * MS, 14 * MS, 15 * MS]], 0.0, {"draft": DraftCost(per_token=0.7 * MS)})
    plans = pacer(costs, start=8.0).plan_batch(batch(16, Outlook("draft", 10, together=True)))
    assert 32 <= sum(plan.num_draft for plan in plans) <= 48
    assert {plan.num_draft for plan in plans} <= {2, 3}


def test_who_is_asked_first_gets_no_more_than_who_is_likelier() -> None:
    """Flat to 16 rows, steep beyond: the places go to the strong matches, wherever they stand in the batch."""
    costs = CostTable([1, 16, 64], [0], [[20 * MS, 21 * MS, 250 * MS]], 0.0, {"ngram": DraftCost()})
    contexts = batch(8, Outlook("ngram", 10, 1))
    contexts[7] = replace(contexts[7], outlooks=(Outlook("ngram", 10, 8),))
    plans = pacer(costs).plan_batch(contexts)
    assert plans[7].num_draft >= 5
    assert all(plan.num_draft <= 1 for plan in plans[:7])


def test_a_batch_of_another_size_uses_what_a_like_one_taught() -> None:
    """Sequences end one by one; each new size once cost three plain rounds."""
    costs = CostTable([1, 64], [0], [[20 * MS, 20 * MS]], 0.0, {"draft": DraftCost(per_token=1 * MS)})
    controller = pacer(costs)
    times = {"verify_seconds": 20 * MS, "round_seconds": 20 * MS, "batch_size": 8, "batch_rows": 8, "batch_emitted": 8}
    for _ in range(4):
        for request in range(8):
            controller.observe(record(Plan(None, 0), request_id=request, **times))
    assert all(plan.num_draft > 0 for plan in controller.plan_batch(batch(7, Outlook("draft", 4, together=True))))


@given(
    drafts=st.lists(st.tuples(st.integers(0, 80), st.integers(0, 100), st.booleans()), min_size=2, max_size=12),
    max_draft=st.integers(-1, 63),
    lag=st.integers(0, 5000),
    accepted=st.integers(0, 5),
)
def test_plans_of_a_batch_keep_to_the_limits(drafts: list[tuple[int, int, bool]], max_draft: int, lag: int, accepted: int) -> None:
    controller, number = pacer(), len(drafts)
    for _ in range(4):
        contexts = [
            context(Outlook("d", n, signal, lag, together), request_id=i, batch_size=number, max_draft=max_draft)
            for i, (n, signal, together) in enumerate(drafts)
        ]
        plans = controller.plan_batch(contexts)
        assert len(plans) == number
        for plan, one in zip(plans, contexts, strict=True):
            assert 0 <= plan.num_draft <= max(0, min(max_draft, one.outlooks[0].available))
            assert (plan.drafter is None) == (plan.num_draft == 0)
        rows = sum(plan.num_draft + 1 for plan in plans)
        for i, plan in enumerate(plans):
            times = {"verify_seconds": 25 * MS, "round_seconds": 40 * MS, "draft_seconds": 10 * MS if plan.num_draft else 0.0}
            about = {"batch_size": number, "batch_rows": rows, "request_id": i}
            controller.observe(record(plan, min(accepted, plan.num_draft), **times, **about))


def test_batched_rounds_are_charged_once() -> None:
    """Eight records of a hopeless batched round of 25 ms cost what one round of 25 ms costs."""
    costs = CostTable([1, 64], [0], [[20 * MS, 20 * MS]], 0.0, {"ngram": DraftCost()})
    controller = pacer(costs, eps=0.0)
    planned = controller.plan(context(Outlook("ngram", 10, 8), batch_size=8))
    before = controller._bank.slack
    for request in range(8):
        times = {"verify_seconds": 25 * MS, "round_seconds": 25 * MS}
        about = {"batch_size": 8, "batch_rows": 8 + planned.num_draft, "batch_emitted": 8}
        plan = planned if request == 0 else Plan(None, 0)
        controller.observe(record(plan, 0, request_id=request, **times, **about))
    assert before - controller._bank.slack == pytest.approx(5 * MS)


# ---------- speed: the synthetic check of the notes ----------


@pytest.mark.parametrize("seed", range(3))
def test_synthetic_check_good_draft(seed: int) -> None:
    run = simulate(pacer(), check(), lambda _: 0.8, 6000, seed=seed)
    assert run.ms_per_token < 10.79 * 1.02 + 0.15
    assert run.least_slack >= 0


@pytest.mark.parametrize(("accept", "seed"), [(0.0, 0), (0.0, 1), (0.1, 0), (0.1, 1), (0.1, 2)])
def test_synthetic_check_hopeless_draft(accept: float, seed: int) -> None:
    run = simulate(pacer(), check(), lambda _: accept, 6000, seed=seed)
    assert run.ms_per_token < 20.0 * 1.003
    assert run.least_slack >= 0


@pytest.mark.parametrize("seed", range(3))
def test_synthetic_check_alternating_draft(seed: int) -> None:
    run = simulate(pacer(), check(), lambda n: 0.05 if n // 1500 % 2 else 0.8, 6000, seed=seed)
    assert run.ms_per_token < 17.88
    assert run.least_slack >= 0


@pytest.mark.parametrize("accept", [0.2, 0.24, 0.28])
def test_near_the_break_even_point_it_stays_near_plain(accept: float) -> None:
    run = simulate(pacer(), check(), lambda _: accept, 6000)
    assert run.ms_per_token < 20.0 * 1.005


def test_recovers_within_a_few_hundred_tokens_when_the_draft_becomes_good() -> None:
    controller, costs = pacer(), check()
    simulate(controller, costs, lambda _: 0.0, 3000)
    run = simulate(controller, costs, lambda _: 0.8, 1000)
    assert run.ms_per_token < 14.0


def test_gives_up_within_a_few_rounds_when_the_draft_becomes_bad() -> None:
    controller, costs = pacer(), check()
    simulate(controller, costs, lambda _: 0.9, 1000)
    run = simulate(controller, costs, lambda _: 0.0, 500)
    assert run.ms_per_token < 20.0 * 1.05


def test_a_draft_that_turned_dear_is_dropped() -> None:
    """The table promises 3 ms a token; after a while the whole round takes three times as long."""
    run = simulate(pacer(), check(), lambda _: 0.8, 4000, slower=lambda n: 3.0 if n > 1000 else 1.0)
    assert run.ms_per_token < 20.0


@pytest.mark.parametrize("earlier", range(4))
def test_a_renewal_finds_the_new_price_of_a_plain_step_wherever_the_count_of_lessons_stands(earlier: int) -> None:
    controller = pacer()
    plain = CHECK.t_plain(100)

    def step(factor: float) -> StepRecord:
        return record(Plan(None, 0, ""), context_length=100, verify_seconds=factor * plain, round_seconds=factor * plain)

    for _ in range(8 + earlier):
        controller.observe(step(1.0))
    controller._take_in()
    lane = controller._lanes["", 0]
    lane.arbiter.renew()
    while lane.arbiter.wants_plain:
        assert controller.plan(context(DRAFT)).reason == "plain: renewing the price of a plain step"
        controller.observe(step(1.3))
    assert controller._costs.plain(100) == pytest.approx(1.3 * plain)


def test_costs_that_were_measured_too_low_are_corrected() -> None:
    told = check()
    told.verify = [[line[0], *(0.5 * ms for ms in line[1:])] for line in told.verify]
    run = simulate(Pacer(PacerOptions(), told), check(), lambda _: 0.5, 6000)
    assert run.ms_per_token < 16.49 * 1.03


# ---------- the bound ----------


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    seed=st.integers(0, 2**32),
    first=st.floats(2.0, 40.0),
    slope=st.floats(0.0, 20.0),
    draft=st.floats(0.0, 30.0),
    overhead=st.floats(0.0, 10.0),
)
def test_time_stays_within_the_bound_at_every_moment(
    data: st.DataObject, seed: int, first: float, slope: float, draft: float, overhead: float
) -> None:
    """Adversarial acceptance and any costs up to the table's: never over (1 + eps) * plain time + the start."""
    rng, costs = random.Random(seed), table(linear(first, slope), draft_ms=draft, overhead_ms=overhead)
    controller, plain = pacer(costs), first * MS
    moods = data.draw(st.lists(st.tuples(st.sampled_from((0.0, 0.3, 0.9, 1.0)), st.integers(1, 60)), min_size=1, max_size=8))
    cheapest = data.draw(st.sampled_from((0.1, 0.7, 1.0)))
    time = tokens = 0.0
    for chance, rounds in moods:
        for _ in range(rounds):
            plan = controller.plan(context(Outlook("draft", 10, rng.randint(0, 9)), request_id=rng.randint(0, 2)))
            k = plan.num_draft
            accepted = next((j for j in range(k) if rng.random() >= chance), k)
            factor = rng.uniform(cheapest, 1.0)
            drafting, verify = factor * draft * k * MS, factor * costs.t_verify(k + 1, 100)
            seconds = drafting + verify + (factor * overhead * MS if k else 0.0)
            times = {"draft_seconds": drafting, "verify_seconds": verify, "round_seconds": seconds}
            controller.observe(record(plan, accepted, **times))
            time, tokens = time + seconds, tokens + accepted + 1
            assert time <= 1.01 * plain * tokens + START * plain + 1e-9


@pytest.mark.parametrize("look", [0.1, 0.6, 4.0])
def test_looking_for_drafts_that_are_never_right_stays_within_the_bound(look: float) -> None:
    """Looking alone may take more than eps of a step: then it is done less often, but not given up."""
    controller, costs, plain = pacer(), check(), 20 * MS
    time, looks, late_looks = 0.0, 0, 0
    for tokens in range(1, 3001):
        plan = controller.plan_unseen("", 1)
        if seen := plan is None:
            looks, late_looks = looks + 1, late_looks + (tokens > 2000)
            plan = controller.plan(context(Outlook("draft", 10, 2)))
        verify, drafting = costs.t_verify(plan.num_draft + 1, 100), costs.t_draft("draft", plan.num_draft) + seen * look * MS
        seconds = verify + drafting + (1 * MS if plan.num_draft else 0.0)
        controller.observe(record(plan, 0, draft_seconds=drafting, verify_seconds=verify, round_seconds=seconds))
        time += seconds
        assert time <= 1.01 * plain * tokens + START * plain + look * MS + 1e-9
    assert late_looks > 0
    assert looks == 3000 if look < 0.2 else looks < 2500


def test_an_empty_bank_looks_for_nothing_until_it_has_saved_a_plain_step() -> None:
    controller = pacer(start=0.5)
    play(controller, 0)
    plan = Plan("draft", 4, "", 1.0, 45 * MS)
    controller.observe(record(plan, 0, draft_seconds=12 * MS, verify_seconds=23.2 * MS, round_seconds=36.2 * MS))
    waited = 0
    while (blind := controller.plan_unseen("", 1)) is not None:
        assert blind.num_draft == 0
        assert controller.plan(context(DRAFT)) == blind  # a caller that looks all the same is told the same
        controller.observe(record(blind, 0, verify_seconds=20 * MS, round_seconds=20 * MS))
        waited += 1
    assert 100 <= waited <= 200


def test_a_new_request_does_not_bring_a_new_start() -> None:
    controller, costs, lost = pacer(), check(), 0.0
    for request in range(200):
        for _ in range(5):
            plan = controller.plan(context(Outlook("draft", 10, request % 9), request_id=request, task=f"task {request}"))
            verify, draft = costs.t_verify(plan.num_draft + 1, 100), costs.t_draft("draft", plan.num_draft)
            seconds = verify + draft + (1 * MS if plan.num_draft else 0.0)
            lost += seconds - 20 * MS
            times = {"draft_seconds": draft, "verify_seconds": verify, "round_seconds": seconds}
            controller.observe(record(plan, 0, request_id=request, task=f"task {request}", **times))
        controller.finish(request)
    assert lost <= 8 * 20 * MS + 0.01 * 20 * MS * 1000


def test_cold_rounds_teach_no_costs_and_do_not_empty_the_bank() -> None:
    controller = pacer()
    plan = controller.plan(context(DRAFT))
    controller.observe(record(plan, plan.num_draft, round_seconds=5.0, verify_seconds=5.0, warmup=True))
    assert controller._costs.learnt(1, 4, 100)[4] == pytest.approx(23.2 * MS)
    planned = [play(controller, 10).num_draft for _ in range(20)]
    assert all(planned[-10:])


# ---------- the stop rule ----------


def confident_round(controller: Pacer, confidences: list[float], accepted: int) -> int:
    """Draft until the controller stops; returns the number of drafted tokens."""
    plan = controller.plan(context(DRAFT))
    drafted = 0
    while drafted < plan.num_draft:
        drafted += 1
        shown = confidences[drafted - 1]
        if not controller.keep_drafting(0, DraftFeatures(drafted, shown, shown, 0.1)):
            break
    draft, verify = CHECK.t_draft("draft", drafted), CHECK.t_verify(drafted + 1, 100)
    values = {"num_drafted": drafted, "confidences": tuple(confidences[:drafted])}
    times = {"draft_seconds": draft, "verify_seconds": verify, "round_seconds": draft + verify + 1 * MS}
    controller.observe(record(plan, min(accepted, drafted), **values, **times))
    return drafted


def test_drafts_far_while_confident_and_stops_after_a_doubtful_token() -> None:
    rng, controller = random.Random(0), pacer()
    for _ in range(400):
        sure = [rng.random() < 0.8 for _ in range(10)]
        accepted = next((j for j, s in enumerate(sure) if not (s and rng.random() < 0.98)), 10)
        confident_round(controller, [0.97 if s else 0.2 for s in sure], accepted)
    assert confident_round(controller, [0.97] * 10, 10) >= 7
    assert confident_round(controller, [0.97, 0.97, 0.2] + [0.97] * 7, 2) <= 3


def test_a_drafter_that_asks_but_states_no_confidence_drafts_what_was_planned() -> None:
    controller = pacer()
    for _ in range(100):
        plan = controller.plan(context(DRAFT))
        assert all(controller.keep_drafting(0, DraftFeatures(j, 0.1, 0.1, 3.0)) for j in range(1, plan.num_draft + 1))
        controller.observe(record(plan, plan.num_draft, round_seconds=40 * MS, verify_seconds=25 * MS, draft_seconds=14 * MS))


def test_confidences_of_drafters_that_never_ask_do_not_lengthen_plans() -> None:
    costs = table(linear(20, 6))
    controller, planned = pacer(costs), []
    for _ in range(200):
        plan = controller.plan(context(DRAFT))
        verify = costs.t_verify(plan.num_draft + 1, 100)
        shown = (0.9,) * plan.num_draft
        controller.observe(record(plan, min(1, plan.num_draft), confidences=shown, round_seconds=verify, verify_seconds=verify))
        planned.append(plan.num_draft)
    assert max(planned[50:]) <= 2


def test_a_restored_calibration_goes_on_learning() -> None:
    taught, fresh = pacer(), pacer()
    for _ in range(100):
        confident_round(taught, [0.9] * 10, 8)
    fresh.restore(taught.snapshot())
    before = fresh._quality.states_confidence("draft", "").model.labels
    for _ in range(4):  # rounds are taken in together
        confident_round(fresh, [0.9] * 10, 8)
    assert fresh._quality.states_confidence("draft", "").model.labels > before > 64


def test_calibration_rows_compare_predicted_with_observed() -> None:
    controller = pacer()
    for i in range(200):
        confident_round(controller, [0.9] * 10, 10 if i % 2 else 0)
    rows = controller.calibration()
    assert rows
    assert {"drafter", "predicted", "accepted", "labels"} == set(rows[0])
    assert sum(row["labels"] for row in rows) > 200


# ---------- profile, reasons, options ----------


def test_a_restored_profile_drafts_from_the_first_round_on_what_it_knew() -> None:
    taught = pacer()
    simulate(taught, check(), lambda _: 0.0, 500)
    fresh = pacer()
    assert fresh.plan(context(DRAFT)).num_draft > 0
    fresh = pacer()
    fresh.restore(json.loads(json.dumps(taught.snapshot())))
    assert fresh.plan(context(DRAFT)).num_draft == 0


@pytest.mark.parametrize("data", [{}, {"version": 2, "acceptance": [], "confidence": {}}, {"version": 1, "acceptance": [{}]}])
def test_a_damaged_profile_is_refused(data: dict[str, object]) -> None:
    with pytest.raises((KeyError, TypeError, ValueError)):
        pacer().restore(data)


def test_finished_requests_leave_nothing_behind() -> None:
    controller = pacer()
    for request in range(50):
        play(controller, 2, request_id=request)
        controller.finish(request)
    assert not controller._running
    assert not controller._quality.acceptance._requests


def test_reasons_say_what_was_expected() -> None:
    controller = pacer(explain=True)
    reasons = {play(controller, 0).reason for _ in range(400)}
    assert any(r.startswith("drafting ") and "tokens for" in r and "plain steps" in r for r in reasons)
    assert any(r.startswith("plain: draft ") for r in reasons)
    assert any(r.startswith("probing ") for r in reasons)


def test_expectations_in_plans_come_true() -> None:
    rng, controller = random.Random(5), pacer()
    emitted = expected = seconds = foreseen = 0.0
    for _ in range(600):
        accepted = next((j for j in range(10) if rng.random() >= 0.7), 10)
        plan = play(controller, accepted)
        if plan.num_draft:
            emitted, expected = emitted + min(accepted, plan.num_draft) + 1, expected + plan.expected_emitted
            seconds += CHECK.t_draft("draft", plan.num_draft) + CHECK.t_verify(plan.num_draft + 1, 100) + 1 * MS
            foreseen += plan.expected_seconds
    assert expected == pytest.approx(emitted, rel=0.05)
    assert foreseen == pytest.approx(seconds, rel=0.02)


@pytest.mark.parametrize("options", [{"eps": -0.1}, {"eps": 2}, {"start": float("nan")}, {"cap": "9"}, {"margin": True}])
def test_refuses_options_out_of_range(options: dict[str, object]) -> None:
    with pytest.raises(OptionError, match=next(iter(options))):
        PacerOptions(**options)  # type: ignore[arg-type]
