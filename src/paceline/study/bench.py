"""Interleaved timing of several methods on the same prompts, and what follows from it.

Every prompt is answered by every method before the next prompt begins, in an order that rotates, so that drift of clocks and
load falls on all methods alike (`docs/benchmarks.md`). Metrics are those of `records.GenerationResult`, summed before divided.
"""

from __future__ import annotations

import gc
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

from paceline.config import SamplingParams
from paceline.records import GenerationResult
from paceline.study.prompts import BenchPrompt

PLAIN = "plain"
OVERALL = "all"
"""Category of the rows that cover every prompt."""
BOOTSTRAP_SAMPLES = 1000


class Method(Protocol):
    """A way to answer a prompt."""

    @property
    def name(self) -> str:
        """What the user typed; names the rows of the result."""
        ...

    def generate(self, prompt_ids: Sequence[int], params: SamplingParams, task: str) -> GenerationResult:
        """Answer one prompt, given as token ids."""
        ...


@dataclass(frozen=True, slots=True)
class Sample:
    """One timed answer."""

    method: str
    prompt: int
    """Index into the prompt set."""
    category: str
    result: GenerationResult
    accounted_seconds: float | None = None
    """Decode seconds at the prices of the whole run (`study/accounting.py`); None: not accounted."""


@dataclass(frozen=True, slots=True)
class BenchRow:
    """One method on one category. Speeds are sums of tokens over sums of seconds, a prompt counting with its median time."""

    method: str
    category: str
    tokens_per_second: float
    """Emitted tokens over decode seconds, the prompt's pass excluded."""
    speedup_vs_plain: float | None
    """Ratio of `tokens_per_second` to plain decoding's on the same prompts; None without `plain` among the methods."""
    speedup_ci95: tuple[float, float] | None
    """Bootstrap over prompts; None for fewer than three of them."""
    acceptance_rate: float | None
    mean_accepted_length: float | None
    block_efficiency: float | None
    identical_to_plain: bool | None
    """Whether every answer of every repeat has plain decoding's ids; None where nothing promises that (no seed)."""
    num_identical: int | None
    num_prompts: int
    num_tokens: int
    seconds: float
    """Decode seconds behind `tokens_per_second`."""
    end_to_end_tokens_per_second: float
    """Emitted tokens over all seconds, the prompt's pass included."""
    num_rounds: int
    num_drafted: int
    num_accepted: int
    draft_share: float | None
    """Share of round time spent drafting; None without rounds."""
    verify_share: float | None
    control_share: float | None
    accounted_tokens_per_second: float | None = None
    """Emitted tokens over accounted seconds; None where an answer has none."""
    accounted_vs_plain: float | None = None


@contextmanager
def without_collector() -> Iterator[None]:
    """The garbage collector neither runs nor looks at what is there already; as before afterwards."""
    enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if enabled:
            gc.enable()


def run(
    methods: Sequence[Method],
    prompts: Sequence[tuple[BenchPrompt, Sequence[int]]],
    params: SamplingParams,
    *,
    warm_up: Sequence[int] = (),
    warm_up_tokens: int = 16,
    on_start: Callable[[str, BenchPrompt], None] | None = None,
) -> Iterator[Sample]:
    """Time every method on every prompt (with its token ids).

    warm_up: token ids that each method first answers with at most `warm_up_tokens` tokens, which do not count; none of the prompts.
    """
    show = on_start or (lambda *_: None)
    if warm_up and warm_up_tokens:
        short = replace(params, max_tokens=min(warm_up_tokens, params.max_tokens), min_tokens=0)
        for method in methods:
            show(method.name, prompts[0][0])
            method.generate(warm_up, short, "")
    with without_collector():
        for index, (prompt, prompt_ids) in enumerate(prompts):
            for method in rotated(methods, index):
                show(method.name, prompt)
                gc.collect(1)  # what the answer before left, not while this one is timed
                yield Sample(method.name, index, prompt.category, method.generate(prompt_ids, params, prompt.category))


def rotated(methods: Sequence[Method], turn: int) -> list[Method]:
    """The methods in order, beginning with another one each turn."""
    start = turn % len(methods)
    return [*methods[start:], *methods[:start]]


@dataclass(frozen=True, slots=True)
class _Timing:
    """One method on one prompt: the medians over its repeats."""

    tokens: int
    decode_seconds: float
    seconds: float
    accounted_seconds: float | None


def _timings(samples: Sequence[Sample]) -> dict[int, _Timing]:
    by_prompt: dict[int, list[Sample]] = {}
    for sample in samples:
        by_prompt.setdefault(sample.prompt, []).append(sample)
    return {prompt: _median_timing(repeats) for prompt, repeats in by_prompt.items()}


def _median_timing(repeats: Sequence[Sample]) -> _Timing:
    """Seconds are scaled to the first answer's length: without a seed, sampled repeats differ in length."""
    tokens = repeats[0].result.num_tokens
    scales = [tokens / max(sample.result.num_tokens, 1) for sample in repeats]
    accounted = [s.accounted_seconds * scale for s, scale in zip(repeats, scales, strict=True) if s.accounted_seconds is not None]
    return _Timing(
        tokens=tokens,
        decode_seconds=statistics.median(s.result.decode_seconds * scale for s, scale in zip(repeats, scales, strict=True)),
        seconds=statistics.median(s.result.seconds * scale for s, scale in zip(repeats, scales, strict=True)),
        accounted_seconds=statistics.median(accounted) if len(accounted) == len(repeats) else None,
    )


def _speed(timings: Sequence[_Timing]) -> float:
    seconds = sum(timing.decode_seconds for timing in timings)
    return sum(timing.tokens for timing in timings) / seconds if seconds else 0.0


def _accounted_speed(timings: Sequence[_Timing]) -> float | None:
    """None where any answer is not accounted."""
    seconds = [timing.accounted_seconds for timing in timings if timing.accounted_seconds]
    return sum(t.tokens for t in timings) / sum(seconds) if seconds and len(seconds) == len(timings) else None


def bootstrap_ratio(ours: Sequence[_Timing], plain: Sequence[_Timing]) -> tuple[float, float] | None:
    """95 % interval of the ratio of speeds, prompts drawn with replacement in pairs; None for fewer than three."""
    if len(ours) < 3:
        return None
    drawn = random.Random(0)
    ratios = []
    for _ in range(BOOTSTRAP_SAMPLES):
        chosen = drawn.choices(range(len(ours)), k=len(ours))
        base = _speed([plain[i] for i in chosen])
        ratios.append(_speed([ours[i] for i in chosen]) / base if base else 0.0)
    ratios.sort()
    return ratios[int(0.025 * len(ratios))], ratios[int(0.975 * len(ratios)) - 1]


def summarise(samples: Sequence[Sample], params: SamplingParams) -> list[BenchRow]:
    """One row for each method and category, the rows over all prompts first. Prompts that a method lacks are left out for it."""
    methods = list(dict.fromkeys(sample.method for sample in samples))
    categories = [OVERALL, *dict.fromkeys(sample.category for sample in samples)]
    plain = [sample for sample in samples if sample.method == PLAIN]
    rows = []
    for category in categories:
        for method in methods:
            chosen = [s for s in samples if s.method == method and category in (OVERALL, s.category)]
            if chosen:
                rows.append(_row(method, category, chosen, plain, repeatable=params.greedy or params.seed is not None))
    return rows


def _row(method: str, category: str, samples: Sequence[Sample], plain: Sequence[Sample], *, repeatable: bool) -> BenchRow:
    timings, plain_timings = _timings(samples), _timings(plain)
    shared = [prompt for prompt in timings if prompt in plain_timings]
    ours, base = [timings[prompt] for prompt in shared], [plain_timings[prompt] for prompt in shared]
    plain_speed = _speed(base)
    accounted, accounted_plain = _accounted_speed(ours), _accounted_speed(base)
    steps = [step for sample in samples for step in sample.result.steps]
    round_seconds = sum(step.round_seconds for step in steps)
    drafted, accepted = sum(step.num_drafted for step in steps), sum(step.num_accepted for step in steps)
    all_seconds = sum(timing.seconds for timing in timings.values())
    tokens = sum(timing.tokens for timing in timings.values())
    reference = {s.prompt: s.result.token_ids for s in reversed(plain)}
    differing = {s.prompt for s in samples if s.prompt in reference and s.result.token_ids != reference[s.prompt]}
    comparable = repeatable and bool(shared)

    def share(seconds: float) -> float | None:
        return seconds / round_seconds if round_seconds else None

    return BenchRow(
        method=method,
        category=category,
        tokens_per_second=_speed(list(timings.values())),
        speedup_vs_plain=_speed(ours) / plain_speed if plain_speed else None,
        speedup_ci95=bootstrap_ratio(ours, base) if method != PLAIN else None,
        acceptance_rate=accepted / drafted if drafted else None,
        mean_accepted_length=accepted / len(steps) if steps else None,
        block_efficiency=sum(step.num_emitted for step in steps) / len(steps) if steps else None,
        identical_to_plain=not differing if comparable else None,
        num_identical=len(shared) - len(differing) if comparable else None,
        num_prompts=len(timings),
        num_tokens=tokens,
        seconds=sum(timing.decode_seconds for timing in timings.values()),
        end_to_end_tokens_per_second=tokens / all_seconds if all_seconds else 0.0,
        num_rounds=len(steps),
        num_drafted=drafted,
        num_accepted=accepted,
        draft_share=share(sum(step.draft_seconds for step in steps)),
        verify_share=share(sum(step.verify_seconds for step in steps)),
        control_share=share(sum(step.control_seconds for step in steps)),
        accounted_tokens_per_second=_accounted_speed(list(timings.values())),
        accounted_vs_plain=accounted / accounted_plain if accounted and accounted_plain else None,
    )


def divergences(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """Answers that differ from plain decoding's: method, prompt index, and index of the first token that differs."""
    reference = {s.prompt: s.result.token_ids for s in reversed(samples) if s.method == PLAIN}
    found = []
    for sample in samples:
        expected, ids = reference.get(sample.prompt, sample.result.token_ids), sample.result.token_ids
        if ids != expected:
            first = next((i for i, (a, b) in enumerate(zip(ids, expected, strict=False)) if a != b), min(len(ids), len(expected)))
            found.append({"method": sample.method, "prompt": sample.prompt, "first_difference": first})
    return found
