"""The price of a round: pure scans over draft lengths, and costs that follow the rounds that were run. Times are seconds.

The measured table gives the shape; observed rounds give a factor for each number of rows, so that another load or clock needs
no new measurement.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import Array, Structure

from paceline.control.followed import EXACT_ROWS, OUTLIER, ROW_BUCKETS, Line, MedianFactor, Overlap, Scales, rows_bucket
from paceline.control.shared import doubles, wholes
from paceline.costs import CostTable
from paceline.records import StepRecord

CONTEXT_SHIFT = 7
_NEWS = 0.02
OTHER_MACHINE = 0.08
"""Relative change of forwards since the last plain step from which its price may be out of date."""
TRUSTED = 3
"""Plain rounds that make a price."""
_LAG = 8
"""Tokens caught up that tell what one costs."""
_LONG_LAG = 64
"""Tokens from which on most of a draft's time is catching up, and says nothing about drafting."""


def round_seconds(forwards: Sequence[float], once: float, each: float, floor: float = 0.0, floor_each: float = 0.0) -> list[float]:
    """Whole rounds for k = 0 .. K: `forwards[k] + once + each * k`, at least `floor + floor_each * k`."""
    seconds = []
    for forward in forwards:  # a loop: this runs in every round, and calls cost more than sums
        cost = forward + once
        seconds.append(cost if cost > floor else floor)
        once += each
        floor += floor_each
    return seconds


def node_rates(rates: Sequence[float], width: float) -> list[float]:
    """Chances for the nodes of a tree, such that their running products sum to its expected accepted tokens.

    rates: a_1 .. a_K of its levels; width: nodes a level. A level is accepted once, whichever of its nodes it was, so each
    node brings its share of it.
    """
    nodes, last = [], 0
    for node in range(len(rates)):
        level = int(node / width)
        nodes.append(rates[level] if level > last else rates[0] / width if node == 0 else 1.0)
        last = level
    return nodes


def best_ratio(rates: Sequence[float], seconds: Sequence[float]) -> tuple[int, float]:
    """The draft length k >= 1 with the most tokens a second, and its expected tokens.

    rates: a_1 .. a_K; seconds: whole round for k = 0 .. K. All lengths are scanned, since costs have steps (7.2).
    """
    best, best_emitted, best_speed = 1, 1.0, -1.0
    survival = emitted = 1.0
    for k, rate in enumerate(rates, 1):
        survival *= rate
        emitted += survival
        if emitted > best_speed * seconds[k]:
            best, best_emitted, best_speed = k, emitted, emitted / seconds[k]
    return best, best_emitted


def worth_another(survival: float, drafted: int, rates: Sequence[float], seconds: Sequence[float], price: float) -> bool:
    """The one rule while drafting: does some longer draft gain more tokens than its extra time is worth?

    survival: chance that all `drafted` tokens are accepted; rates: a_1 .. a_K; seconds: whole round for k = 0 .. K; price:
    tokens a second. Looks past the next token, because the step after a dear one may be cheap (7.2, cliffs).
    """
    gain = 0.0
    spent = seconds[drafted]
    for k in range(drafted + 1, len(rates) + 1):
        survival *= rates[k - 1]
        gain += survival
        if gain > price * (seconds[k] - spent):
            return True
    return False


class CostState(Structure):
    """The numbers of `LearnedCosts` that do not belong to a drafter."""

    _fields_ = (
        ("scales", Scales),
        ("plain", MedianFactor * ROW_BUCKETS),
        ("rest", Line),
        *doubles("machine_at_plain", "deviation"),
        *wholes("drafted_rounds"),
    )
    scales: Scales
    plain: Array[MedianFactor]
    rest: Line
    machine_at_plain: float
    deviation: float
    drafted_rounds: int
    """Speculative rounds of single sequences that could teach costs."""


class LearnedCosts:
    """A cost table kept true while running."""

    def __init__(self, table: CostTable) -> None:
        self._table = table
        self._scale = table.scale
        self._raw: dict[tuple[int, int], list[float]] = {}
        self._learnt: dict[tuple[int, int], list[float]] = {}
        self.state = CostState(Scales(), (MedianFactor(),) * ROW_BUCKETS, Line(table.round_overhead, 0.0, 4.0), 1.0, 0.1)
        self._scales = self.state.scales
        self._plain = self.state.plain[:]
        self.rest = self.state.rest
        """A speculative round outside forward and drafting: sampling, committing, the host's own work."""
        self._lines: dict[str, Line] = {}
        self._catch_up: dict[str, float] = {}
        self._moved = 0.0
        self.overlap = Overlap()

    @property
    def scale(self) -> float:
        """The table's own, which whoever keeps measured costs must watch."""
        return self._table.scale

    @property
    def deviation(self) -> float:
        """Mean relative deviation of speculative rounds from their predicted time."""
        return self.state.deviation

    def drafting(self, drafter: str) -> tuple[float, float]:
        """Seconds of a draft and of each of its tokens, without catching up, on the machine as it is now."""
        line, machine = self.line(drafter), self._scales.machine
        return machine * line.fixed, machine * line.per_token

    def worst_drafting(self, drafter: str, tokens: int) -> float:
        """As `Line.worst`, on the machine as it is now."""
        return self._scales.machine * self.line(drafter).worst(tokens)

    def line(self, drafter: str) -> Line:
        """A drafter's own time on the machine of the table: what slows forwards down slows drafts down, too.

        One that the table does not know is free until it was seen.
        """
        line = self._lines.get(drafter)
        if line is None:
            known = self._table.drafters.get(drafter)
            line = self._lines[drafter] = Line(known.fixed, known.per_token, 4.0) if known else Line(0.0, 0.0, 0.0)
        return line

    def catch_up(self, drafter: str, lag: int) -> float:
        """Seconds to feed a draft the committed tokens that its cache lacks."""
        each = self._catch_up.get(drafter)
        if each is None:
            known = self._table.drafters.get(drafter)
            each = self._catch_up[drafter] = known.per_catch_up if known else 0.0
        return each * lag

    def learn_catch_up(self, drafter: str, lag: int, seconds: float) -> None:
        """Count a draft of which `seconds` were not spent on drafted tokens."""
        each = self._catch_up.get(drafter, 0.0)
        if lag >= _LAG and each > 0.0:
            seen = max(seconds, 0.0) / lag
            self._catch_up[drafter] = each + 0.3 * (min(seen, OUTLIER * each) - each)

    def plain(self, context: int, batch: int = 1) -> float:
        """A whole plain round. Corrected by plain rounds only: the bound of the time bank rests on it."""
        return self.measured(batch, 0, context)[0] * self._plain[self._like(batch)].value

    @property
    def change(self) -> float:
        """By how much the machine is slower now than at the last plain round, as other forwards have shown. For choices: plain and
        speculative rounds must be compared under the same load."""
        change = self._scales.machine / self.state.machine_at_plain
        return 0.5 if change < 0.5 else 2.0 if change > 2.0 else change

    def knows_plain(self, batch: int) -> bool:
        """Whether enough plain rounds were seen to trust their price."""
        return self._plain[self._like(batch)].count >= TRUSTED

    def _like(self, batch: int) -> int:
        """The batch size whose plain rounds tell most of those of this one: its own, else a close one that was seen.

        Sequences that end make a batch smaller one by one, and each size has its place in the table.
        """
        bucket = rows_bucket(batch)
        if batch == 1 or self._plain[bucket].count >= TRUSTED:
            return bucket
        near = [b for b in range(max(1, batch // 4), min(4 * batch, EXACT_ROWS) + 1) if self._plain[b].count >= TRUSTED]
        return min(near, key=lambda b: abs(b - batch), default=bucket)

    @property
    def plain_is_stale(self) -> bool:
        """Whether forwards have become slower or faster since the last plain step: another load or clock."""
        return abs(self._scales.machine / self.state.machine_at_plain - 1.0) > OTHER_MACHINE

    def measured(self, base: int, count: int, context: int) -> list[float]:
        """The table's seconds of a forward over base, base + 1, ..., base + count rows (or more), at about this context."""
        if self._table.scale != self._scale:
            self._scale = self._table.scale
            self._raw.clear()
        bucket = context >> CONTEXT_SHIFT
        curve = self._raw.get((base, bucket))
        if curve is None:
            if len(self._raw) > 4096:
                self._raw.clear()
            curve = self._raw[(base, bucket)] = []
        if len(curve) <= count:
            middle = (bucket << CONTEXT_SHIFT) + (1 << (CONTEXT_SHIFT - 1))
            curve.extend(self._table.t_verify(base + extra, middle) for extra in range(len(curve), count + 1))
        return curve

    def learnt(self, base: int, count: int, context: int) -> list[float]:
        """As `measured`, corrected by the rounds seen so far; renewed when they say something new."""
        if self._scales.moved - self._moved > _NEWS:
            self._moved = self._scales.moved
            self._learnt.clear()
        key = (base, context >> CONTEXT_SHIFT)
        curve = self._learnt.get(key)
        if curve is None or len(curve) <= count:
            raw, factors = self.measured(base, count, context), self._scales.run(base, count + 1)
            curve = self._learnt[key] = [seconds * factor for seconds, factor in zip(raw, factors, strict=False)]
        return curve

    def forwards(self, count: int, context: int) -> list[float]:
        """As `learnt` for one sequence, without a cache: C (`pacer_core.c`) does the same, and must come to the same bits."""
        raw, factors = self.measured(1, count, context), self._scales.run(1, count + 1)
        return [seconds * factor for seconds, factor in zip(raw, factors, strict=False)]

    def learn_plain(self, context: int, batch: int, round_seconds: float, verify_seconds: float, weight: float = 1.0) -> None:
        """Count plain rounds alike, without what looking for drafts took. weight: how many; of a batch, the part counted."""
        raw = self.measured(batch, 0, context)[0]
        if raw > 0.0:
            self._plain[rows_bucket(batch)].update(round_seconds / raw, min(weight, 1.0))
            self._learn_verify(batch, verify_seconds / raw, weight)
            self.state.machine_at_plain = self._scales.machine
        if batch == 1:
            self.rest.learn(0, round_seconds - verify_seconds)

    def learn_speculative(self, record: StepRecord, rows: int, seconds: float, lag: int, times_draft: bool = True) -> None:
        """Count a speculative round (one of the records of a batched one): forward, draft, and what is left of `seconds`.

        rows: of the whole forward; lag: tokens that the draft's cache had to catch up; times_draft: false where others of a
        batch drafted more in the same steps.
        """
        batch, drafted = record.batch_size, record.num_drafted
        self.learn_round(record.context_length, rows, batch, record.verify_seconds)
        if record.drafter is not None:
            fixed, each = self.drafting(record.drafter)
            self.learn_catch_up(record.drafter, lag, record.draft_seconds - fixed - each * drafted)
            catch_up = min(self.catch_up(record.drafter, lag), 0.5 * record.draft_seconds)
            if lag < _LONG_LAG and (times_draft or self.overlap.serial > 0.5):
                self.line(record.drafter).learn(drafted, (record.draft_seconds - catch_up) / self._scales.machine)
        if batch == 1:
            self.rest.learn(drafted, seconds - record.verify_seconds - record.draft_seconds)
            if record.expected_seconds > 0.0 and drafted == record.num_planned:
                self.learn_deviation(record.expected_seconds, seconds)
        else:
            drafting = record.batch_draft_seconds or seconds - record.verify_seconds
            self.overlap.observe(batch, record.draft_seconds if drafted else 0.0, drafting)

    def learn_round(self, context: int, rows: int, batch: int, verify_seconds: float) -> None:
        """Count the forward of a speculative round (one of the `batch` records of a batched one)."""
        raw = self.measured(rows, 0, context)[0]
        if raw > 0.0:
            self._learn_verify(rows, verify_seconds / raw, 1.0 / batch)

    def learn_deviation(self, expected: float, seconds: float) -> None:
        """Count how far a speculative round was from its predicted time."""
        off = min(abs(seconds / expected - 1.0), 1.0)
        self.state.deviation += 0.05 * (off - self.state.deviation)

    def _learn_verify(self, rows: int, ratio: float, weight: float) -> None:
        if ratio > 0.0:
            self._scales.update(rows, ratio, weight)
