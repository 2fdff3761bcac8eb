"""`table`."""

from __future__ import annotations

import pytest

from paceline.control.table import Table, TableOptions
from paceline.errors import OptionError
from unit.control.kit import context, costs


@pytest.mark.parametrize(
    ("schedule", "cap", "batches", "expected"),
    [
        ([[1, 64, 3], [65, 128, 1], [129, 512, 0]], 5, [1, 64, 65, 128, 129, 512, 600], [3, 3, 1, 1, 0, 0, 0]),
        ([[1, 4, 5], [9, 16, 2]], 4, [1, 4, 5, 8, 9, 16, 17, 32], [4, 4, 4, 4, 2, 2, 2, 2]),
    ],
)
def test_worked_lookups(schedule: list[list[int]], cap: int, batches: list[int], expected: list[int]) -> None:
    controller = Table(TableOptions(schedule=schedule), costs())
    assert [controller.plan(context(batch=b, max_draft=cap)).num_draft for b in batches] == expected


@pytest.mark.parametrize(
    "bad", [[], [[2, 4, 1]], [[1, 4, 1], [4, 8, 0]], [[1, 4, -1]], [[1, 4]], [[1, 4, 1.5]], [[4, 1, 1]], [[5, 8, 1], [1, 4, 1]]]
)
def test_bad_schedules_are_refused(bad: list[list[int]]) -> None:
    with pytest.raises(OptionError, match="schedule"):
        TableOptions(schedule=bad)
