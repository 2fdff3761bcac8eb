"""Costs as data: what the price of a plain step is said to be."""

from __future__ import annotations

from dataclasses import replace

import pytest

from paceline.costs import CostTable
from paceline.records import StepRecord

TABLE = CostTable(rows=[1, 2, 4], contexts=[0, 1000], verify=[[0.010, 0.011, 0.013], [0.020, 0.022, 0.026]])
ROUND = StepRecord(
    request_id=0,
    drafter="draft",
    num_planned=3,
    num_drafted=3,
    num_accepted=3,
    num_emitted=4,
    context_length=0,
    draft_seconds=0.001,
    verify_seconds=0.013,
    control_seconds=0.0005,
    round_seconds=0.0165,
)


def test_plain_step_is_the_measured_one_plus_what_the_host_does_besides_drafting():
    assert TABLE.plain_step_during([ROUND] * 3) == pytest.approx(0.010 + 0.002)


def test_plain_step_of_a_busy_machine_is_as_much_slower_as_the_rounds_own_forwards():
    busy = replace(ROUND, verify_seconds=0.026, round_seconds=0.0295)
    assert TABLE.plain_step_during([busy] * 200) == pytest.approx(0.020 + 0.002)


def test_plain_step_does_not_count_the_first_round_which_finds_cold_caches():
    cold = replace(ROUND, verify_seconds=0.130, round_seconds=0.2)
    assert TABLE.plain_step_during([cold, ROUND, ROUND]) == pytest.approx(0.012)
    assert TABLE.plain_step_during([cold]) == pytest.approx(0.100 + 0.0685)


def test_plain_step_follows_context_and_batch():
    batched = replace(ROUND, drafter=None, num_drafted=0, num_emitted=1, batch_size=2, batch_rows=2, context_length=1000)
    shared = replace(batched, verify_seconds=0.022, round_seconds=0.0235)
    assert TABLE.plain_step_during([shared] * 2) == pytest.approx(0.022)


def test_plain_step_is_unknown_without_a_round():
    assert TABLE.plain_step_during([]) is None
