"""What the engine does while a device works by itself: text and lessons wait for that, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import sleep
from typing import Any

import pytest

from paceline.config import SamplingParams
from paceline.control import registry as controllers
from paceline.control.base import Controller, RoundContext
from paceline.costs import CostTable
from paceline.drafting.model import ModelDrafter
from paceline.engine import Engine
from paceline.execution.base import Decoded, Decoding, ForwardOutput, Segment
from paceline.output import OutputAssembler
from paceline.records import Plan, StepRecord
from paceline.sampling import argmax_rows
from tiny_models import byte_level_tokenizer
from toys import ToySequence, noisy_language, random_language
from unit.execution.ahead_toys import VOCAB, AheadToy

LANGUAGE = random_language(VOCAB, order=2, seed=3, scale=1.5)
TOKENIZER = byte_level_tokenizer()
PROMPTS = [[1, 2, 3, 1, 2, 3, 1, 2], [5, 6], list(range(20)), [9, 9, 9, 9]]


class Apart(AheadToy):
    """A runner that names tokens, and whose forwards end when they are asked for."""

    works_apart = True

    def __init__(self, happened: list[str]) -> None:
        super().__init__(LANGUAGE)
        self._happened = happened

    def begin_forward(self, segments: Sequence[Segment]) -> Callable[[], ForwardOutput]:
        self._happened.append("begin")
        output = self.forward(segments)

        def result() -> ForwardOutput:
            self._happened.append("result")
            return ForwardOutput(output.logits, best=argmax_rows(output.logits), drawn=output.drawn)

        return result


class Teller(Controller):
    """Drafts four tokens, but for rounds that it says are plain without a look; tells what it is asked and shown."""

    def __init__(self, happened: list[str], unseen: Callable[[int], bool]) -> None:
        self._happened, self._unseen = happened, unseen
        self.shown: list[StepRecord] = []

    def plan_unseen(self, task: str, batch_size: int) -> Plan | None:
        return Plan(None, 0, "unseen") if self._unseen(len(self.shown)) else None

    def plan(self, context: RoundContext) -> Plan:
        self._happened.append("plan")
        return Plan(context.outlooks[0].drafter, min(4, context.max_draft, context.outlooks[0].available))

    def observe(self, record: StepRecord) -> None:
        self._happened.append("observe")
        self.shown.append(record)


def engine_of(controller: Controller | None = None, happened: list[str] | None = None, *, apart: bool = True) -> Engine:
    costs = CostTable([1, 8], [64], [[1.0, 1.1]])
    return Engine(
        Apart(happened if happened is not None else []) if apart else AheadToy(LANGUAGE),
        costs=costs,
        controller=controller or controllers.create("fixed", costs, {"num_draft": 4}),
        drafters=[ModelDrafter(AheadToy(noisy_language(LANGUAGE, 0.3, seed=5)))],
        tokenizer=TOKENIZER,
    )


ENDS: list[dict[str, Any]] = [
    {"max_tokens": 30, "ignore_eos": True},
    {"max_tokens": 30},
    {"max_tokens": 7, "ignore_eos": True},
    {"max_tokens": 30, "ignore_eos": True, "stop_token_ids": (4, 11, 17)},
    {"max_tokens": 30, "ignore_eos": True, "stop": (TOKENIZER.decode([7]),)},
    {"max_tokens": 30, "ignore_eos": True, "min_tokens": 9, "stop_token_ids": (4, 11, 17)},
    {"max_tokens": 12, "logprobs": 2},
]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("ends", ENDS)
def test_results_are_those_of_a_runner_that_is_waited_for(ends: dict[str, Any], temperature: float) -> None:
    params = SamplingParams(temperature=temperature, seed=4, **ends)
    made, want = (engine_of(apart=apart).generate(PROMPTS, params) for apart in (True, False))
    for one, other in zip(made, want, strict=True):
        assert (one.token_ids, one.text, one.finish_reason, one.stop_reason) == (
            other.token_ids,
            other.text,
            other.finish_reason,
            other.stop_reason,
        )
        assert (one.from_draft, one.logprobs) == (other.from_draft, other.logprobs)
        assert [(s.num_drafted, s.num_emitted, s.acceptance, s.truncated) for s in one.steps] == [
            (s.num_drafted, s.num_emitted, s.acceptance, s.truncated) for s in other.steps
        ]


@pytest.mark.parametrize("ends", ENDS)
def test_a_stream_tells_each_rounds_own_text_tokens_and_record(ends: dict[str, Any]) -> None:
    params = SamplingParams(**ends)
    events = list(engine_of().stream(PROMPTS[0], params))
    result = events[-1].result
    assert result is not None
    assert "".join(event.text for event in events) == result.text
    assert tuple(token for event in events for token in event.token_ids) == result.token_ids
    assert tuple(event.record for event in events) == result.steps
    assert [len(event.token_ids) for event in events] == [step.num_emitted for step in result.steps]


def test_a_round_is_shown_before_the_next_one_is_planned() -> None:
    happened: list[str] = []
    controller = Teller(happened, lambda _: False)
    (result,) = engine_of(controller, happened).generate([PROMPTS[0]], SamplingParams(max_tokens=30, ignore_eos=True))
    assert tuple(controller.shown) == result.steps
    rounds = "".join(what[0] for what in happened)
    assert rounds.removesuffix("bro") == "pbro" * (len(rounds) // 4)  # the last token is not planned for


def test_a_round_before_one_that_is_plain_anyway_is_shown_while_the_device_works() -> None:
    happened: list[str] = []
    controller = Teller(happened, lambda shown: shown % 5 != 0)
    (result,) = engine_of(controller, happened).generate([PROMPTS[0]], SamplingParams(max_tokens=30, ignore_eos=True))
    assert tuple(controller.shown) == result.steps
    rounds = "".join(what[0] for what in happened)
    assert "bor" in rounds
    assert "pb" in rounds
    assert "por" not in rounds
    before_plan = rounds.split("p")
    assert all(part.count("o") == part.count("r") for part in before_plan)


def test_a_batchs_round_is_shown_while_the_device_works_where_the_controller_allows_it() -> None:
    happened: list[str] = []
    controller = Teller(happened, lambda _: False)
    controller.learns_late = True
    made = engine_of(controller, happened).generate(PROMPTS, SamplingParams(max_tokens=12, ignore_eos=True))
    assert sorted(map(repr, controller.shown)) == sorted(repr(step) for result in made for step in result.steps)
    rounds = "".join(what[0] for what in happened).split("b")
    assert "o" not in rounds[1]
    alone = next((i for i, part in enumerate(rounds) if part.count("p") == 1), len(rounds))
    assert all("o" not in part.partition("r")[2] for part in rounds[1 : alone - 1])  # behind a launch, not before the next plan


def test_plain_calls_show_the_controller_nothing_and_have_all_their_records() -> None:
    happened: list[str] = []
    controller = Teller(happened, lambda _: False)
    made = engine_of(controller, happened).generate(PROMPTS, SamplingParams(max_tokens=9, ignore_eos=True), plain=True)
    assert controller.shown == []
    assert all(sum(step.num_emitted for step in result.steps) == result.num_tokens == 9 for result in made)
    assert all(step.num_drafted == 0 and step.control_seconds == 0.0 for result in made for step in result.steps)


def test_text_is_made_while_the_device_works(monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []
    assemble = OutputAssembler.assemble

    def told(output: OutputAssembler) -> None:
        if output._waiting:
            happened.append("text")
        assemble(output)

    monkeypatch.setattr(OutputAssembler, "assemble", told)
    engine_of(happened=happened).generate([PROMPTS[0]], SamplingParams(max_tokens=30, ignore_eos=True))
    inside = [happened[i - 1] for i, what in enumerate(happened) if what == "text"]
    assert inside[:-1] == ["begin"] * (len(inside) - 1)
    assert inside[-1] == "result"  # of the last round, which no other one follows


def test_rounds_of_a_broken_off_call_are_not_shown_in_the_next_one() -> None:
    controller = Teller([], lambda _: True)
    engine = engine_of(controller, [])
    runner = engine.runner
    assert isinstance(runner, Apart)
    forward, left = runner.begin_forward, iter(range(3))

    def failing(segments: Sequence[Segment]) -> Callable[[], ForwardOutput]:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return forward(segments)

    runner.begin_forward = failing  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        engine.generate(PROMPTS[0], SamplingParams(max_tokens=30, ignore_eos=True))
    runner.begin_forward = forward  # type: ignore[method-assign]
    shown = len(controller.shown)
    (result,) = engine.generate([PROMPTS[0]], SamplingParams(max_tokens=30, ignore_eos=True))
    assert tuple(controller.shown[shown:]) == result.steps
    assert runner.open_sequences == 0


def test_a_forward_that_nobody_splits_has_its_result_at_once() -> None:
    toy = AheadToy(LANGUAGE)
    result = toy.begin_forward([Segment(ToySequence(), [1, 2])])
    assert toy.forwards == 1
    assert result().logits.shape == (2, VOCAB)
    assert toy.forwards == 1


@pytest.mark.parametrize("follows", [False, True])
def test_a_draft_that_began_behind_the_verification_takes_time_from_when_that_ended(follows: bool) -> None:
    class Follower(AheadToy):
        followed = 0

        def decode_ahead(self, jobs: Sequence[Decoding]) -> list[Decoded]:
            self.followed += follows
            return super().decode_ahead(jobs)

    class Slow(Teller):
        def plan(self, context: RoundContext) -> Plan:
            sleep(0.02)
            return super().plan(context)

    engine = engine_of(Slow([], lambda _: False))
    engine.drafters = [ModelDrafter(Follower(noisy_language(LANGUAGE, 0.3, seed=5)))]
    (result,) = engine.generate([PROMPTS[0]], SamplingParams(max_tokens=12, ignore_eos=True))
    drafted = [step for step in result.steps[1:] if step.num_drafted]
    assert len(drafted) > 1
    assert all((step.draft_seconds >= 0.02) is follows for step in drafted)
    assert all((step.batch_draft_seconds >= 0.02) is follows for step in drafted)
