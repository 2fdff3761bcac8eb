"""The time bank and its bound."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.control.bank import TimeBank


def bank(eps: float = 0.01, start: float = 2.5, cap: float = 200.0, plain: float = 20.0) -> TimeBank:
    made = TimeBank(eps, start, cap)
    made.open(plain)
    return made


def test_worked_example_the_start_pays_five_probes() -> None:
    """Plain steps of 20 ms, probes of 34 ms that bring 1.2 tokens lose 10 ms each; the start of 50 ms pays five."""
    paid = bank(eps=0.0)
    probes = 0
    while paid.grant(10.0):
        paid.settle(20.0, 1.2, 34.0)
        probes += 1
    assert probes == 5


def test_worked_example_fifty_plain_tokens_pay_one_probe() -> None:
    empty = bank(start=0.0)
    for tokens in range(1, 51):
        empty.settle_plain(20.0)
        assert empty.grant(10.0 - 1e-9) is (tokens == 50)


def test_gains_of_good_speculation_are_capped() -> None:
    rich = bank()
    for _ in range(1000):
        rich.settle(20.0, 4, 30.0)
    assert rich.slack == 200 * 20.0


def test_several_plans_of_a_round_share_what_there_is() -> None:
    shared = bank()  # 50 ms
    assert [shared.grant(20.0) for _ in range(3)] == [True, True, False]
    shared.settle_plain(20.0)
    assert shared.grant(20.0)


def test_looking_for_drafts_is_charged_but_an_interruption_during_it_is_not() -> None:
    looked = bank(start=1.0)
    looked.settle_plain(20.0, looking=0.15)
    assert looked.slack == pytest.approx(20.05)
    looked.settle_plain(20.0, looking=0.5)
    assert looked.slack == pytest.approx(19.75)
    looked.settle_plain(20.0, looking=1000.0)
    assert looked.slack == pytest.approx(19.75 + 0.2 - 5.0)


def test_one_interruption_in_a_while_is_not_charged() -> None:
    held = bank(eps=0.0)
    held.settle(20.0, 1, 500.0, ceiling=25.0)
    assert held.slack == pytest.approx(50 - 5)
    held.settle(20.0, 1, 60.0, ceiling=25.0)
    assert held.slack == pytest.approx(50 - 5 - 40)
    for _ in range(31):
        held.settle(20.0, 1, 20.0, ceiling=25.0)
    held.settle(20.0, 1, 500.0, ceiling=25.0)
    assert held.slack == pytest.approx(50 - 5 - 40 - 5)


def test_a_debt_is_never_larger_than_the_start() -> None:
    held = bank(eps=0.01)
    for _ in range(3):
        held.settle(20.0, 1, 8000.0)
    assert held.slack == -50.0
    for _ in range(300):
        held.settle_plain(20.0)
    assert held.grant(5.0)


def test_a_start_that_was_too_large_is_taken_back_once() -> None:
    held = bank(plain=320.0)
    held.correct_start(20.0)
    assert held.slack == pytest.approx(2.5 * 20.0)
    held.correct_start(20.0)
    held.correct_start(25.0)
    assert held.slack == pytest.approx(2.5 * 20.0)


def test_an_interrupted_batch_is_forgiven_as_a_whole_and_once() -> None:
    held = bank(eps=0.0)
    for _ in range(2):
        for _ in range(4):
            held.settle(20.0, 0.25, 15.0, ceiling=5.0, weight=0.25)
    assert held.slack == pytest.approx(50 - 4 * (5 - 5) - 4 * (15 - 5))


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    worst=st.floats(1.0, 10.0),
    eps=st.floats(0.0, 0.1),
    start=st.floats(0.0, 20.0),
    cap=st.floats(1.0, 300.0),
)
def test_time_stays_within_the_bound_at_every_moment(seed: int, worst: float, eps: float, start: float, cap: float) -> None:
    """Any mixture of lucky and unlucky rounds, as long as no round takes longer than it was granted."""
    rng, plain = random.Random(seed), 1.0
    held = bank(eps, start, cap, plain)
    time = tokens = 0.0
    for _ in range(300):
        limit = rng.uniform(1.0, worst)
        if held.grant(limit - plain):
            seconds, emitted = rng.uniform(0.2, 1.0) * limit, rng.choice((1, 1, 1, 2, 5))
            held.settle(plain, emitted, seconds)
        else:
            seconds, emitted = plain, 1
            held.settle_plain(plain)
        time += seconds
        tokens += emitted
        assert time <= (1 + eps) * plain * tokens + start * plain + 1e-9


def test_bank_is_short_with_less_than_a_quarter_of_its_start() -> None:
    bank = TimeBank(start=8.0)
    bank.open(1.0)
    assert not bank.is_short
    bank.settle(1.0, 1.0, 6.9)
    assert not bank.is_short
    bank.settle(1.0, 1.0, 1.5)
    assert bank.is_short
