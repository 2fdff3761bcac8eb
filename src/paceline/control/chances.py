"""How far the chances can be believed that a drafter gives its own tokens (ours).

A drafter that votes knows of each node how likely the path down to it is, on the texts that its votes come from. On this text, at
this temperature, it is too sure or not sure enough; by how much is learnt for each span of chances. Every drafted node tells: those
that were accepted, and all others, whether they were refused or never reached.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from ctypes import Array, Structure, c_double
from typing import Any

SPAN_ENDS = (0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 0.9)
NUM_SPANS = len(SPAN_ENDS) + 1
CHANCE_DISCOUNT, _WEIGHT = 0.998, 2.0
"""Fading for each node of a span, and nodes that the first guess counts for."""
_COOLING = 0.9
"""By how much, in log terms, a temperature of 1 lowers a chance: a draw is less often what was likeliest before."""
MOST_CHANCE = 0.999


def span_of(chance: float) -> int:
    """The span that a chance belongs to."""
    span = 0
    while span < NUM_SPANS - 1 and chance >= SPAN_ENDS[span]:
        span += 1
    return span


class ChanceTable(Structure):
    """Accepted nodes over expected ones for each span, discounted."""

    _fields_ = (("accepted", c_double * NUM_SPANS), ("expected", c_double * NUM_SPANS))
    accepted: Array[c_double]
    expected: Array[c_double]

    def __init__(self, temperature: float = 0.0) -> None:
        super().__init__()
        for span, (low, high) in enumerate(zip((0.0, *SPAN_ENDS), (*SPAN_ENDS, 1.0), strict=True)):
            self.expected[span] = _WEIGHT * (low + high) / 2.0
            self.accepted[span] = math.exp(-_COOLING * temperature) * self.expected[span]

    def believed(self, chances: Sequence[float]) -> list[float]:
        """Chances as they have proved, not increasing."""
        found, last = [], MOST_CHANCE
        for chance in chances:
            span = span_of(chance)
            last = min(last, chance * self.accepted[span] / self.expected[span])
            found.append(last)
        return found

    def update(self, chances: Sequence[float], path: Collection[int]) -> None:
        """Count the nodes of a draft; path: those that were accepted."""
        for node, chance in enumerate(chances):
            span = span_of(chance)
            self.accepted[span] = CHANCE_DISCOUNT * self.accepted[span] + (1.0 if node in path else 0.0)
            self.expected[span] = CHANCE_DISCOUNT * self.expected[span] + chance

    def snapshot(self) -> list[list[float]]:
        """As plain data, for `restore`."""
        return [list(self.accepted), list(self.expected)]

    def restore(self, data: Any) -> None:
        """Begin with stored counts. Raises TypeError or ValueError on data that `snapshot` did not write."""
        accepted, expected = ([float(x) for x in part] for part in data)
        if len(accepted) != NUM_SPANS or len(expected) != NUM_SPANS or min(expected) <= 0.0 or min(accepted) < 0.0:
            raise ValueError(f"chances: {len(accepted)} and {len(expected)} counts, expected {NUM_SPANS} each, above 0")
        for span in range(NUM_SPANS):
            self.accepted[span], self.expected[span] = accepted[span], expected[span]


def step_rates(chances: Sequence[float]) -> list[float]:
    """Rates whose running products are these chances, all above 0 (or 0 behind the last that is)."""
    rates, last = [], 1.0
    for chance in chances:
        rates.append(chance / last if last > 0.0 else 0.0)
        last = chance
    return rates
