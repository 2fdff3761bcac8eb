from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.errors import OptionError
from paceline.study.stacks import StackLevel, all_stacks, best_stack, read_stack, stack_document

# drafting.md section 3.1: three models in order of size, acceptance of each pair, passes of one price whatever their rows
SMALL, MIDDLE, TARGET = (
    StackLevel(name, cost, rows=(1,), passes=(cost,)) for name, cost in (("m0", 0.02), ("m1", 0.12), ("m2", 1.0))
)
RATES = {("m0", "m1"): 0.75, ("m0", "m2"): 0.55, ("m1", "m2"): 0.85}


def test_worked_example_of_two_levels() -> None:
    stacks = {stack.levels: stack for stack in all_stacks([SMALL, MIDDLE, TARGET], RATES)}
    assert stacks["m2",].seconds_per_token == 1.0
    direct, single = stacks["m0", "m2"], stacks["m1", "m2"]
    assert (direct.lengths, round(direct.seconds_per_token, 4)) == ((5,), 0.5091)
    assert (single.lengths, round(single.seconds_per_token, 4)) == ((7,), 0.3794)


def test_worked_example_of_the_inner_level() -> None:
    inner = best_stack([SMALL, MIDDLE], RATES)
    assert (inner.levels, inner.lengths) == (("m0", "m1"), (4,))
    assert inner.seconds_per_token == pytest.approx(0.06556, abs=5e-6)


def test_worked_example_of_three_levels() -> None:
    best = best_stack([SMALL, MIDDLE, TARGET], RATES)
    assert (best.levels, best.lengths) == (("m0", "m1", "m2"), (4, 9))
    assert round(best.seconds_per_token, 4) == 0.2970
    assert best.spec == "cascade:m0>m1"


def test_a_level_that_does_not_pay_is_left_out() -> None:
    hopeless = {**RATES, ("m0", "m1"): 0.01, ("m0", "m2"): 0.01}
    assert best_stack([SMALL, MIDDLE, TARGET], hopeless).levels == ("m1", "m2")
    assert best_stack([SMALL, MIDDLE, TARGET], {}).levels == ("m2",)
    assert best_stack([SMALL, MIDDLE, TARGET], {}).spec == "none"


def test_a_level_without_passes_drafts_but_never_verifies() -> None:
    lookup = StackLevel("ngram", 0.0, fixed=1e-4)
    stacks = all_stacks([SMALL, lookup, TARGET], {**RATES, ("m0", "ngram"): 0.9, ("ngram", "m2"): 0.5})
    assert {stack.levels for stack in stacks} == {("m2",), ("ngram", "m2"), ("m0", "m2")}


def test_lengths_end_where_acceptance_was_measured() -> None:
    best = best_stack([SMALL, TARGET], {("m0", "m2"): (0.9, 0.85, 0.8)})
    assert best.lengths == (3,)
    assert best.seconds_per_token == pytest.approx((3 * 0.02 + 1.0) / (1 + 0.9 + 0.85 + 0.8))


def test_passes_are_linear_between_measured_rows_and_beyond() -> None:
    level = StackLevel("target", 1.0, rows=(1, 4, 8), passes=(1.0, 1.3, 2.1))
    assert [round(level.pass_seconds(rows), 3) for rows in (1, 2, 4, 6, 8, 10)] == [1.0, 1.1, 1.3, 1.7, 2.1, 2.5]


costs = st.lists(st.floats(1e-3, 1.0), min_size=2, max_size=5).map(sorted)


@given(costs=costs, data=st.data())
def test_the_dynamic_programme_finds_the_best_of_all_chains(costs: list[float], data: st.DataObject) -> None:
    levels = [
        StackLevel(
            f"m{i}",
            cost * data.draw(st.sampled_from([0.5, 1.0, 2.0])),
            fixed=data.draw(st.sampled_from([0.0, 0.01])),
            rows=(1, 17),
            passes=(cost, cost * 1.5),
        )
        for i, cost in enumerate(costs)
    ]
    rates = {(levels[i].name, levels[j].name): data.draw(st.floats(0.0, 0.99)) for j in range(len(levels)) for i in range(j)}
    best = best_stack(levels, rates, max_draft=6)
    assert best.seconds_per_token == pytest.approx(all_stacks(levels, rates, max_draft=6)[0].seconds_per_token)


def test_documents_are_read_back(tmp_path: Path) -> None:
    levels = [SMALL, MIDDLE, TARGET]
    measured = {**RATES, ("m0", "m1"): (0.7, 0.5)}
    path = tmp_path / "stack.json"
    document = stack_document(levels, measured, all_stacks(levels, measured))
    path.write_text(json.dumps(document))
    assert read_stack(path) == (levels, measured)
    assert document["stacks"][0]["predicted_speedup"] == pytest.approx(1.0 / all_stacks(levels, measured)[0].seconds_per_token)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"levels": []}, "the target last"),
        ({"levels": [{"name": "a", "per_token": 1}]}, "the target last"),
        ({"levels": [{"name": "a", "per_token": 1, "rows": [2, 1], "passes": [1, 1]}]}, "must increase"),
        ({"levels": [{"name": "a", "per_token": -1, "rows": [1], "passes": [1]}]}, "finite numbers >= 0"),
        ({"levels": [{"per_token": 1}]}, "not as `paceline stack --json`"),
        ({"acceptance": [{"draft": "a", "target": "b", "rate": 1.5}]}, r"must be in \[0, 1\]"),
        ({"acceptance": 3}, "not as `paceline stack --json`"),
    ],
)
def test_damaged_documents_are_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = tmp_path / "stack.json"
    level = {"name": "t", "per_token": 1.0, "rows": [1], "passes": [1.0]}
    path.write_text(json.dumps({"levels": [level], "acceptance": []} | change))
    with pytest.raises(OptionError, match=message):
        read_stack(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"nothing\.json"):
        read_stack(tmp_path / "nothing.json")
