"""Drafters that remember finished requests can be told to forget them."""

from __future__ import annotations

import pytest

from paceline.config import SamplingParams
from paceline.control import registry as controllers
from paceline.costs import CostTable
from paceline.drafting.base import DrafterContext
from paceline.drafting.registry import create
from paceline.engine import Engine
from toys import ToyRunner, random_language

VOCAB = 12
PARAMS = SamplingParams(max_tokens=40)


@pytest.mark.parametrize("name", ["suffix", "suffix+tree", "stand", "token_recycling", "merged:suffix|token_recycling"])
def test_after_forgetting_an_answer_is_drafted_as_if_it_had_never_been_given(name: str) -> None:
    drafter = create(name, {}, DrafterContext(vocab_size=VOCAB, max_context=512))
    costs = CostTable(rows=[1], contexts=[1], verify=[[1e-3]])
    controller = controllers.create("fixed", costs, {"num_draft": 4})
    language = random_language(VOCAB, order=3, seed=3)
    engine = Engine(ToyRunner(language, VOCAB), costs=costs, controller=controller, drafters=[drafter])

    def drafted() -> list[tuple[int, int]]:
        return [(step.num_drafted, step.num_accepted) for step in engine.generate([1, 2, 3], PARAMS).steps]

    first = drafted()
    assert drafted() != first, "an answer that is remembered is drafted"
    drafter.forget()
    assert drafted() == first
