"""Measured costs as data: what a plain step, a verification pass and a drafted token take on one machine.

Plain Python, so that controllers, replays and reports can use it without torch. Times are seconds. `execution.measure` fills
it; `CostTable.learn` keeps it fresh while running.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import mean
from typing import Any

from paceline.records import StepRecord

_SAMPLE = 64
"""Rounds of an answer that the price of a plain step is estimated from at most."""


def _interpolate(xs: list[int], ys: list[float], x: float) -> float:
    """Piecewise linear in x, extrapolated with the last slope, never under zero."""
    if len(xs) == 1:
        return ys[0]
    i = min(max(bisect_left(xs, x), 1), len(xs) - 1)
    x0, x1, y0, y1 = xs[i - 1], xs[i], ys[i - 1], ys[i]
    return max(0.0, y0 + (y1 - y0) * (x - x0) / (x1 - x0))


@dataclass(slots=True)
class DraftCost:
    """Seconds a drafter takes: `fixed` a round plus `per_token` for each drafted (or caught-up) token."""

    per_token: float = 0.0
    fixed: float = 0.0
    per_catch_up: float = 0.0

    def seconds(self, num_tokens: int, catch_up: int = 0) -> float:
        return self.fixed + self.per_token * num_tokens + self.per_catch_up * catch_up if num_tokens else 0.0


@dataclass(slots=True)
class CostTable:
    """t_verify(rows, context) on a grid, with drafter costs and the fixed cost of a round.

    rows: new tokens of one forward over the whole batch (1 is a plain step of one sequence).
    """

    rows: list[int]
    contexts: list[int]
    verify: list[list[float]]
    """verify[c][r]: seconds of a forward over rows[r] tokens at contexts[c] committed tokens."""
    round_overhead: float = 0.0
    """Host seconds of a round outside forward and drafting."""
    drafters: dict[str, DraftCost] = field(default_factory=dict)
    scale: float = 1.0
    """Ratio of what is seen now to what was measured (other load, clocks); learnt while running."""

    def t_verify(self, rows: int, context: int) -> float:
        """Seconds of a forward over `rows` new tokens in all, at `context` committed tokens of a sequence."""
        curve = [_interpolate(self.rows, at_context, rows) for at_context in self.verify]
        return self.scale * _interpolate(self.contexts, curve, context)

    def t_plain(self, context: int, batch: int = 1) -> float:
        """Seconds of a plain step of `batch` sequences."""
        return self.t_verify(batch, context)

    def row_cost(self) -> float | None:
        """What a row beyond the second one costs, in plain steps: the second may be dearer, and is paid by any draft.

        None where too few rows were measured.
        """
        context = self.contexts[0]
        if self.rows[-1] < 4:
            return None
        return max(0.0, self.t_verify(4, context) - self.t_verify(2, context)) / (2.0 * self.t_plain(context))

    def t_draft(self, drafter: str, num_tokens: int, catch_up: int = 0) -> float:
        cost = self.drafters.get(drafter)
        return cost.seconds(num_tokens, catch_up) if cost is not None else 0.0

    def plain_step_during(self, steps: Sequence[StepRecord]) -> float | None:
        """Seconds that a plain step of one sequence would have taken in the place of these rounds; None without a round.

        The measured price of a plain step, corrected by what the rounds' own forwards took against their price, so that a machine
        that is busier now than when it was measured does not make speculation look slow, nor a freer one make it look fast.
        """
        later = steps[1:] or steps  # an answer's first round finds cold caches
        sample = later[:: len(later) // _SAMPLE + 1]
        expected = sum(self.t_verify(step.batch_rows or step.num_drafted + 1, step.context_length) for step in sample)
        if expected <= 0.0:
            return None
        load = sum(step.verify_seconds for step in sample) / expected
        forward = load * mean(self.t_plain(step.context_length, step.batch_size) for step in sample)
        return forward + mean(max(0.0, s.round_seconds - s.verify_seconds - s.draft_seconds - s.control_seconds) for s in sample)

    def to_json(self) -> dict[str, Any]:
        return {
            "rows": self.rows,
            "contexts": self.contexts,
            "verify": self.verify,
            "round_overhead": self.round_overhead,
            "drafters": {k: [v.per_token, v.fixed, v.per_catch_up] for k, v in self.drafters.items()},
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> CostTable:
        """Raises KeyError, TypeError or ValueError on a document that is not a cost table."""
        table = cls(
            rows=[int(x) for x in data["rows"]],
            contexts=[int(x) for x in data["contexts"]],
            verify=[[float(x) for x in row] for row in data["verify"]],
            round_overhead=float(data["round_overhead"]),
            drafters={k: DraftCost(*map(float, v)) for k, v in data["drafters"].items()},
        )
        if not table.rows or len(table.verify) != len(table.contexts) or any(len(v) != len(table.rows) for v in table.verify):
            raise ValueError("cost table: grid and values do not match")
        return table
