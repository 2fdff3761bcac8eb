"""`paceline stack`: choosing from figures that were measured before."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from command_line import Run


@pytest.fixture
def figures(tmp_path: Path) -> Path:
    levels = [
        {"name": name, "per_token": cost, "rows": [1], "passes": [cost]} for name, cost in (("m0", 0.02), ("m1", 0.12), ("m2", 1.0))
    ]
    rates = [("m0", "m1", 0.75), ("m0", "m2", 0.55), ("m1", "m2", 0.85)]
    acceptance = [{"draft": lower, "target": upper, "rate": rate} for lower, upper, rate in rates]
    path = tmp_path / "in.json"
    path.write_text(json.dumps({"levels": levels, "acceptance": acceptance}))
    return path


def test_the_best_stack_comes_first_and_is_named(run: Run, figures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    outcome = run("stack", "--from", str(figures), "--json", str(out))
    assert outcome.code == 0
    assert "--draft 'cascade:m0>m1'" in outcome.stderr
    document = json.loads(out.read_text())
    assert document["command"].startswith("paceline stack --from")
    first = document["stacks"][0]
    assert (first["draft"], first["lengths"]) == ("cascade:m0>m1", [4, 9])
    assert first["predicted_speedup"] == pytest.approx(1 / 0.2970, rel=1e-3)
    assert outcome.stdout.index("m0 > m1 > m2") < outcome.stdout.index("m1 > m2  ")
    assert "3.37x" in outcome.stdout
    assert not outcome.settings  # no model was loaded


def test_what_was_written_can_be_read_again(run: Run, figures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    run("stack", "--from", str(figures), "--json", str(out))
    assert run("stack", "--from", str(out)).stderr == "least time a token: --draft 'cascade:m0>m1'\n"


def test_a_missing_file_is_wrong_input(run: Run) -> None:
    outcome = run("stack", "--from", "nowhere.json")
    assert outcome.code == 2
    assert "nowhere.json" in outcome.stderr
