"""The schedule of probes."""

from __future__ import annotations

import pytest

from paceline.control.probing import ProbeSchedule

DEAR = 1e9


def probes(schedule: ProbeSchedule, tokens: int, *, loss: float, width: int = 1, key: str = "a") -> list[int]:
    """Token counts at which probes that always fail run, from the moment when the key stopped paying."""
    ran = []
    now = width
    schedule.pays(key, now)
    while now < tokens:
        if schedule.due(key, now, loss):
            ran.append(now)
            now += width
            schedule.probed(key, now, accepted=False)
        else:
            now += 1
    return ran


@pytest.mark.parametrize(("last", "count", "overhead"), [(10**9, 11, 0.0018), (4096, 30, 0.0048)])
def test_worked_example_of_geometric_backoff(last: int, count: int, overhead: float) -> None:
    """100k tokens, first interval 64, probes of 16 tokens at half speed; the attempt that failed first counts as one."""
    ran = 1 + len(probes(ProbeSchedule(last=last, budget=1e-12), 100_000, loss=DEAR, width=16))
    assert ran == count
    assert ran * 16 / 100_000 == pytest.approx(overhead, abs=5e-5)


def test_intervals_double() -> None:
    ran = probes(ProbeSchedule(), 3000, loss=DEAR)
    assert [b - a for a, b in zip([1, *ran], ran, strict=False)] == [64, 129, 257, 513, 1025]


def test_cheap_probes_stay_frequent_and_within_their_budget() -> None:
    ran = probes(ProbeSchedule(budget=0.001), 10_000, loss=0.2)
    assert 10_000 * 0.001 * 0.8 < 0.2 * len(ran) < 10_000 * 0.001 * 1.2


def test_weak_evidence_is_tried_more_often() -> None:
    schedule = ProbeSchedule(budget=0.001, boost=16.0)
    schedule.pays("a", 0)
    assert not schedule.due("a", 20, loss=0.1, doubt=0.0)
    assert schedule.due("a", 20, loss=0.1, doubt=1.0)


def test_an_accepted_probe_is_followed_at_once_and_a_failed_one_is_not() -> None:
    schedule = ProbeSchedule()
    schedule.pays("a", 0)
    schedule.probed("a", 100, accepted=True)
    assert schedule.due("a", 101, DEAR)
    schedule.probed("a", 102, accepted=False)
    assert not schedule.due("a", 103, DEAR)


def test_paying_resets_the_interval() -> None:
    schedule = ProbeSchedule()
    probes(schedule, 10_000, loss=DEAR)
    schedule.pays("a", 10_000)
    assert schedule.due("a", 10_064, DEAR)


def test_keys_are_independent_and_a_new_one_waits() -> None:
    schedule = ProbeSchedule()
    probes(schedule, 10_000, loss=DEAR)
    assert not schedule.due("b", 10_000, DEAR)
    assert schedule.due("b", 10_064, DEAR)
