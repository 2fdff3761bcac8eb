"""Order of the runs, and the arithmetic of their summary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from paceline.config import SamplingParams
from paceline.records import GenerationResult, StepRecord
from paceline.study.bench import OVERALL, BenchRow, Sample, divergences, run, summarise
from paceline.study.prompts import BenchPrompt

PROMPTS = [(BenchPrompt("1", "a", "x"), [1]), (BenchPrompt("2", "b", "y"), [2])]
GREEDY = SamplingParams(max_tokens=4)


def result(ids: Sequence[int], seconds: float, steps: tuple[StepRecord, ...] = ()) -> GenerationResult:
    return GenerationResult("", tuple(ids), "length", 1, seconds + 1.0, prefill_seconds=1.0, decode_seconds=seconds, steps=steps)


@dataclass
class Recorder:
    name: str
    log: list[tuple[str, int, int]] = field(default_factory=list)

    def generate(self, prompt_ids: Sequence[int], params: SamplingParams, task: str) -> GenerationResult:
        self.log.append((self.name, prompt_ids[0], params.max_tokens))
        return result([1, 2], 0.1)


def test_methods_take_turns_in_rotating_order_after_a_warm_up() -> None:
    log: list[tuple[str, int, int]] = []
    methods = [Recorder("plain", log), Recorder("auto", log)]
    samples = list(run(methods, PROMPTS, GREEDY, warm_up=[9], warm_up_tokens=2))
    assert log[:2] == [("plain", 9, 2), ("auto", 9, 2)]
    assert [(name, prompt) for name, prompt, _ in log[2:]] == [("plain", 1), ("auto", 1), ("auto", 2), ("plain", 2)]
    assert len(samples) == 4
    assert {max_tokens for _, _, max_tokens in log[2:]} == {4}


def row(rows: list[BenchRow], method: str, category: str = OVERALL) -> BenchRow:
    (found,) = (r for r in rows if (r.method, r.category) == (method, category))
    return found


def test_speed_is_tokens_over_median_seconds_and_the_ratio_is_of_sums() -> None:
    samples = [
        *(Sample("plain", 0, "a", result(range(10), seconds)) for seconds in (1.0, 1.0, 9.0)),
        *(Sample("auto", 0, "a", result(range(10), seconds)) for seconds in (0.5, 0.4, 7.0)),
        Sample("plain", 1, "b", result(range(30), 3.0)),
        Sample("auto", 1, "b", result(range(30), 3.5)),
    ]
    rows = summarise(samples, GREEDY)
    assert row(rows, "plain").tokens_per_second == pytest.approx(40 / 4.0)
    assert row(rows, "auto").tokens_per_second == pytest.approx(40 / 4.0)
    assert row(rows, "auto", "a").speedup_vs_plain == pytest.approx(2.0)
    assert row(rows, "auto", "b").speedup_vs_plain == pytest.approx(3.0 / 3.5)
    assert row(rows, "auto", "b").end_to_end_tokens_per_second == pytest.approx(30 / 4.5)
    assert row(rows, "plain").speedup_vs_plain == pytest.approx(1.0)
    assert row(rows, "auto").num_prompts == 2


def step(drafted: int, accepted: int) -> StepRecord:
    return StepRecord(
        *(0, "ngram", drafted, drafted, accepted, accepted + 1, 10), draft_seconds=0.1, verify_seconds=0.7, control_seconds=0.01,
        round_seconds=1.0,
    )  # fmt: skip


def test_acceptance_follows_the_definitions_of_the_glossary() -> None:
    answer = result(range(7), 3.0, (step(4, 3), step(2, 0), step(0, 0)))
    auto = row(summarise([Sample("auto", 0, "a", answer)], GREEDY), "auto")
    assert auto.acceptance_rate == pytest.approx(3 / 6)
    assert auto.mean_accepted_length == pytest.approx(3 / 3)
    assert auto.block_efficiency == pytest.approx(6 / 3)
    assert (auto.draft_share, auto.verify_share, auto.control_share) == pytest.approx((0.1, 0.7, 0.01))
    assert auto.speedup_vs_plain is None
    assert auto.identical_to_plain is None


def test_answers_are_compared_with_plain_on_ids_in_every_repeat() -> None:
    samples = [
        Sample("plain", 0, "a", result([1, 2, 3], 1.0)),
        Sample("auto", 0, "a", result([1, 2, 3], 1.0)),
        Sample("auto", 0, "a", result([1, 9, 3], 1.0)),
        Sample("plain", 1, "a", result([4], 1.0)),
        Sample("auto", 1, "a", result([4, 5], 1.0)),
        Sample("plain", 2, "b", result([6], 1.0)),
        Sample("auto", 2, "b", result([6], 1.0)),
    ]
    rows = summarise(samples, GREEDY)
    assert (row(rows, "auto").identical_to_plain, row(rows, "auto").num_identical) == (False, 1)
    assert row(rows, "auto", "b").identical_to_plain is True
    assert divergences(samples) == [
        {"method": "auto", "prompt": 0, "first_difference": 1},
        {"method": "auto", "prompt": 1, "first_difference": 1},
    ]


def test_unseeded_sampling_promises_no_identity() -> None:
    samples = [Sample("plain", 0, "a", result([1], 1.0)), Sample("auto", 0, "a", result([2], 1.0))]
    assert row(summarise(samples, SamplingParams(temperature=1.0)), "auto").identical_to_plain is None
    assert row(summarise(samples, SamplingParams(temperature=1.0, seed=1)), "auto").identical_to_plain is False


def test_interval_covers_the_ratio_and_repeats() -> None:
    samples = []
    for prompt in range(8):
        samples += [
            Sample("plain", prompt, "a", result(range(10), 1.0 + 0.1 * prompt)),
            Sample("auto", prompt, "a", result(range(10), 0.5 + 0.02 * prompt)),
        ]
    auto = row(summarise(samples, GREEDY), "auto")
    assert auto.speedup_ci95 is not None
    assert auto.speedup_vs_plain is not None
    low, high = auto.speedup_ci95
    assert low < auto.speedup_vs_plain < high
    assert high - low < 0.5
    assert row(summarise(samples, GREEDY), "auto").speedup_ci95 == auto.speedup_ci95


def test_partial_runs_are_summed_over_the_prompts_that_both_have() -> None:
    samples = [
        Sample("plain", 0, "a", result(range(10), 1.0)),
        Sample("auto", 0, "a", result(range(10), 0.5)),
        Sample("auto", 1, "b", result(range(10), 100.0)),
    ]
    assert row(summarise(samples, GREEDY), "auto").speedup_vs_plain == pytest.approx(2.0)
