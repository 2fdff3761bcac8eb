"""Accounted time, on rounds whose prices are known."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from statistics import median

import pytest

from paceline.config import SamplingParams
from paceline.records import GenerationResult, StepRecord
from paceline.study.accounting import LAG, Prices, accounted, monotone, typical
from paceline.study.bench import Sample, summarise

FORWARD = {1: 0.004, 2: 0.0041, 3: 0.0045, 5: 0.006, 9: 0.009}
"""Seconds by rows at a context under 128 tokens; half as much more from there."""
DRAFT, LOOK, REST, CONTROL = 0.0002, 0.00005, 0.0003, 0.00001


def step(drafted: int, accepted: int, context: int, swing: float = 1.0, drafter: str | None = "ngram") -> StepRecord:
    """A round of the machine above, whose forward takes `swing` times as long as it should."""
    forward = swing * FORWARD[drafted + 1] * (1.5 if context >= 128 else 1.0)
    draft = LOOK + DRAFT * drafted
    return StepRecord(
        *(0, drafter if drafted else None, drafted, drafted, accepted, accepted + 1, context),
        draft_seconds=draft,
        verify_seconds=forward,
        control_seconds=CONTROL,
        round_seconds=forward + draft + REST + CONTROL,
    )


def answer(method: str, steps: Sequence[StepRecord], prompt: int = 0) -> Sample:
    tokens = tuple(range(sum(s.num_emitted for s in steps)))
    seconds = sum(s.round_seconds for s in steps)
    result = GenerationResult("", tokens, "length", 1, seconds, decode_seconds=seconds, steps=tuple(steps))
    return Sample(method, prompt, "a", result)


def written(drafted: int, tokens: int, start: int, swings: Sequence[float], hit: Sequence[bool]) -> list[StepRecord]:
    """Rounds of one length until so many tokens stand there; each accepts everything or nothing."""
    steps: list[StepRecord] = []
    done = 0
    while done < tokens:
        accepted = drafted if hit[len(steps) % len(hit)] else 0
        accepted = min(accepted, tokens - done - 1)
        steps.append(step(drafted, accepted, start + done, swings[len(steps) % len(swings)]))
        done += accepted + 1
    return steps


def true_seconds(steps: Sequence[StepRecord]) -> float:
    return sum(step(s.num_drafted, s.num_accepted, s.context_length).round_seconds for s in steps)


def test_swings_of_the_machine_are_taken_out() -> None:
    draw = random.Random(1)
    samples = []
    for prompt in range(6):
        for method, drafted in (("plain", 0), ("fixed_2", 2), ("fixed_4", 4)):
            swings = [draw.choice((0.98, 1.0, 1.0, 1.0, 1.0, 1.5)) for _ in range(97)]
            if (method, prompt) == ("fixed_2", 3):
                swings = [20.0]  # one answer meets a machine that stands still
            samples.append(answer(method, written(drafted, 200, 60, swings, (True, False, False)), prompt))
    for sample in accounted(samples):
        assert sample.accounted_seconds == pytest.approx(true_seconds(sample.result.steps), rel=0.01)
    (stalled,) = (s for s in samples if (s.method, s.prompt) == ("fixed_2", 3))
    assert stalled.result.decode_seconds > 10 * true_seconds(stalled.result.steps)


def test_two_methods_that_do_the_same_get_the_same_speed() -> None:
    slow = answer("slow", written(2, 100, 10, [1.4], (True, False)))
    fast = answer("fast", written(2, 100, 10, [1.0], (True, False)))
    rows = {row.method: row for row in summarise(accounted([slow, fast]), SamplingParams())}
    assert rows["slow"].tokens_per_second < 0.8 * rows["fast"].tokens_per_second
    assert rows["slow"].accounted_tokens_per_second == pytest.approx(rows["fast"].accounted_tokens_per_second)


def test_a_method_pays_for_its_own_drafts_and_its_own_controller() -> None:
    cheap = answer("cheap", written(2, 90, 10, [1.0], (False,)))
    thinking = [
        replace(s, control_seconds=s.control_seconds + 0.001, round_seconds=s.round_seconds + 0.001) for s in cheap.result.steps
    ]
    drafting = [
        replace(s, draft_seconds=s.draft_seconds + 0.002, round_seconds=s.round_seconds + 0.002) for s in cheap.result.steps
    ]
    samples = accounted([cheap, answer("thinks", thinking), answer("drafts", drafting)])
    base, thinks, drafts = (s.accounted_seconds or 0.0 for s in samples)
    assert thinks - base == pytest.approx(90 * 0.001)
    assert drafts - base == pytest.approx(90 * 0.002)


def test_reading_what_a_draft_has_not_seen_has_a_price_of_its_own() -> None:
    """The first round of an answer reads the prompt; one answer meets an interruption there and does not pay for it."""
    samples = []
    for prompt, extra in enumerate((0.03, 0.03, 0.9)):
        steps = written(2, 60, 40, [1.0], (True,))
        assert steps[0].context_length > LAG
        first = replace(steps[0], draft_seconds=steps[0].draft_seconds + extra, round_seconds=steps[0].round_seconds + extra)
        samples.append(answer("model", [first, *steps[1:]], prompt))
    for sample in accounted(samples):
        assert sample.accounted_seconds == pytest.approx(true_seconds(sample.result.steps) + 0.03, rel=1e-6)


def test_a_drafter_that_followed_the_text_has_nothing_to_read() -> None:
    """Long accepted drafts are no lag: the drafter wrote them."""
    steps = written(8, 180, 0, [1.0], (True,))
    (sample,) = accounted([answer("long", steps)])
    assert sample.accounted_seconds == pytest.approx(true_seconds(steps), rel=1e-6)


def test_where_all_draft_with_the_same_drafters_their_swings_are_taken_out_too() -> None:
    steps = written(2, 90, 10, [1.0], (False,))
    slow = [replace(s, draft_seconds=1.5 * s.draft_seconds, round_seconds=s.round_seconds + 0.5 * s.draft_seconds) for s in steps]
    samples = [answer(method, rounds) for method, rounds in (("a", steps), ("b", slow), ("c", steps), ("d", steps))]
    own = [sample.accounted_seconds or 0.0 for sample in accounted(samples)]
    assert own[1] - own[0] == pytest.approx(0.5 * sum(s.draft_seconds for s in steps))
    shared = [sample.accounted_seconds or 0.0 for sample in accounted(samples, same_drafters=True)]
    assert shared == pytest.approx([shared[0]] * 4)
    assert own[0] < shared[0] < own[1]


def test_a_price_seen_rarely_leans_on_the_others() -> None:
    """Two rounds of nine rows, both of them slow, beside many of five at two contexts."""
    seen = [(5, context, seconds) for context, seconds in ((10, 0.006), (200, 0.009)) for _ in range(500)]
    seen += [(9, 10, 0.009)] * 100 + [(9, 200, 2 * 0.0135)] * 2
    prices = Prices(seen, median)
    assert prices.seconds(5, 10) == pytest.approx(0.006, rel=0.01)
    assert prices.seconds(5, 250) == pytest.approx(0.009, rel=0.01)  # the same 128 tokens as 200
    assert prices.seconds(9, 200) == pytest.approx(0.0135, rel=0.2)
    assert 9 in prices
    assert 2 not in prices
    with pytest.raises(KeyError):
        prices.seconds(2, 10)


def test_monotone_fit_pools_neighbours_by_weight() -> None:
    assert monotone([1.0, 3.0, 2.0, 4.0], [1, 1, 3, 1]) == pytest.approx([1.0, 2.25, 2.25, 4.0])
    assert monotone([3.0, 2.0, 1.0], [1, 1, 1]) == pytest.approx([2.0, 2.0, 2.0])


def test_a_typical_value_keeps_what_is_usual_and_caps_what_is_rare() -> None:
    assert typical([1.0, 1.0, 100.0]) == 1.0
    assert typical([1.0] * 50 + [3.0] * 50) == pytest.approx(2.0)
    assert typical([1.0] * 99 + [1000.0]) == pytest.approx(1.0)


def test_other_engines_have_no_accounted_time() -> None:
    peer = Sample("peer", 0, "a", GenerationResult("", (1, 2), "length", 1, 1.0, decode_seconds=1.0))
    plain = answer("plain", written(0, 20, 5, [1.0], (False,)))
    samples = accounted([peer, plain])
    assert samples[0].accounted_seconds is None
    rows = {row.method: row for row in summarise(samples, SamplingParams())}
    assert rows["peer"].accounted_vs_plain is None
    assert rows["plain"].accounted_vs_plain == pytest.approx(1.0)
