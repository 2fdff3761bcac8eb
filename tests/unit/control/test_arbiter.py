"""The arbiter of delivered speed."""

from __future__ import annotations

import pytest

from paceline.control.arbiter import Arbiter, Estimate, better


def test_worked_example_of_the_running_estimate() -> None:
    estimate = Estimate()
    estimate.update(50.0)
    seen = []
    for value in (54.0, 46.0, 60.0):
        estimate.update(value)
        seen.append((estimate.value, estimate.deviation))
    assert [v for v, _ in seen] == pytest.approx([51.2, 49.64, 52.748])
    assert [d for _, d in seen] == pytest.approx([1.2, 2.4, 4.788])


@pytest.mark.parametrize(("deviation", "expected"), [(1.0, True), (3.0, False)])
def test_worked_example_of_the_margin(deviation: float, expected: bool) -> None:
    assert better(50.0, 53.0, deviation, deviation) is expected


def rounds(arbiter: Arbiter, count: int, speed: float, *, speculative: bool = True) -> None:
    for _ in range(count):
        while speculative and arbiter.wants_plain:
            arbiter.observe(1.0, 1, 1.0, speculative=False)
        arbiter.observe(1.0, 1, 1.0 / speed, speculative)


def test_forbids_after_two_windows_that_deliver_less() -> None:
    arbiter = Arbiter()
    rounds(arbiter, 32, 0.7)
    assert not arbiter.forbids
    assert arbiter.wants_plain, "the price of a plain step is renewed before the verdict"
    rounds(arbiter, 32, 0.7)
    assert arbiter.forbids


def test_allows_a_new_attempt_after_some_plain_tokens() -> None:
    arbiter = Arbiter()
    rounds(arbiter, 64, 0.5)
    rounds(arbiter, 255, 1.0, speculative=False)
    assert arbiter.forbids
    rounds(arbiter, 1, 1.0, speculative=False)
    assert not arbiter.forbids


@pytest.mark.parametrize("speed", [0.97, 1.0, 2.0])
def test_does_not_forbid_what_is_as_good_as_plain(speed: float) -> None:
    arbiter = Arbiter()
    rounds(arbiter, 500, speed)
    assert not arbiter.forbids


def test_one_bad_window_is_not_enough() -> None:
    arbiter = Arbiter()
    for _ in range(10):
        rounds(arbiter, 32, 0.8)
        rounds(arbiter, 64, 1.5)
    assert not arbiter.forbids


def test_asks_for_a_plain_round_after_many_tokens_without_one() -> None:
    arbiter = Arbiter()
    for _ in range(127):
        arbiter.observe(1.0, 4, 2.0, speculative=True)
    assert not arbiter.wants_plain
    arbiter.observe(1.0, 4, 2.0, speculative=True)
    assert arbiter.wants_plain
    arbiter.observe(1.0, 1, 1.0, speculative=False)
    assert not arbiter.wants_plain


def test_plain_rounds_slower_than_their_price_do_not_count_against_speculation() -> None:
    arbiter = Arbiter()
    for _ in range(500):
        arbiter.observe(1.0, 1, 1.2, speculative=False)
        arbiter.observe(1.0, 2, 1.3, speculative=True)
    assert not arbiter.forbids
