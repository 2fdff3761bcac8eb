"""`table`: batch size -> draft length, written by hand.

Source: dynamic speculation of vLLM (pull request 32374 as merged): configuration, checks and gap filling are known from it.
Lossless: nothing of the round itself is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from paceline.control.base import Controller, RoundContext
from paceline.control.rounds import plan_first, require, require_list
from paceline.costs import CostTable
from paceline.records import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class TableOptions:
    """Options of `table`."""

    schedule: Sequence[Sequence[int]] = ((1, 4, 3), (5, 16, 1), (17, 17, 0))
    """Rows (first batch size, last batch size, draft length), both ends included, sorted, from 1 on. Gaps and everything
    past the end repeat the length before them. The default is ours, a cautious one for small machines."""

    def __post_init__(self) -> None:
        require_list("schedule", self.schedule)
        for row in self.schedule:
            require_list("schedule", row)
        object.__setattr__(self, "schedule", tuple(tuple(row) for row in self.schedule))
        last = 0
        for row in self.schedule:
            whole = len(row) == 3 and all(isinstance(x, int) and not isinstance(x, bool) for x in row)
            require(whole, "schedule", row, "each row must be three whole numbers: first, last, length")
            first, end, length = row
            require(last < first <= end, "schedule", row, "rows must be sorted and must not overlap")
            require(last > 0 or first == 1, "schedule", row, "the first row must begin at batch size 1")
            require(0 <= length <= 63, "schedule", row, "lengths must lie in [0, 63]")
            last = end


class Table(Controller):
    """Looks the draft length up; a length of 0 switches drafting off for that round."""

    name = "table"
    options_type = TableOptions

    def __init__(self, options: TableOptions, costs: CostTable) -> None:
        self._rows = [(int(row[0]), int(row[2])) for row in options.schedule]

    def length(self, batch_size: int) -> int:
        """Draft length at a batch size >= 1."""
        return next(length for first, length in reversed(self._rows) if first <= max(batch_size, 1))

    def plan(self, context: RoundContext) -> Plan:
        return plan_first(context, self.length(context.batch_size), f"table at batch {context.batch_size}")
