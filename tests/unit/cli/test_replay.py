"""`paceline replay`: a table on the terminal, rows in the file."""

from __future__ import annotations

import json
from pathlib import Path

from command_line import Run


def test_rows_are_written_and_summed_up_by_controller(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "replay.json"
    outcome = run("replay", "--regimes", "high", "--controllers", "plain,fixed_4", "--tokens", "60", "--json", str(out))
    assert outcome.code == 0
    document = json.loads(out.read_text())
    assert {row["controller"] for row in document["results"]} == {"plain", "fixed_4"}
    assert document["command"].startswith("paceline replay")
    assert "fixed_4" in outcome.stdout
    assert "1.000x" in outcome.stdout


def test_unknown_regime_is_refused(run: Run) -> None:
    outcome = run("replay", "--regimes", "nowhere")
    assert outcome.code == 2
    assert "regimes = 'nowhere': unknown" in outcome.stderr
