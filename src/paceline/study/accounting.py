"""Speeds with the machine's swings taken out: each round at the price that such rounds had over the whole run.

Decisions, drafts and acceptances of an answer are real; only its clock is replaced. The accounted seconds of an answer are the sum
over its rounds of

    forward(rows, context)       pooled over ALL methods of the run
  + draft(drafted, context)      to look and to propose, by drafter; the method's own, or pooled where all have the same drafters
  + reading(lag)                 what a draft takes more when its drafter must read more than `LAG` tokens first, pooled
  + rest(drafted)                to accept and to commit; the method's own, or pooled like the draft
  + control                      the answer's own time to plan, to stop drafts and to learn, interruptions capped

so that two methods that do the same thing get the same speed, whatever the machine did meanwhile: a control variate. A price is a
median (of what has two modes, a mean with the highest twentieth capped) of the rounds of that size with a context of the same 128
tokens; where these are few it leans on a fit that never falls with the size. What it does not see: rare work of one drafter (a
search once in a hundred rounds) and what a round does to the caches of the next forward.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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


def accounted(samples: Sequence[Sample], pool: Sequence[Sample] | None = None, *, same_drafters: bool = False) -> list[Sample]:
    """The samples with `accounted_seconds`; None for answers without rounds (other engines).

    samples: answers of one run under one set of sampling options. pool: all answers whose forward passes are priced together, by
    default these. same_drafters: all methods draft with the same drafters, so these are priced together, too.
    """
    forward = Prices(
        ((_rows(s), s.context_length, s.verify_seconds) for sample in pool or samples for s in sample.result.steps), median
    )
    rounds = _Rounds(samples, same_drafters)
    return [
        replace(
            sample,
            accounted_seconds=sum(forward.seconds(_rows(s), s.context_length) for s in sample.result.steps)
            + rounds.seconds(sample),
        )
        if sample.result.steps
        else sample
        for sample in samples
    ]


def _rows(step: StepRecord) -> int:
    return step.batch_rows or step.num_drafted + 1


class Prices:
    """What work of a size cost at a context, from (size, context, seconds) of all that was done."""

    def __init__(self, seen: Iterable[tuple[int, int, float]], middle: Callable[[Sequence[float]], float]) -> None:
        """middle: the value that stands for many."""
        cells: Cells[tuple[int, int]] = defaultdict(list)
        for size, context, seconds in seen:
            cells[size, context // _CONTEXT].append(seconds)
        counts = {cell: len(values) for cell, values in cells.items()}
        logs = {cell: math.log(max(middle(values), 1e-9)) for cell, values in cells.items()}
        by_size, by_context = _fit(logs, counts)
        weights: dict[int, int] = defaultdict(int)
        for (size, _), count in counts.items():
            weights[size] += count
        order = sorted(by_size)
        by_size = dict(zip(order, monotone([by_size[n] for n in order], [weights[n] for n in order]), strict=True))
        self._by_size, self._by_context = by_size, by_context
        self._prices = {
            (size, context): math.exp((count * logs[size, context] + _FEW * (by_size[size] + by_context[context])) / (count + _FEW))
            for (size, context), count in counts.items()
        }

    def __contains__(self, size: int) -> bool:
        """Whether work of this size was seen at any context."""
        return size in self._by_size

    def seconds(self, size: int, context: int) -> float:
        """Raises KeyError for a size that was never seen."""
        cell = size, context // _CONTEXT
        if cell in self._prices:
            return self._prices[cell]
        return math.exp(self._by_size[size] + self._by_context.get(cell[1], 0.0))


def _fit(logs: Mapping[tuple[int, int], float], counts: Mapping[tuple[int, int], int]) -> tuple[dict[int, float], dict[int, float]]:
    """Weighted fit of log seconds as one term for the size plus one for the context, by turns."""
    by_size = dict.fromkeys((size for size, _ in logs), 0.0)
    by_context = dict.fromkeys((context for _, context in logs), 0.0)
    for _ in range(50):
        for terms, others, side in ((by_size, by_context, 0), (by_context, by_size, 1)):
            sums: dict[int, list[float]] = {key: [0.0, 0.0] for key in terms}
            for cell, value in logs.items():
                total = sums[cell[side]]
                total[0] += counts[cell] * (value - others[cell[1 - side]])
                total[1] += counts[cell]
            terms.update((key, total / weight) for key, (total, weight) in sums.items())
    return by_size, by_context


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


class _Rounds:
    """What a round costs beside the forward."""

    def __init__(self, samples: Sequence[Sample], same_drafters: bool) -> None:
        self._same = same_drafters
        drafts: dict[tuple[str, str | None], list[tuple[int, int, float]]] = defaultdict(list)
        rest: Cells[tuple[str, int]] = defaultdict(list)
        control: Cells[str] = defaultdict(list)
        for sample in samples:
            steps, owner = sample.result.steps, self._owner(sample)
            for step, lag in _lags(steps):
                if lag <= LAG and _looked(step):
                    drafts[owner, step.drafter].append((step.num_drafted, step.context_length, step.draft_seconds))
                rest[owner, step.num_drafted].append(_rest(step))
            control[sample.method] += [step.control_seconds for step in steps]
        self._drafts = {key: Prices(seen, typical) for key, seen in drafts.items()}
        self._rest = {key: typical(values) for key, values in rest.items()}
        # Interruptions of a method's control are capped to these.
        self._longest = {method: sorted(values)[int(0.95 * len(values))] for method, values in control.items() if values}
        reading: Cells[tuple[str | None, int]] = defaultdict(list)
        for sample in samples:
            for step, lag in _lags(sample.result.steps):
                usual = self._usual(self._owner(sample), step)
                if lag > LAG and usual is not None:
                    reading[step.drafter, lag // _READ].append(step.draft_seconds - usual)
        self._reading = {key: median(values) for key, values in reading.items()}

    def _owner(self, sample: Sample) -> str:
        return "" if self._same else sample.method

    def _usual(self, owner: str, step: StepRecord) -> float | None:
        """Price of a draft whose drafter has little to read; None for one that was never seen so."""
        prices = self._drafts.get((owner, step.drafter))
        return prices.seconds(step.num_drafted, step.context_length) if prices and step.num_drafted in prices else None

    def seconds(self, sample: Sample) -> float:
        """Drafting, acceptance and control of a whole answer."""
        owner, steps = self._owner(sample), sample.result.steps
        total = 0.0
        for step, lag in _lags(steps):
            total += min(step.control_seconds, self._longest[sample.method]) + self._rest[owner, step.num_drafted]
            if not _looked(step):
                continue
            usual = self._usual(owner, step)
            if usual is None:
                total += step.draft_seconds
            else:
                total += usual + (self._reading[step.drafter, lag // _READ] if lag > LAG else 0.0)
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


def _looked(step: StepRecord) -> bool:
    """Whether drafters were asked for anything in the round."""
    return step.drafter is not None or step.draft_seconds > 0.0


def _rest(step: StepRecord) -> float:
    return max(0.0, step.round_seconds - step.verify_seconds - step.draft_seconds - step.control_seconds)
