"""Engines over a runner that draws and decodes ahead, whose rows are exact: texts are those of plain decoding alone."""

from __future__ import annotations

import pytest

from paceline.config import SamplingParams, SpeculationConfig
from paceline.control import registry as controllers
from paceline.costs import CostTable
from paceline.drafting.model import ModelDrafter
from paceline.drafting.ngram import NgramDrafter
from paceline.engine import Engine
from toys import ToyRunner, noisy_language, random_language
from unit.execution.ahead_toys import VOCAB, AheadToy

LANGUAGE = random_language(VOCAB, order=2, seed=3, scale=1.5)
PROMPTS = [[1, 2, 3, 1, 2, 3, 1, 2], [5, 6], list(range(20)), [9, 9, 9, 9]]
SAMPLED = [
    SamplingParams(max_tokens=30),
    SamplingParams(max_tokens=30, temperature=0.8, seed=4),
    SamplingParams(max_tokens=30, temperature=1.0, top_k=12, top_p=0.9, min_p=0.01, seed=4),
    SamplingParams(max_tokens=30, temperature=1.0, presence_penalty=0.4, seed=4),
    SamplingParams(max_tokens=30, temperature=1.0, min_tokens=5, seed=4),
]


def engine_of(draft: ToyRunner | None, rule: str = "auto", num_draft: int = 4) -> Engine:
    costs = CostTable([1, 8], [64], [[1.0, 1.1]])
    return Engine(
        AheadToy(LANGUAGE),
        costs=costs,
        controller=controllers.create("fixed", costs, {"num_draft": num_draft}),
        drafters=[NgramDrafter() if draft is None else ModelDrafter(draft)],
        speculation=SpeculationConfig(rule=rule),
    )


@pytest.mark.parametrize("params", SAMPLED)
@pytest.mark.parametrize("model", [True, False])
def test_texts_of_a_batch_with_a_draft_are_those_of_each_sequence_alone_without_one(params: SamplingParams, model: bool) -> None:
    draft = AheadToy(noisy_language(LANGUAGE, 0.3, seed=5)) if model else None
    engine = engine_of(draft)
    made = engine.generate(PROMPTS, params)
    assert sum(result.num_accepted if model else result.num_drafted for result in made) > 0
    for prompt, result in zip(PROMPTS, made, strict=True):
        assert result.token_ids == engine.generate(prompt, params, plain=True).token_ids
        assert result.token_ids == engine.generate(prompt, params).token_ids
    if draft is not None and not (params.presence_penalty or params.min_tokens):
        assert max(draft.joined) == len(PROMPTS)
    runner = engine.runner
    assert isinstance(runner, AheadToy)
    assert (runner.draws > 0) == (params.temperature > 0 and not params.presence_penalty and not params.min_tokens)


def test_an_unseeded_text_is_that_of_the_seed_that_it_tells() -> None:
    engine = engine_of(AheadToy(noisy_language(LANGUAGE, 0.3, seed=5)))
    first = engine.generate(PROMPTS[0], SamplingParams(max_tokens=20, temperature=1.0))
    again = engine.generate(PROMPTS[0], SamplingParams(max_tokens=20, temperature=1.0, seed=first.seed), plain=True)
    assert first.num_drafted > 0
    assert first.token_ids == again.token_ids


def test_a_ratio_test_that_was_asked_for_gets_drafts_with_their_distributions() -> None:
    draft = AheadToy(noisy_language(LANGUAGE, 0.3, seed=5))
    result = engine_of(draft, rule="block").generate(PROMPTS[0], SamplingParams(max_tokens=20, temperature=1.0, seed=3))
    assert result.num_drafted > 0
    assert not draft.joined
