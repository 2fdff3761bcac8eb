"""Contestants: what a prompt read once and a controller's charged time do to an answer (the first: nothing)."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter

import pytest

from paceline.config import SamplingParams
from paceline.control import registry
from paceline.control.base import Controller, RoundContext
from paceline.costs import CostTable, DraftCost
from paceline.drafting.model import ModelDrafter
from paceline.drafting.ngram import NgramDrafter
from paceline.drafting.suffix import SuffixDrafter
from paceline.engine import Engine
from paceline.execution.base import ForwardOutput, Segment
from paceline.records import DraftFeatures, Plan, StepRecord
from paceline.study.bench import Sample
from paceline.study.contest import Contestant, ReadOnce, answered_by_all, remembers
from toys import ToyRunner, noisy_language, random_language

VOCAB = 16
PROMPT = [1, 2, 5, 3, 9, 4]


class CountingRunner(ToyRunner):
    """Counts the rows that were read without logits: prompts."""

    read = 0

    def forward(self, segments: Sequence[Segment], *, want_hidden: bool = False) -> ForwardOutput:
        self.read += sum(len(s.tokens) for s in segments if s.num_logits == 0)
        return super().forward(segments, want_hidden=want_hidden)


class Slow(Controller):
    """Drafts four tokens, takes its time with everything."""

    name = "slow"

    def plan(self, context: RoundContext) -> Plan:
        self._wait()
        return Plan("model", min(4, context.max_draft))

    def keep_drafting(self, request_id: int, features: DraftFeatures) -> bool:
        self._wait()
        return True

    def observe(self, record: StepRecord) -> None:
        self._wait()

    @staticmethod
    def _wait() -> None:
        until = perf_counter() + 0.001
        while perf_counter() < until:
            pass


def make(controller: Controller | None = None) -> tuple[Engine, CountingRunner]:
    target = random_language(VOCAB, order=None)
    runner = CountingRunner(target, VOCAB)
    costs = CostTable([1, 8], [0], [[0.010, 0.012]], 0.0, {"model": DraftCost(per_token=0.001)})
    drafter = ModelDrafter(ToyRunner(noisy_language(target, 0.5), VOCAB))
    controller = controller or registry.create("fixed", costs, {"num_draft": 3})
    return Engine(runner, costs=costs, controller=controller, drafters=[drafter]), runner


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_prompt_is_read_once_and_answers_stay_the_same(temperature: float) -> None:
    params = SamplingParams(max_tokens=20, temperature=temperature, seed=3)
    alone, _ = make()
    expected = [alone.generate(prompt, params).token_ids for prompt in (PROMPT, PROMPT[:3])]
    engine, runner = make()
    shared = ReadOnce(runner)
    contestants = [Contestant(name, engine, engine.controller, shared, plain=name == "plain") for name in ("plain", "a", "b")]
    for prompt, answer in zip((PROMPT, PROMPT[:3]), expected, strict=True):
        assert {c.generate(prompt, params, "").token_ids for c in contestants} == {answer}
    assert runner.read == len(PROMPT[:-1]) + len(PROMPT[:2])
    assert engine.runner is runner


def test_all_time_of_a_controller_is_charged() -> None:
    slow = Slow()
    engine, runner = make(slow)
    contestant = Contestant("slow", engine, slow, ReadOnce(runner))
    steps = contestant.generate(PROMPT, SamplingParams(max_tokens=20), "").steps
    drafted = [step for step in steps if step.num_drafted]
    assert len(drafted) > 1
    for step in drafted:
        asked = step.num_drafted - 1  # whether to go on; the last token may need no question
        learnt = step is not steps[0]  # from the round before
        assert step.control_seconds >= 0.001 * (1 + asked + learnt)
        assert step.draft_seconds >= 0.0
        assert step.round_seconds >= step.control_seconds + step.draft_seconds + step.verify_seconds
    assert sum(step.draft_seconds for step in drafted) < sum(step.control_seconds for step in drafted)


def test_drafters_that_keep_texts_are_known() -> None:
    assert remembers(SuffixDrafter())
    assert not remembers(NgramDrafter())


def test_a_prompt_that_some_method_lacks_is_left_out() -> None:
    engine, _ = make()
    result = engine.generate([1, 2], SamplingParams(max_tokens=2))
    samples = [Sample(method, prompt, "a", result) for method, prompt in (("x", 0), ("y", 0), ("x", 1))]
    assert answered_by_all(samples) == samples[:2]
    assert answered_by_all(samples[1:]) == samples[1:]  # nothing is complete
