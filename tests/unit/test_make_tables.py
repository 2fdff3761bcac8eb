"""The script that writes recorded results into the pages."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import paceline


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = Path(paceline.__file__).parents[2] / "benchmarks" / "make_tables.py"
    spec = importlib.util.spec_from_file_location("make_tables", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def document() -> dict[str, Any]:
    rows = [
        {
            "method": method,
            "category": category,
            "tokens_per_second": speed,
            "speedup_vs_plain": ratio,
            "acceptance_rate": rate,
            "block_efficiency": 1.5,
            "num_identical": 4,
            "num_prompts": 4,
        }
        for category in ("all", "chat")
        for method, speed, ratio, rate in (("plain", 80.04, 1.0, None), ("auto", 120.0, 1.4993, 0.613))
    ]
    return {
        "environment": {
            "machine": {"cpu": "A CPU", "cores": 2},
            "model": "default",
            "runner": {"precision": "int8", "backend": "native", "device": "cpu"},
        },
        "command": "paceline bench --methods plain,auto",
        "complete": True,
        "settings": {"sampling": {"temperature": 0.0, "max_tokens": 128}},
        "results": rows,
    }


def test_readme_shows_headlines_over_all_prompts_only(script: ModuleType) -> None:
    text = script.sections({"headline-cpu": document(), "other": document()}, long=False)
    assert text.count("| all | `auto` | 120.0 | 1.50x | 61% | 1.50 | 4/4 |") == 1
    assert "chat" not in text
    assert "**headline-cpu**: default, int8 native, A CPU, 2 cores; greedy, at most 128 tokens, 4 prompts" in text


def test_benchmark_page_shows_every_result_with_its_command(script: ModuleType) -> None:
    text = script.sections({"headline-cpu": document(), "other": document()}, long=True)
    assert text.count("paceline bench --methods plain,auto") == 2
    assert text.count("| chat | `plain` | 80.0 | 1.00x |  | 1.50 | 4/4 |") == 2


def test_drafting_page_shows_what_each_drafter_costs(script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(script, "RESULTS", tmp_path)
    assert script.drafter_sections() == script.NOTHING
    costs = {"draft_ms_per_token": 0.0123, "draft_ms_per_round": 0.05, "memory_bytes": 1_600_000}
    found = document()
    runs = [
        {"sampling": {"temperature": t, "max_tokens": 64}, "results": [row | costs for row in found["results"]]} for t in (0.0, 1.0)
    ]
    whole = {key: found[key] for key in ("environment", "command", "complete")}
    whole |= {"runs": runs, "left_out": {"rest": "needs a corpus"}}
    (tmp_path / "drafters.json").write_text(json.dumps(whole))
    text = script.drafter_sections()
    assert text.count("| `auto` | 1.50 | 0.012 | 0.050 | 120.0 | 1.50x | 4/4 | 1.6 |") == 2
    assert "greedy, at most 64 tokens" in text
    assert "temperature 1, at most 64 tokens" in text
    assert "| against plain | chat |\n|---|---|\n| `auto` | 1.50 |" in text
    assert "Not measured: `rest` (needs a corpus)" in text
    assert not script.documents()
    (tmp_path / "drafters.json").write_text(json.dumps(whole | {"complete": False}))
    assert script.drafter_sections() == script.NOTHING


def test_only_the_part_between_the_markers_changes(script: ModuleType) -> None:
    page = f"before\n{script.BEGIN}\nold\n{script.END}\nafter"
    assert script.filled(page, "new \\1") == f"before\n{script.BEGIN}\nnew \\1\n{script.END}\nafter"
    with pytest.raises(SystemExit, match="lacks the markers"):
        script.filled("no markers", "new")


def test_without_results_the_page_says_so(script: ModuleType) -> None:
    assert script.sections({}, long=True) == script.NOTHING
