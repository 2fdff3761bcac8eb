"""Times that follow the rounds that were run: factors on forwards, medians, lines, and whether drafts overlap, in seconds."""

from __future__ import annotations

from ctypes import Array, Structure, c_double

from paceline.control.shared import doubles, wholes

EXACT_ROWS = 64
ROW_BUCKETS = EXACT_ROWS + 17
OUTLIER = 3.0
_SLOWEST_RATE = 0.1


def rows_bucket(rows: int) -> int:
    """Rows 1 to 64 have buckets of their own, then one for each doubling."""
    return rows if rows <= EXACT_ROWS else min(EXACT_ROWS + (rows - 1).bit_length() - 6, ROW_BUCKETS - 1)


class Scales(Structure):
    """Factors between predicted and seen forward times: one for the machine, one for each number of rows.

    A surprise is shared out between the two, so that a slower machine is noticed at once for all rows, while a change of the
    usual number of rows moves nothing. First surprises count for more, outliers are clipped.
    """

    _fields_ = (
        ("_rows", c_double * ROW_BUCKETS),
        ("_counts", c_double * ROW_BUCKETS),
        *doubles("_seen", "machine", "moved"),
    )
    _rows: Array[c_double]
    _counts: Array[c_double]
    _seen: float
    machine: float
    moved: float
    """Sum of all changes in log terms, for caches."""

    def __init__(self) -> None:
        super().__init__((1.0,) * ROW_BUCKETS, machine=1.0)

    def of(self, rows: int) -> float:
        """The factor on a forward over this many rows."""
        return self.machine * self._rows[rows_bucket(rows)]

    def run(self, rows: int, count: int) -> list[float]:
        """The factors on forwards over rows, rows + 1, ..., `count` of them."""
        machine = self.machine
        if rows + count <= EXACT_ROWS:  # the usual case, in the time of one call
            return [machine * factor for factor in self._rows[rows : rows + count]]
        return [self.of(rows + extra) for extra in range(count)]

    def update(self, rows: int, ratio: float, weight: float = 1.0) -> None:
        """Take in seen over predicted time. weight: share of a round that a record of a batch stands for."""
        bucket, machine, seen, factors, counts = rows_bucket(rows), self.machine, self._seen, self._rows, self._counts
        factor, count = factors[bucket], counts[bucket]
        surprise = ratio / (machine * factor)
        surprise = min(max(surprise, 1.0 / OUTLIER), OUTLIER)
        common = min(weight * max(0.1, 0.6 / (1.0 + 0.25 * seen)), 0.6)
        own = min(weight * max(0.05, 0.3 / (1.0 + 0.5 * count)), 0.3)
        self.machine = machine * surprise**common
        factors[bucket] = factor * surprise**own
        self._seen = seen + weight
        counts[bucket] = count + weight
        self.moved += (common + own) * abs(surprise - 1.0)


class MedianFactor(Structure):
    """Median of the last five ratios: a hiccup of the machine does not move it, three slow rounds do."""

    _fields_ = (("_last", c_double * 5), *doubles("value", "_share"), *wholes("count"))
    _last: Array[c_double]
    value: float
    count: int
    _share: float

    def __init__(self) -> None:
        super().__init__((1.0,) * 3, 1.0)

    def update(self, ratio: float, weight: float) -> None:
        """Take in a ratio; a batched round comes as several records, each with its share of the weight."""
        self._share += weight
        if self._share < 0.999:
            return
        self._share = 0.0
        self.count += 1
        last = [*self._last[: min(2 + self.count, 5)], ratio][-5:]  # three ones are there before the first ratio
        for place, value in enumerate(last):
            self._last[place] = value
        self.value = sorted(last)[len(last) // 2]


class Line(Structure):
    """Seconds of a part of a round as `fixed + per_token * drafted`: discounted least squares from a first guess.

    fixed, per_token: the guess; weight: rounds that it counts for (0: replaced by the first round seen).
    """

    _fields_ = doubles("fixed", "per_token", "_guess_fixed", "_guess_each", "_w", "_n", "_nn", "_t", "_nt")
    fixed: float
    per_token: float
    _guess_fixed: float
    _guess_each: float
    _w: float
    _n: float
    _nn: float
    _t: float
    _nt: float

    def __init__(self, fixed: float, per_token: float, weight: float) -> None:
        super().__init__(fixed, per_token, fixed, per_token)
        if weight > 0.0:
            for tokens in (1, 8):
                self._guessed(tokens, fixed + per_token * tokens, weight / 2.0)

    def worst(self, tokens: int) -> float:
        """The larger of what was guessed and what was learnt."""
        return max(self._guess_fixed + self._guess_each * tokens, self.fixed + self.per_token * tokens)

    def learn(self, tokens: int, seconds: float) -> None:
        """Count a round."""
        w, keep = self._w, 0.95
        if w > 8.0:
            # Settled: one outlier must not bend the line.
            seconds = min(seconds, OUTLIER * (self.fixed + self.per_token * tokens) + 1e-5)
        seconds = max(0.0, seconds)
        self._w = w = w * keep + 1.0
        self._n = n = self._n * keep + tokens
        self._nn = nn = self._nn * keep + tokens * tokens
        self._t = t = self._t * keep + seconds
        self._nt = nt = self._nt * keep + tokens * seconds
        # Rounds of one length cannot tell the slope: it stays near the guess, unless that is impossible.
        slope = (nt - n * t / w + self._guess_each) / (nn - n * n / w + 1.0)
        each = slope if slope > 0.0 else 0.0
        fixed = (t - each * n) / w
        self.fixed, self.per_token = (0.0, t / n) if fixed < 0.0 else (fixed, each)

    def _guessed(self, tokens: int, seconds: float, weight: float) -> None:
        self._w += weight
        self._n += weight * tokens
        self._nn += weight * tokens * tokens
        self._t += weight * seconds
        self._nt += weight * tokens * seconds


class Overlap:
    """Whether the drafts of a batch are made one after another or together, from rounds in which several drafted."""

    __slots__ = ("_drafting", "_rounds", "_seconds", "_seen", "serial")

    def __init__(self) -> None:
        self.serial = 0.5
        """1: one after another; 0: together, in the time of one."""
        self._rounds = self._seen = self._drafting = 0
        self._seconds = 0.0

    def expect_together(self) -> None:
        """A drafter says that its drafts of a batch share their steps: believed until a round shows it."""
        if self._rounds == 0:
            self.serial = 0.0

    def share(self, batch: int) -> float:
        """The part of its own drafting time that a request adds to a batched round."""
        return self.serial + (1.0 - self.serial) / batch

    def observe(self, batch: int, draft_seconds: float, host_seconds: float) -> None:
        """Count one of the `batch` records of a round. host_seconds: in which the batch drafted, or all but its forward."""
        self._seen += 1
        self._drafting += draft_seconds > 0.0
        self._seconds += draft_seconds
        if self._seen < batch:
            return
        if self._drafting > 1:
            least = 1.0 / self._drafting
            serial = min(max((host_seconds / self._seconds - least) / (1.0 - least), 0.0), 1.0)
            self._rounds += 1
            self.serial += max(_SLOWEST_RATE, 1.0 / (self._rounds + 1.0)) * (serial - self.serial)
        self._seen = self._drafting = 0
        self._seconds = 0.0
