from __future__ import annotations

import pytest

from paceline.config import SamplingParams
from paceline.control import registry as controllers
from paceline.control.base import RoundContext
from paceline.costs import CostTable, DraftCost
from paceline.drafting.base import Drafter
from paceline.drafting.model import ModelDrafter
from paceline.drafting.ngram import NgramDrafter
from paceline.engine import Engine
from paceline.errors import OptionError
from paceline.records import Outlook, StepRecord
from paceline.study.stack_measure import Touring, measure_levels, survival
from paceline.study.stacks import all_stacks
from toys import Language, ToyRunner, noisy_language, random_language

VOCAB = 16
PROMPTS = [[1, 2, 3], [4, 5, 6, 7]]


def record(num_drafted: int, num_accepted: int, *, truncated: bool = False) -> StepRecord:
    return StepRecord(0, "d", num_drafted, num_drafted, num_accepted, num_accepted + 1, 10, truncated=truncated)


def test_survival_counts_rounds_that_could_show_it() -> None:
    rounds = [(0, record(0, 0)), (1, record(1, 1)), (3, record(3, 2)), (3, record(0, 0)), (3, record(3, 1, truncated=True))]
    assert survival(rounds) == pytest.approx((2 / 3, 1 / 2, 0.0))
    assert survival([]) == ()


def test_lengths_go_round_whatever_was_accepted() -> None:
    tour = Touring("b", (0, 3, 5))
    outlooks = (Outlook("a", 9), Outlook("b", 4))
    plans = [tour.plan(RoundContext(0, 10, 16, outlooks)) for _ in range(4)]
    assert [(plan.drafter, plan.num_draft) for plan in plans] == [(None, 0), ("b", 3), ("b", 4), (None, 0)]


def engine_with(target: Language, *drafters: Drafter) -> Engine:
    costs = CostTable([1, 9], [1], [[1e-3, 1.2e-3]], drafters={"ngram": DraftCost(fixed=2e-5), "near": DraftCost(1e-4)})
    return Engine(ToyRunner(target, VOCAB), costs=costs, controller=controllers.create("fixed", costs), drafters=drafters)


def test_every_pair_that_can_be_stacked_is_measured() -> None:
    target = random_language(VOCAB, order=3, seed=1)
    near = ModelDrafter(ToyRunner(noisy_language(target, 0.2), VOCAB), "near")
    engine = engine_with(target, NgramDrafter(), near)
    before = list(engine.drafters), engine.controller
    levels, acceptance = measure_levels(engine, PROMPTS, SamplingParams(max_tokens=60))
    assert (engine.drafters, engine.controller) == before
    assert [level.name for level in levels] == ["ngram", "near", "target"]
    assert [bool(level.passes) for level in levels] == [False, True, True]
    assert levels[0].fixed > 0
    assert levels[1].per_token > 0
    assert levels[2].rows[0] == 1
    assert set(acceptance) == {("ngram", "target"), ("near", "target"), ("ngram", "near")}
    rates = acceptance["near", "target"]
    assert isinstance(rates, tuple)
    assert len(rates) == 16
    assert list(rates) == sorted(rates, reverse=True)
    assert rates[0] > 0.5 > acceptance["ngram", "target"][0]  # type: ignore[index]
    assert {stack.spec for stack in all_stacks(levels, acceptance)} == {"none", "ngram", "near", "cascade:ngram>near"}


def test_a_draft_of_the_same_model_is_always_accepted() -> None:
    target = random_language(VOCAB, order=3, seed=2)
    engine = engine_with(target, ModelDrafter(ToyRunner(target, VOCAB), "near"))
    _, acceptance = measure_levels(engine, PROMPTS, SamplingParams(max_tokens=40))
    assert acceptance == {("near", "target"): (1.0,) * 16}


def test_an_engine_without_drafters_is_refused() -> None:
    with pytest.raises(OptionError, match="nothing to stack"):
        measure_levels(engine_with(random_language(VOCAB)), PROMPTS, SamplingParams())
