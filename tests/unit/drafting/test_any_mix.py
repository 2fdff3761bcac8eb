"""Any drafters, shapes and lengths, mixed at random within a batch: each text is the one that plain decoding gives it alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.config import SamplingParams
from paceline.control.base import Controller, RoundContext
from paceline.costs import CostTable
from paceline.drafting.base import DrafterContext
from paceline.drafting.registry import create
from paceline.engine import Engine
from paceline.records import DraftFeatures, Plan
from toys import Language, ToyRunner, noisy_language, random_language

VOCAB = 6
MODEL_FREE = ("ngram", "suffix", "suffix+tree", "stand", "stand+tree", "token_recycling", "token_recycling+tree")
MODELS = ("model:near", "model:near+tree", "cascade:ngram>model:near", "merged:suffix|token_recycling+tree", "quantized_self")


@dataclass
class Random(Controller):
    """Plans any drafter that has something to say, any length, and stops drafts at any token."""

    rng: np.random.Generator
    drafted: int = 0

    def plan(self, context: RoundContext) -> Plan:
        able = [o for o in context.outlooks if o.available]
        if not able or context.max_draft < 1 or self.rng.random() < 0.15:
            return Plan(None, 0)
        outlook = able[self.rng.integers(len(able))]
        self.drafted += 1
        return Plan(outlook.drafter, int(self.rng.integers(1, min(outlook.available, context.max_draft) + 1)))

    def keep_drafting(self, request_id: int, features: DraftFeatures) -> bool:
        return self.rng.random() < 0.8


def engine(language: Language, names: Sequence[str], seed: int) -> Engine:
    context = DrafterContext(
        vocab_size=VOCAB,
        max_context=512,
        open_model=lambda _: ToyRunner(noisy_language(language, 0.7), VOCAB),
        open_self=lambda _: ToyRunner(noisy_language(language, 0.3), VOCAB),
    )
    costs = CostTable(rows=[1], contexts=[1], verify=[[1e-3]])
    controller = Random(np.random.default_rng(seed))
    return Engine(
        ToyRunner(language, VOCAB), costs=costs, controller=controller, drafters=[create(name, {}, context) for name in names]
    )


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@given(
    names=st.lists(st.sampled_from((*MODEL_FREE, *MODELS)), min_size=1, max_size=4, unique=True),
    prompts=st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=10), min_size=1, max_size=5),
    seed=st.integers(0, 10_000),
)
@settings(max_examples=15, deadline=None, derandomize=True)
def test_a_batch_of_random_drafts_gives_each_prompt_its_plain_text(
    temperature: float, names: list[str], prompts: list[list[int]], seed: int
) -> None:
    language = random_language(VOCAB, order=2, seed=seed)
    params = SamplingParams(max_tokens=24, temperature=temperature, seed=seed if temperature else None)
    plain = [engine(language, (), seed).generate(prompt, params, plain=True).token_ids for prompt in prompts]
    drafting = engine(language, names, seed)
    if temperature:  # a batch gives each prompt the seed it has alone
        texts = [drafting.generate(prompt, params).token_ids for prompt in prompts]
        assert texts == plain
    assert [result.token_ids for result in drafting.generate(prompts, params)] == plain
    assert isinstance(drafting.controller, Random)
    assert drafting.controller.drafted or set(names) <= {"ngram", "suffix", "suffix+tree"}
