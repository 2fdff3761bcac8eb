"""What controllers share, and what every registered one must keep to."""

from __future__ import annotations

import random
from dataclasses import fields, replace

import pytest

from paceline.control import registry
from paceline.control.rounds import BatchTally, Price, RoundCosts, round_seconds, round_yield
from paceline.errors import OptionError
from unit.control.kit import COSTS, context, costs, record, shown


def test_labels_stop_at_the_first_rejection() -> None:
    assert record(2, 5).labels == (1.0, 1.0, 0.0)
    assert record(3, 3).labels == (1.0, 1.0, 1.0)
    assert record(2, 5, truncated=True).labels == (1.0, 1.0)
    assert record(0, 0).labels == ()


def test_exact_acceptance_takes_the_place_of_outcomes() -> None:
    assert record(1, 4, acceptance=(0.9, 0.4)).labels == (0.9, 0.4)


def test_round_seconds_are_those_of_the_worked_table() -> None:
    seconds = RoundCosts(COSTS, 4).seconds(context(), "model")
    assert seconds == pytest.approx([0.020, 0.023, 0.0255, 0.028, 0.0345])


def test_a_tree_whose_longest_path_was_accepted_shows_no_rejection() -> None:
    tree = replace(record(3, 9), num_levels=3)
    assert tree.labels == (1.0, 1.0, 1.0)
    assert replace(tree, num_accepted=2).labels == (1.0, 1.0, 0.0)


def test_a_path_that_ends_at_a_leaf_above_the_deepest_one_shows_no_rejection() -> None:
    assert replace(record(2, 9), num_levels=4, acceptance=(1.0, 1.0)).labels == (1.0, 1.0)


def test_batch_rounds_are_shared_evenly() -> None:
    assert round_seconds(COSTS, context(batch=2), None, 0) == pytest.approx(0.0205 / 2)
    assert round_yield(record(1, 2, batch=4, seconds=0.4)) == (2.0, 0.1)


def test_price_is_a_ratio_of_sums_and_never_under_plain() -> None:
    price = Price(discount=1.0)
    assert price.value(0.02) == pytest.approx(50)
    price.add(record(0, 1, seconds=0.010))
    price.add(record(4, 4, seconds=0.100))
    assert price.value(1.0) == pytest.approx(54.545, abs=1e-3)
    assert price.value(0.01) == pytest.approx(100)


def test_tally_reports_once_a_batch() -> None:
    tally = BatchTally()
    assert tally.add(record(1, 3, batch=2)) is None
    assert tally.add(record(0, 0, batch=2)) == (1, 3, 1)


@pytest.mark.parametrize("name", registry.names())
def test_plans_stay_within_what_is_allowed(name: str) -> None:
    controller, rng = registry.create(name, costs()), random.Random(7)
    for i in range(150):
        request_id, available, max_draft = rng.randrange(3), rng.choice((0, 1, 3, 20)), rng.choice((0, 2, 9, 30))
        batch = rng.choice((1, 3))
        plan = controller.plan(context(available=available, max_draft=max_draft, request_id=request_id, batch=batch))
        assert 0 <= plan.num_draft <= min(available, max_draft)
        assert (plan.drafter is None) == (plan.num_draft == 0)
        drafted = 0
        for position in range(1, plan.num_draft + 1):
            drafted = position
            if not controller.keep_drafting(request_id, shown(position, max_prob=rng.random(), entropy=3 * rng.random())):
                break
        outcome = record(rng.randint(0, drafted), drafted, request_id=request_id, seconds=0.02 + 0.003 * drafted, batch=batch)
        controller.observe(outcome)
        if i % 20 == 0:
            controller.finish(request_id)


@pytest.mark.parametrize("name", registry.names())
def test_finished_requests_leave_nothing_behind(name: str) -> None:
    """State of a request must go with it: the controller's own dictionaries do not grow with the number of requests."""
    controller = registry.create(name, costs())

    def serve(request_id: int) -> None:
        plan = controller.plan(context(request_id=request_id))
        for position in range(1, plan.num_draft + 1):
            controller.keep_drafting(request_id, shown(position))
        controller.observe(record(0, plan.num_draft, request_id=request_id, seconds=0.03))
        controller.finish(request_id)

    def sizes() -> dict[str, int]:
        return {k: len(v) for k, v in vars(controller).items() if isinstance(v, (dict, set))}

    for request_id in range(4):
        serve(request_id)
    before = sizes()
    for request_id in range(4, 24):
        serve(request_id)
    assert sizes() == before


@pytest.mark.parametrize("name", registry.names())
def test_options_of_the_wrong_kind_are_refused_by_name(name: str) -> None:
    options = registry.controller_class(name).options_type
    for option in fields(options):
        if isinstance(option.default, bool):
            continue
        with pytest.raises(OptionError, match=f"{option.name} = "):
            registry.create(name, costs(), {option.name: object()})


@pytest.mark.parametrize("name", registry.names())
def test_controllers_carry_their_registered_name_and_facts(name: str) -> None:
    assert registry.controller_class(name).name == name  # type: ignore[attr-defined]
    facts = registry.info(name)
    assert facts.summary
    assert facts.reads
