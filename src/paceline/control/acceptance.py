"""Online estimates of the chance that a drafted position is accepted, from censored records.

A round tells about positions up to and including the first rejection, and nothing beyond (7.3 of the control notes). Counts
are discounted, so that old text fades. Estimates have three levels:

- a prior, which grows with the strength of the drafter's signal and is moved by how the drafter does in its other buckets;
- a pool for each (task, drafter, signal bucket), position by position, shared by all requests;
- a request's own odds against its pool, one factor for each drafter: a request has too few rounds for a table of its own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from ctypes import Array, Structure, c_double
from functools import cache, lru_cache, reduce
from operator import add
from typing import Any

from paceline.control.shared import doubles, wholes
from paceline.records import Outlook, StepRecord

POSITIONS = 16
"""Positions with counts of their own; later ones share those of the last."""

_FIRST = (0.7, 0.17, 0.27, 0.45, 0.65, 0.7, 0.75, 0.8, 0.85, 0.93, 0.98)
"""Chance that a first position is accepted before anything was seen, by signal bucket: matched suffixes of 1, 2, ... tokens, as
found with n-grams on instruction data. Bucket 0 is a drafter that gives no signal."""
NUM_BUCKETS = len(_FIRST)
_PRIOR = tuple((first, *(first if bucket == 0 else 0.5 + 0.4 * first,) * (POSITIONS - 1)) for bucket, first in enumerate(_FIRST))
"""The same for positions 1, 2, ...: a match that held once is longer, and likelier to hold again, than its signal says."""
_TEMPERATURE = re.compile(r"@\d\.\d$")
_COOLING = 0.8
"""By how much, in log-odds, a temperature of 1 lowers the chance that a draw is the token that stood behind a match."""
SURPRISE, ALARM = 8.0, 5.0
POOL_DISCOUNT, POOL_WEIGHT = 0.99, 3.0
"""Of pools: fading for each label, and labels that the prior counts for."""
HALF_LIFE = 512.0
"""Tokens after which a request's evidence counts half, whether or not new evidence came."""


def signal_bucket(signal: int) -> int:
    """Bucket of a drafter's signal: 0, 1, ..., 8, then 9 to 16, then 17 and more."""
    return max(signal, 0) if signal <= 8 else 9 if signal <= 16 else 10


def evidence_bucket(told: Outlook | StepRecord) -> int:
    """Bucket by which probes are counted: that of the signal, or one for all drafts of a drafter that gives chances."""
    return 0 if told.chances else signal_bucket(told.signal)


@lru_cache(maxsize=256)
def temperature_tag(task: str) -> str:
    """The part of a task's tag that tells its temperature; empty for greedy decoding."""
    found = _TEMPERATURE.search(task)
    return found.group() if found is not None else ""


def observed_labels(record: StepRecord) -> tuple[float, ...]:
    """`StepRecord.labels`, exact where the rule gave probabilities (lower variance); none of a round that was cut short."""
    return () if record.truncated else record.labels


class PoolState(Structure):
    """The numbers of a `PositionTable`."""

    _fields_ = (
        *((name, c_double * POSITIONS) for name in ("hits", "totals", "means")),
        *doubles("discount"),
        *wholes("seen"),
    )
    hits: Array[c_double]
    totals: Array[c_double]
    means: Array[c_double]
    discount: float
    """0: it has no prior yet."""
    seen: int


class PositionTable:
    """Discounted counts for each position, `a_j = s_j / n_j`; positions 1, 2, ... are kept from index 0.

    Without a prior it is room for one, which is not asked for before the first labels come.
    """

    __slots__ = ("hits", "means", "state", "totals")

    def __init__(self, discount: float = 0.0, prior: Sequence[float] = (), weight: float = 0.0) -> None:
        self.state = state = PoolState()
        self.hits, self.totals, self.means = state.hits, state.totals, state.means
        self.open(discount, prior, weight)

    @property
    def is_open(self) -> bool:
        """Whether it has its prior."""
        return self.state.discount > 0.0

    @property
    def seen(self) -> int:
        """Number of positions that were ever observed."""
        return self.state.seen

    def open(self, discount: float, prior: Sequence[float], weight: float) -> None:
        """Begin with a prior that counts for `weight` labels a position."""
        for j, rate in enumerate(prior):
            self.hits[j], self.totals[j], self.means[j] = rate * weight, weight, rate
        self.state.discount, self.state.seen = discount, 0

    def update(self, labels: Sequence[float]) -> None:
        """Count the labels of positions 1, 2, ... of one round."""
        keep, hits, totals, means = self.state.discount, self.hits, self.totals, self.means
        for j, label in enumerate(labels):
            slot = j if j < POSITIONS else POSITIONS - 1
            hits[slot] = hit = keep * hits[slot] + label
            totals[slot] = total = keep * totals[slot] + 1.0
            means[slot] = hit / total
        if len(labels) > self.state.seen:
            self.state.seen = min(len(labels), POSITIONS)

    def rates(self, count: int) -> list[float]:
        """a_1 .. a_count; a position beyond anything seen takes the last one seen (of two at least: a first one differs)."""
        seen = self.seen if self.seen > 1 else POSITIONS
        if count <= seen:
            return self.means[:count]
        return self.means[:seen] + [self.means[seen - 1]] * (count - seen)

    def restore(self, hits: Sequence[float], totals: Sequence[float], seen: int, most: float) -> None:
        """Take stored counts over, at most `most` observations a position, so that the present soon outweighs them."""
        if len(hits) != POSITIONS or len(totals) != POSITIONS or not 0 <= seen <= POSITIONS or min(totals) <= 0:
            raise ValueError("acceptance counts: wrong length or no observations")
        for j, (hit, total) in enumerate(zip(hits, totals, strict=True)):
            self.means[j] = min(max(hit / total, 0.0), 1.0)
            self.totals[j] = min(total, most)
            self.hits[j] = self.means[j] * self.totals[j]
        self.state.seen = seen


def add_up(values: Sequence[float]) -> float:
    """Their sum, one after another: `sum` rounds otherwise in newer versions of Python, and C must come to the same bits."""
    return reduce(add, values, 0.0)


def with_odds(rates: Sequence[float], odds: float) -> list[float]:
    """The rates with their odds multiplied."""
    return [odds * rate / (1.0 + (odds - 1.0) * rate) for rate in rates]


class Shift(Structure):
    """By how much something does better or worse than predicted, as a factor on the odds.

    discount: fading for each label; weight: labels that the prediction counts for.
    """

    _fields_ = (*doubles("_discount", "_weight", "odds", "total", "_hits", "_expected"), *wholes("_last"))
    odds: float
    total: float
    """Labels, discounted."""
    _discount: float
    _weight: float
    _hits: float
    _expected: float
    _last: int

    def __init__(self, discount: float, weight: float) -> None:
        super().__init__(discount, weight, 1.0)

    def update(self, count: int, hits: float, expected: float, now: int = 0) -> None:
        """Count labels by their number, sum and predicted sum; now: emitted tokens, for ageing."""
        keep, last, weight = self._discount**count, self._last, self._weight
        if now != last:
            keep *= 0.5 ** ((now - last) / HALF_LIFE)
            self._last = now
        self._hits = hits = keep * self._hits + hits
        self._expected = expected = keep * self._expected + expected
        self.total = total = keep * self.total + count
        mean = _inside(expected / total)
        seen = _inside((hits + weight * mean) / (total + weight))
        self.odds = seen * (1.0 - mean) / ((1.0 - seen) * mean)

    def begin(self, total: float, hits: float, expected: float) -> None:
        """Forget all labels but these."""
        self.total, self._hits, self._expected = total, hits, expected

    def apply(self, rates: list[float]) -> list[float]:
        """The rates with their odds multiplied."""
        return with_odds(rates, self.odds)


class _Run(Structure):
    """Labels since the odds may have been multiplied by `factor`."""

    _fields_ = (*doubles("_factor", "_log_factor", "_score", "hits", "expected"), *wholes("count"))
    hits: float
    expected: float
    count: int
    _factor: float
    _log_factor: float
    _score: float

    def __init__(self, factor: float) -> None:
        super().__init__(factor, math.log(factor))

    def speaks_for_change(self, count: int, hits: float, expected: float, believed: float) -> bool:
        """Count labels; believed: their chance without the change. True when the run is e^5 times likelier with it."""
        score = self._score + (hits * self._log_factor - count * math.log(1.0 + (self._factor - 1.0) * believed))
        if score <= 0.0:
            self.restart()
            return False
        self._score = score
        self.hits += hits
        self.expected += expected
        self.count += count
        return score > ALARM

    def restart(self) -> None:
        """Begin with no labels."""
        self._score = self.hits = self.expected = 0.0
        self.count = 0


class WatchedState(Structure):
    """The numbers of a `WatchedShift`."""

    _fields_ = (("shift", Shift), ("runs", _Run * 2))
    shift: Shift
    runs: Array[_Run]


class WatchedShift:
    """A shift that forgets what was before when labels run against all expectation: Page's test in both directions."""

    __slots__ = ("_runs", "_shift", "state")

    def __init__(self, discount: float, weight: float) -> None:
        self.state = WatchedState(Shift(discount, weight), (_Run(1.0 / SURPRISE), _Run(SURPRISE)))
        self._shift, self._runs = self.state.shift, self.state.runs[:]

    @property
    def odds(self) -> float:
        """As in `Shift`."""
        return self._shift.odds

    @property
    def total(self) -> float:
        """As in `Shift`."""
        return self._shift.total

    def update(self, count: int, hits: float, expected: float, now: int = 0) -> None:
        """As `Shift.update`."""
        mean, odds = _inside(expected / count), self._shift.odds
        believed = odds * mean / (1.0 + (odds - 1.0) * mean)
        for run in self._runs:
            if run.speaks_for_change(count, hits, expected, believed):
                self._shift.begin(run.count - count, run.hits - hits, run.expected - expected)
                for each in self._runs:
                    each.restart()
                break
        self._shift.update(count, hits, expected, now)

    def apply(self, rates: list[float]) -> list[float]:
        """As `Shift.apply`."""
        return self._shift.apply(rates)


@cache
def prior_rates(bucket: int, tag: str) -> tuple[float, ...]:
    """The prior at a temperature. A draft without signals draws as the target does, or knows its own chance."""
    prior = _PRIOR[bucket]
    if bucket == 0 or not tag:
        return prior
    return tuple(with_odds(prior, math.exp(-_COOLING * float(tag[1:]))))


def _inside(rate: float) -> float:
    return 0.002 if rate < 0.002 else 0.998 if rate > 0.998 else rate


class AcceptanceModel:
    """All estimates of an engine.

    request_discount: fading of a request's own labels; weight: labels that their prediction counts for.
    """

    def __init__(self, request_discount: float = 0.96, weight: float = 6.0) -> None:
        self._request_discount = request_discount
        self._weight = weight
        self._pools: dict[tuple[str, str, int], PositionTable] = {}
        self._levels: dict[str, Shift] = {}
        self._requests: dict[int, dict[str, WatchedShift]] = {}

    def rates(self, request_id: int, task: str, drafter: str, bucket: int, count: int) -> list[float]:
        """Estimated chances a_1 .. a_count that a position is accepted, given that those before it were."""
        pool = self.pool(task, drafter, bucket)
        if pool is None:
            pool = PositionTable(POOL_DISCOUNT, self._expected_rates(task, drafter, bucket), POOL_WEIGHT)
        return self.shifted(request_id, drafter, pool.rates(count))

    def _known(self, request_id: int, drafter: str) -> WatchedShift | None:
        shifts = self._requests.get(request_id)
        return shifts.get(drafter) if shifts is not None else None

    def shifted(self, request_id: int, drafter: str, rates: list[float]) -> list[float]:
        """The rates with the request's own odds."""
        shift = self._known(request_id, drafter)
        return shift.apply(rates) if shift is not None else rates

    def doubt(self, request_id: int, drafter: str, rate: float, gap: float) -> float:
        """How plausible it is that a true rate exceeds its estimate by `gap`: 1 when the evidence does not speak against it."""
        shift = self._known(request_id, drafter)
        total = self._weight + (shift.total if shift is not None else 0.0)
        variance = max(rate * (1.0 - rate), 0.01) / total
        return math.exp(-gap * gap / (2.0 * variance))

    def update(self, request_id: int, task: str, drafter: str, bucket: int, labels: Sequence[float], now: int = 0) -> None:
        """Count a round's labels (see `observed_labels`) at every level; now: tokens emitted so far."""
        self.update_rounds(request_id, task, drafter, ((bucket, labels),), now)

    def update_rounds(
        self, request_id: int, task: str, drafter: str, rounds: Sequence[tuple[int, Sequence[float]]], now: int = 0
    ) -> None:
        """Count the labels of several rounds of a request at once, each with the bucket of its signal."""
        tag = temperature_tag(task)
        count, hits, expected, expected_before = 0, 0.0, 0.0, 0.0
        for bucket, labels in rounds:
            if not labels:
                continue
            pool = self.pool(task, drafter, bucket)
            if pool is None:
                pool = self.room(task, drafter, bucket)
                pool.open(POOL_DISCOUNT, self._expected_rates(task, drafter, bucket), POOL_WEIGHT)
            known, prior = len(labels), prior_rates(bucket, tag)
            count += known
            hits += add_up(labels)
            expected += add_up(pool.rates(known))
            expected_before += add_up(prior[:known]) + prior[-1] * max(0, known - POSITIONS)
            pool.update(labels)
        if not count:
            return
        self.own(request_id, drafter).update(count, hits, expected, now)
        self.level(drafter, task).update(count, hits, expected_before)

    def pool(self, task: str, drafter: str, bucket: int) -> PositionTable | None:
        """The pool of a bucket, once a round of it was counted."""
        pool = self._pools.get((task, drafter, bucket))
        return pool if pool is not None and pool.is_open else None

    def room(self, task: str, drafter: str, bucket: int) -> PositionTable:
        """The pool of a bucket, or the place where it will be."""
        pool = self._pools.get((task, drafter, bucket))
        if pool is None:
            pool = self._pools[(task, drafter, bucket)] = PositionTable()
        return pool

    def own(self, request_id: int, drafter: str) -> WatchedShift:
        """A request's own odds against its pools: 1 before anything is known."""
        shifts = self._requests.get(request_id)
        if shifts is None:
            shifts = self._requests[request_id] = {}
        own = shifts.get(drafter)
        if own is None:
            own = shifts[drafter] = WatchedShift(self._request_discount, self._weight)
        return own

    def level(self, drafter: str, task: str) -> Shift:
        """A drafter's odds against the prior, at the task's temperature: 1 before anything is known."""
        key = drafter + temperature_tag(task)
        level = self._levels.get(key)
        if level is None:
            level = self._levels[key] = Shift(POOL_DISCOUNT, self._weight)
        return level

    def forget(self, request_id: int) -> None:
        """The request ended; what it taught stays in the pools."""
        self._requests.pop(request_id, None)

    def snapshot(self) -> list[dict[str, Any]]:
        """The pools as plain data, for `restore`."""
        return [
            {
                "task": task,
                "drafter": drafter,
                "bucket": bucket,
                "hits": list(pool.hits),
                "totals": list(pool.totals),
                "seen": pool.seen,
            }
            for (task, drafter, bucket), pool in self._pools.items()
            if pool.is_open
        ]

    def restore(self, pools: Sequence[dict[str, Any]], most: float = 10.0) -> None:
        """Begin with stored pools. Raises KeyError, TypeError or ValueError on data that `snapshot` did not write."""
        for data in pools:
            task, drafter, bucket = str(data["task"]), str(data["drafter"]), int(data["bucket"])
            if not 0 <= bucket < NUM_BUCKETS:
                raise ValueError(f"acceptance counts: bucket {bucket} is not in [0, {NUM_BUCKETS})")
            pool = self.room(task, drafter, bucket)
            pool.open(POOL_DISCOUNT, self._expected_rates(task, drafter, bucket), POOL_WEIGHT)
            pool.restore(data["hits"], data["totals"], data["seen"], most)

    def _expected_rates(self, task: str, drafter: str, bucket: int) -> Sequence[float]:
        """What is expected of a bucket before a round of it was counted."""
        tag = temperature_tag(task)
        prior, level = prior_rates(bucket, tag), self._levels.get(drafter + tag)
        return level.apply(list(prior)) if level is not None else prior
