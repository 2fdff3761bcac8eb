"""Speeds with the machine's swings taken out: each round at the price that such rounds had over the whole run.

Decisions, drafts and acceptances of an answer are real; only its clock is replaced. The accounted seconds of an answer are the sum
over its rounds of

    forward(rows, context)       pooled over the rounds of ALL methods of the run: the median of rounds with that many rows and
                                 a context of the same 128 tokens, drawn towards a fit that rises with the rows where they are few
  + draft(drafter, drafted)      the method's own typical time to look and to propose that many tokens
  + reading(drafter, lag)        what a drafter needs more when it must read more than `LAG` tokens first, pooled, too
  + rest(rows)                   the method's own typical time to accept and to commit
  + control                      the method's own time to plan and to learn, a round

so that two methods that do the same thing get the same speed, whatever the machine did meanwhile: a control variate. What it does
not see: rare work of one drafter (a search once in a hundred rounds) and what a round does to the caches of the next forward.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from statistics import fmean, median
from typing import TypeVar

from paceline.records import StepRecord
from paceline.study.bench import Sample

LAG = 8
"""Tokens of catching up that count as usual."""
_CONTEXT = 128
"""Tokens of context that share a price."""
_READ = 32
"""Tokens of catching up that share a price."""
_FEW = 8
"""Rounds that the fitted price of a cell weighs as much as."""
_MANY = 20
"""Values from which a mean can be trusted once its highest twentieth is capped."""

K = TypeVar("K")
Cells = dict[K, list[float]]


def accounted(samples: Sequence[Sample], pool: Sequence[Sample] | None = None) -> list[Sample]:
    """The samples with `accounted_seconds`; None for answers without rounds (other engines).

    samples: answers of one run under one set of sampling options. pool: all answers whose forward passes are priced together, by
    default these.
    """
    prices = ForwardPrices(step for sample in pool or samples for step in sample.result.steps)
    own = _OwnTimes(samples)
    return [
        replace(s, accounted_seconds=sum(prices.seconds(step) for step in s.result.steps) + own.seconds(s)) if s.result.steps else s
        for s in samples
    ]


class ForwardPrices:
    """What a forward cost over a run, by its rows and its context."""

    def __init__(self, steps: Iterable[StepRecord]) -> None:
        cells: Cells[tuple[int, int]] = defaultdict(list)
        for step in steps:
            cells[_cell(step)].append(step.verify_seconds)
        counts = {cell: len(values) for cell, values in cells.items()}
        logs = {cell: math.log(max(median(values), 1e-9)) for cell, values in cells.items()}
        by_rows, by_context = _fit(logs, counts)
        weights: dict[int, int] = defaultdict(int)
        for (rows, _), count in counts.items():
            weights[rows] += count
        order = sorted(by_rows)
        by_rows = dict(zip(order, monotone([by_rows[r] for r in order], [weights[r] for r in order]), strict=True))
        self._prices = {
            (rows, context): math.exp((count * logs[rows, context] + _FEW * (by_rows[rows] + by_context[context])) / (count + _FEW))
            for (rows, context), count in counts.items()
        }

    def seconds(self, step: StepRecord) -> float:
        """Price of the forward of a round that was among those given. Raises KeyError for one like none of them."""
        return self._prices[_cell(step)]


def _cell(step: StepRecord) -> tuple[int, int]:
    return step.batch_rows or step.num_drafted + 1, step.context_length // _CONTEXT


def _fit(logs: Mapping[tuple[int, int], float], counts: Mapping[tuple[int, int], int]) -> tuple[dict[int, float], dict[int, float]]:
    """Weighted fit of log seconds as one term for the rows plus one for the context, by turns."""
    by_rows = dict.fromkeys((rows for rows, _ in logs), 0.0)
    by_context = dict.fromkeys((context for _, context in logs), 0.0)
    for _ in range(50):
        for terms, others, side in ((by_rows, by_context, 0), (by_context, by_rows, 1)):
            sums: dict[int, list[float]] = {key: [0.0, 0.0] for key in terms}
            for cell, value in logs.items():
                total = sums[cell[side]]
                total[0] += counts[cell] * (value - others[cell[1 - side]])
                total[1] += counts[cell]
            terms.update((key, total / weight) for key, (total, weight) in sums.items())
    return by_rows, by_context


def monotone(values: Sequence[float], weights: Sequence[float]) -> list[float]:
    """The nearest sequence that never falls, in weighted squares (pool adjacent violators)."""
    blocks: list[tuple[float, float, int]] = []
    for value, weight in zip(values, weights, strict=True):
        size = 1
        while blocks and blocks[-1][0] >= value:
            before, its_weight, its_size = blocks.pop()
            value = (before * its_weight + value * weight) / (its_weight + weight)
            weight, size = weight + its_weight, size + its_size
        blocks.append((value, weight, size))
    return [value for value, _, size in blocks for _ in range(size)]


def typical(values: Sequence[float]) -> float:
    """What it costs when nothing interrupts: the mean with the highest twentieth capped, the median of few values."""
    if len(values) < _MANY:
        return median(values)
    cap = sorted(values)[int(0.95 * len(values))]
    return fmean(min(value, cap) for value in values)


class _OwnTimes:
    """What a round of each method costs beside the forward."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        draft: Cells[tuple[str, str | None, int]] = defaultdict(list)
        rest: Cells[tuple[str, int]] = defaultdict(list)
        control: Cells[str] = defaultdict(list)
        for sample in samples:
            steps = sample.result.steps
            for step, lag in _lags(steps):
                if lag <= LAG:
                    draft[sample.method, step.drafter, step.num_drafted].append(step.draft_seconds)
                rest[sample.method, step.num_drafted].append(_rest(step))
            if steps:
                control[sample.method].append(fmean(step.control_seconds for step in steps))
        self._draft = {key: typical(values) for key, values in draft.items()}
        self._rest = {key: typical(values) for key, values in rest.items()}
        self._control = {method: median(values) for method, values in control.items()}
        reading: Cells[tuple[str | None, int]] = defaultdict(list)
        for sample in samples:
            for step, lag in _lags(sample.result.steps):
                usual = self._draft.get((sample.method, step.drafter, step.num_drafted))
                if lag > LAG and usual is not None:
                    reading[step.drafter, lag // _READ].append(step.draft_seconds - usual)
        self._reading = {key: median(values) for key, values in reading.items()}

    def seconds(self, sample: Sample) -> float:
        """Drafting, acceptance and control of a whole answer."""
        method, steps = sample.method, sample.result.steps
        total = len(steps) * self._control[method]
        for step, lag in _lags(steps):
            usual = self._draft.get((method, step.drafter, step.num_drafted))
            if usual is None:  # it was never seen without catching up
                total += step.draft_seconds
            else:
                total += usual + (self._reading[step.drafter, lag // _READ] if lag > LAG else 0.0)
            total += self._rest[method, step.num_drafted]
        return total


def _lags(steps: Sequence[StepRecord]) -> Iterator[tuple[StepRecord, int]]:
    """Each round with the tokens that its drafter had not seen when it began; 0 for rounds without a drafter."""
    seen: dict[str, int] = {}
    for step in steps:
        lag = 0
        if step.drafter is not None:
            lag = step.context_length - seen.get(step.drafter, 0)
            seen[step.drafter] = step.context_length + step.num_emitted
        yield step, lag


def _rest(step: StepRecord) -> float:
    return max(0.0, step.round_seconds - step.verify_seconds - step.draft_seconds - step.control_seconds)
