"""`sglang_ladder`."""

from __future__ import annotations

import pytest

from paceline.control.sglang_ladder import SglangLadder, SglangLadderOptions, next_steps
from paceline.errors import OptionError
from unit.control.kit import context, costs, record

LADDER = (1, 3, 5, 7)


def test_climbs_only_when_the_average_passes_the_step() -> None:
    ema, reached = 2.0, []
    for _ in range(4):
        ema = 0.8 * ema + 0.2 * 3
        reached.append((round(ema, 4), next_steps(LADDER, 3, ema)))
    assert reached == [(2.2, 3), (2.36, 3), (2.488, 3), (2.5904, 5)]


@pytest.mark.parametrize(
    ("ladder", "current", "ema", "expected"),
    [(LADDER, 3, 4.6, 7), ((0, 1, 3), 1, 0.24, 0), ((0, 1, 3), 1, 0.26, 1), (LADDER, 3, 0.2, 1), ((0, 1, 3), 0, 9.0, 1)],
)
def test_worked_moves(ladder: tuple[int, ...], current: int, ema: float, expected: int) -> None:
    assert next_steps(ladder, current, ema) == expected


def test_first_change_waits_for_the_warm_up() -> None:
    controller = SglangLadder(SglangLadderOptions(), costs())
    planned = []
    for _ in range(15):
        length = controller.plan(context()).num_draft
        planned.append(length)
        controller.observe(record(length, length))
    assert planned == [3] * 15
    assert controller.plan(context()).num_draft == 5


def test_large_batches_have_their_own_ladder() -> None:
    controller = SglangLadder(SglangLadderOptions(), costs())
    assert [controller.plan(context(batch=b)).num_draft for b in (1, 7, 8, 32, 64, 500)] == [3, 3, 3, 1, 0, 0]


def test_switched_off_slot_probes_again_after_five_rounds() -> None:
    options = SglangLadderOptions(slots=((1, (0, 1)),), start=0, warmup=0)
    controller = SglangLadder(options, costs())
    planned = []
    for _ in range(10):
        length = controller.plan(context()).num_draft
        planned.append(length)
        controller.observe(record(0, length))
    assert planned == [0] * 5 + [1] * 5
    assert controller.plan(context()).num_draft == 0


def test_unsorted_ladders_are_refused() -> None:
    with pytest.raises(OptionError, match="lengths must rise"):
        SglangLadderOptions(slots=((1, (3, 1)),))
    with pytest.raises(OptionError, match="rise from 1"):
        SglangLadderOptions(slots=((2, (1, 3)),))
