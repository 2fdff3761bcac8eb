"""How far a drafter's own chances are believed."""

from __future__ import annotations

from itertools import accumulate
from operator import mul

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.control.chances import MOST_CHANCE, SPAN_ENDS, ChanceTable, span_of, step_rates
from paceline.control.quality import DraftQuality
from paceline.records import StepRecord

CHANCES = (0.8, 0.6, 0.3, 0.04)


def record(
    accepted: tuple[int, ...], chances: tuple[float, ...] = CHANCES, *, task: str = "", truncated: bool = False
) -> StepRecord:
    num = len(chances)
    told = {"chances": chances, "path": accepted, "truncated": truncated, "task": task}
    return StepRecord(0, "tree", num, num, len(accepted), len(accepted) + 1, 100, **told)  # type: ignore[arg-type]


def test_a_new_table_believes_what_it_is_told_when_greedy_and_less_when_tokens_are_drawn() -> None:
    assert ChanceTable().believed(CHANCES) == pytest.approx(CHANCES)
    assert ChanceTable(1.0).believed(CHANCES) == pytest.approx([0.4066 * chance for chance in CHANCES], rel=1e-3)
    assert ChanceTable().believed([1.0, 1.0]) == [MOST_CHANCE, MOST_CHANCE]


def test_what_proved_too_sure_is_believed_less_within_its_span_only() -> None:
    table = ChanceTable()
    for number in range(200):
        table.update((0.8, 0.3), (0,) if number % 5 else ())  # 0.8 holds, 0.3 never does
    sure, unsure = table.believed((0.8, 0.3))
    assert sure == pytest.approx(0.8, abs=0.03)
    assert unsure < 0.02
    assert table.believed((0.6,)) == pytest.approx((0.6,), abs=0.01)


@given(st.lists(st.floats(0.0, 1.0), max_size=16).map(lambda x: sorted(x, reverse=True)), st.randoms(use_true_random=False))
def test_believed_chances_never_increase_and_rates_multiply_to_them(chances: list[float], rng: object) -> None:
    table = ChanceTable()
    for _ in range(20):
        table.update(chances, {node for node in range(len(chances)) if rng.random() < 0.3})  # type: ignore[attr-defined]
    believed = table.believed(chances)
    assert believed == sorted(believed, reverse=True)
    assert all(0.0 <= chance <= MOST_CHANCE for chance in believed)
    positive = [chance for chance in believed if chance > 0.0]
    assert list(accumulate(step_rates(positive), mul)) == pytest.approx(positive)


def test_spans_begin_where_others_end() -> None:
    assert [span_of(end) for end in (0.0, *SPAN_ENDS, 1.0)] == [*range(len(SPAN_ENDS) + 1), len(SPAN_ENDS)]


def test_a_request_that_does_better_than_others_is_believed_more() -> None:
    quality = DraftQuality()
    before = quality.rates(0, "", "tree", 0, 2, CHANCES)
    for now in range(10):
        quality.learn([record((0, 1, 2, 3))], [0.0], now)
    assert quality.rates(0, "", "tree", 0, 2, CHANCES)[0] > quality.rates(1, "", "tree", 0, 2, CHANCES)[0] > before[0]


def test_a_round_that_was_cut_tells_nothing_of_chances() -> None:
    quality = DraftQuality()
    before = quality.rates(0, "", "tree", 0, 4, CHANCES)
    assert quality.learn([record((), truncated=True)], [0.0], 5) == [False]
    assert quality.rates(0, "", "tree", 0, 4, CHANCES) == before


def test_temperatures_are_learnt_apart_and_kept_in_a_profile() -> None:
    quality, other = DraftQuality(), DraftQuality()
    for now in range(50):
        quality.learn([record((), task="@1.0")], [0.0], now)
    assert quality.rates(1, "", "tree", 0, 1, CHANCES) == pytest.approx([0.8])
    other.restore(quality.snapshot())
    assert other.rates(1, "@1.0", "tree", 0, 4, CHANCES) == quality.rates(1, "@1.0", "tree", 0, 4, CHANCES)
    with pytest.raises(ValueError, match="expected 8"):
        other.restore({**quality.snapshot(), "chances": {"tree": [[1.0], [1.0]]}})
