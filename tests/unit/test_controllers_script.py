"""The script that compares controllers on real prompts, on a toy engine."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

from paceline.config import SamplingParams
from paceline.control import registry
from paceline.costs import CostTable, DraftCost
from paceline.drafting.model import ModelDrafter
from paceline.engine import Engine
from paceline.study.bench import OVERALL, PLAIN
from paceline.study.contest import Contestant, ReadOnce, hold
from paceline.study.prompts import BenchPrompt
from paceline.study.report import table_rows
from scripts import loaded_script
from toys import ToyRunner, noisy_language, random_language

VOCAB = 16


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    with loaded_script("controllers") as module:
        yield module


def toy_engine() -> Engine:
    target = random_language(VOCAB, order=2)
    drafter = ModelDrafter(ToyRunner(noisy_language(target, 0.5), VOCAB))
    costs = CostTable([1, 8], [0], [[0.010, 0.012]], 0.0, {"model": DraftCost(per_token=0.001)})
    return Engine(ToyRunner(target, VOCAB), costs=costs, controller=registry.create("fixed", costs), drafters=[drafter])


def test_every_registered_controller_and_the_references_take_part(script: ModuleType) -> None:
    names = script.controller_names()
    assert {PLAIN, "fixed_1", "fixed_16"} | set(registry.names()) - {"fixed"} <= set(names)
    costs = toy_engine().costs
    assert script.make_controller("fixed_6", costs, {}).options.num_draft == 6
    for name in names:
        assert script.make_controller(name, costs, {}).name in (name.removesuffix(script.PROFILE), "fixed")


def test_a_controller_with_a_profile_begins_with_what_it_left(script: ModuleType) -> None:
    engine = toy_engine()
    pacer = script.make_controller("pacer", engine.costs, {})
    engine.controller = pacer
    engine.generate([1, 2, 3], SamplingParams(max_tokens=40, ignore_eos=True))
    profile = pacer.snapshot()
    assert profile["acceptance"]
    again = script.make_controller("pacer:profile", engine.costs, {"pacer:profile": profile})
    fresh = script.make_controller("pacer", engine.costs, {"pacer:profile": profile})
    assert [pool["seen"] for pool in again.snapshot()["acceptance"]] == [pool["seen"] for pool in profile["acceptance"]]
    assert fresh.snapshot()["acceptance"] == []


def hold_contest(
    script: ModuleType, engine: Engine, names: list[str], repeats: int = 1, made_controllers: list[Any] | None = None
) -> Any:
    """All names on two prompts, through the script's own parts."""
    contest = script.Contest(SamplingParams(max_tokens=40, ignore_eos=True))
    controllers = made_controllers if made_controllers is not None else []
    shared = ReadOnce(engine.runner)

    def make() -> list[Contestant]:
        made: list[Contestant] = script.make_contestants([engine], names, {}, shared)
        controllers.extend(contestant.controller for contestant in made)
        return made

    prompts = [(BenchPrompt(str(ids), "toy", ""), ids) for ids in ([1, 2, 5, 3], [3, 4])]
    hold(make, prompts, contest.params, warm_up=[7, 7], repeats=repeats, label="test", keep=contest.samples.append)
    return contest


def test_contestants_write_the_same_text_and_the_summary_holds_the_best_fixed_length(script: ModuleType) -> None:
    names = [PLAIN, "fixed_1", "fixed_4", "pacer", "svip"]
    contest = hold_contest(script, toy_engine(), names)
    run = script.document([contest])["runs"][0]
    rows = {(row["method"], row["category"]): row for row in table_rows(run["results"])}
    assert all(row["identical_to_plain"] for row in rows.values())
    assert rows[PLAIN, OVERALL]["num_drafted"] == 0
    for clock, speed in script.AGAINST.items():
        best = run["best_fixed"][clock][OVERALL]
        assert best in ("fixed_1", "fixed_4")
        assert rows[best, OVERALL][speed] == 1.0
        assert all(row[speed] <= 1.0 for row in rows.values() if row["method"].startswith("fixed_"))
    assert set(run["controller_share_of_round"]) == set(names)
    assert all((name != PLAIN) == (0 < share < 1) for name, share in run["controller_share_of_round"].items())
    answers = table_rows(script.document([contest])["samples"])
    assert len(answers) == 10
    assert all(row["accounted_seconds"] > 0 for row in answers)


def test_every_repeat_begins_anew(script: ModuleType) -> None:
    controllers: list[Any] = []
    contest = hold_contest(script, toy_engine(), [PLAIN, "fixed_1", "goodput"], repeats=3, made_controllers=controllers)
    assert len({id(controller) for controller in controllers}) == 9
    assert len(contest.samples) == 18
    (row, *_) = (r for r in table_rows(script.document([contest])["runs"][0]["results"]) if r["method"] == "goodput")
    assert row["num_prompts"] == 2
    assert row["num_tokens"] == 80


def test_each_contestant_keeps_its_own_controller_and_costs(script: ModuleType) -> None:
    engine = toy_engine()
    first, second = script.make_contestants([engine], ["goodput", "goodput"], {}, ReadOnce(engine.runner))
    first.generate([1, 2], SamplingParams(max_tokens=30), "toy")
    assert first.controller.alpha != second.controller.alpha


def test_interrupted_runs_count_the_prompts_that_all_answered(script: ModuleType) -> None:
    contest = hold_contest(script, toy_engine(), [PLAIN, "fixed_1"])
    contest.samples.pop()
    rows = table_rows(script.document([contest])["runs"][0]["results"])
    assert {row["num_prompts"] for row in rows} == {1}
    contest.samples = [sample for sample in contest.samples if sample.method == PLAIN]
    assert script.document([contest])["runs"] == []  # nothing to compare with yet
