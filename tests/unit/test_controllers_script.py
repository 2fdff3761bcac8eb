"""The script that compares controllers on real prompts, on a toy engine."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import paceline
from paceline.config import SamplingParams
from paceline.control import registry
from paceline.costs import CostTable, DraftCost
from paceline.drafting.model import ModelDrafter
from paceline.engine import Engine
from paceline.study.bench import OVERALL, PLAIN, Sample
from toys import ToyRunner, noisy_language, random_language

VOCAB = 16


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    path = Path(paceline.__file__).parents[2] / "benchmarks" / "controllers.py"
    spec = importlib.util.spec_from_file_location("controllers_script", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def toy_engine() -> Engine:
    target = random_language(VOCAB, order=2)
    drafter = ModelDrafter(ToyRunner(noisy_language(target, 0.5), VOCAB))
    costs = CostTable([1, 8], [0], [[0.010, 0.012]], 0.0, {"model": DraftCost(per_token=0.001)})
    return Engine(ToyRunner(target, VOCAB), costs=costs, controller=registry.create("fixed", costs), drafters=[drafter])


def test_every_registered_controller_and_the_references_take_part(script: ModuleType) -> None:
    names = script.controller_names()
    assert {PLAIN, "fixed_1", "fixed_16"} | set(registry.names()) - {"fixed"} <= set(names)
    costs = toy_engine().costs
    assert script.make_controller("fixed_6", costs).options.num_draft == 6
    for name in names:
        assert script.make_controller(name, costs).name in (name, "fixed")


def test_contestants_write_the_same_text_and_the_summary_holds_the_best_fixed_length(script: ModuleType) -> None:
    engine = toy_engine()
    names = [PLAIN, "fixed_1", "fixed_4", "pacer", "svip"]
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    contest = script.make_contest(engine, names, params)
    for number, prompt in enumerate([[1, 2], [3, 4]]):
        for contestant in contest.contestants:
            result = contestant.generate(prompt, params, "toy")
            contest.samples.append(Sample(contestant.name, number, "toy", result))
    run = script.summary(contest)
    rows = {(row["method"], row["category"]): row for row in run["results"]}
    assert all(row["identical_to_plain"] for row in rows.values())
    assert rows[PLAIN, OVERALL]["num_drafted"] == 0
    best = run["best_fixed"][OVERALL]
    assert best in ("fixed_1", "fixed_4")
    assert rows[best, OVERALL]["speed_vs_best_fixed"] == 1.0
    assert all(row["speed_vs_best_fixed"] <= 1.0 for row in rows.values() if row["method"].startswith("fixed_"))
    assert set(run["controller_share_of_round"]) == set(names)
    assert all(share > 0 for name, share in run["controller_share_of_round"].items() if name != PLAIN)
    assert len(script.raw([contest])) == 10


def test_each_contestant_keeps_its_own_controller_and_costs(script: ModuleType) -> None:
    engine = toy_engine()
    first, second = script.make_contest(engine, ["goodput", "goodput"], SamplingParams(max_tokens=30)).contestants
    first.generate([1, 2], SamplingParams(max_tokens=30), "toy")
    assert first.controller.inner.alpha != second.controller.inner.alpha


def test_chart_frames_the_best_fixed_length(script: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [
        {"category": OVERALL, "method": method, "speedup_vs_plain": speed}
        for method, speed in ((PLAIN, 1.0), ("fixed_2", 1.4), ("pacer", 1.5))
    ]
    run = {"temperature": 0.0, "results": rows, "best_fixed": {OVERALL: "fixed_2"}}
    script.plot([run, run], tmp_path / "chart.png", "toy drafts")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")
