"""The script that writes recorded results into the pages."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from scripts import loaded_script

MACHINE = {"machine": {"cpu": "A CPU", "cores": 2, "instruction_sets": ["avx2", "avx512f", "avx512_vnni"]}}
RUNNER = {"model": "default", "runner": {"precision": "int8", "backend": "native", "device": "cpu"}}


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    with loaded_script("make_tables") as module:
        yield module


def in_columns(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {"columns": list(rows[0]), "rows": [list(row.values()) for row in rows]}


def answers(**extra: Any) -> list[dict[str, Any]]:
    """Rows of a plain and a faster method, over all prompts and in one category."""
    return [
        {
            "method": method,
            "category": category,
            "tokens_per_second": speed,
            "speedup_vs_plain": ratio,
            "acceptance_rate": rate,
            "block_efficiency": 1.5,
            "num_identical": 4,
            "num_prompts": 4,
            **extra,
        }
        for category in ("all", "chat")
        for method, speed, ratio, rate in (("plain", 80.04, 1.0, None), ("auto", 120.0, 1.4993, 0.613))
    ]


def bench() -> dict[str, Any]:
    return {
        "environment": MACHINE | RUNNER,
        "command": "paceline bench --methods plain,auto",
        "complete": True,
        "settings": {"sampling": {"temperature": 0.0, "max_tokens": 128}},
        "results": answers(),
    }


def test_readme_shows_headlines_over_all_prompts_only(script: ModuleType) -> None:
    text = script.headlines({"headline-cpu": bench(), "other": bench()})
    assert text.count("| `auto` | 120.0 | 1.50x | 1.50x chat | 61% | 1.50 | 4/4 |") == 1
    assert "by category" not in text
    assert "**headline-cpu**: default, int8 native, A CPU (AVX-512), 2 cores; greedy, at most 128 tokens, 4 prompts" in text


def test_benchmark_page_shows_every_result_with_its_command(script: ModuleType) -> None:
    text = script.all_results({"headline-cpu": bench(), "other": bench()})
    assert text.count("paceline bench --methods plain,auto") == 2
    assert text.count("| `plain` | 80.0 | 1.00x |  |  | 1.50 | 4/4 |") == 2
    assert text.count("<details><summary>by category</summary>\n\n| against plain | chat |\n|---|---|\n| `auto` | 1.50 |") == 2


def test_drafting_page_shows_what_each_drafter_costs(script: ModuleType) -> None:
    costs = {"draft_ms_per_token": 0.0123, "draft_ms_per_round": 0.05, "memory_bytes": 1_600_000, "accounted_vs_plain": 1.25}
    runs = [{"sampling": {"temperature": t, "max_tokens": 64}, "results": in_columns(answers(**costs))} for t in (0.0, 1.0)]
    left_out = {"rest": "needs a corpus", "uag": "needs a model", "tli": "needs a model"}
    whole = {"environment": MACHINE | RUNNER, "command": "drafters.py", "runs": runs, "left_out": left_out}
    text = script.all_drafters({"drafters": whole})
    assert text.count("| `auto` | 1.50 | 0.012 | 0.050 | 120.0 | 1.50x | 1.50x chat | 1.25x | 1.25x chat | 4/4 | 1.6 |") == 2
    assert "Not measured: `uag`, `tli` (needs a model)" in text
    assert "| accounted | chat |\n|---|---|\n| `auto` | 1.25 |" in text
    assert "greedy, at most 64 tokens" in text
    assert "temperature 1, at most 64 tokens" in text
    assert "| against plain | chat |\n|---|---|\n| `auto` | 1.50 |" in text
    assert "Not measured: `rest` (needs a corpus)" in text
    assert script.all_results({"drafters": whole}) == script.NOTHING


def test_controllers_stand_in_the_order_of_their_speed_with_their_worst_category(script: ModuleType) -> None:
    rows = answers(speed_vs_best_fixed=0.9, accounted_vs_plain=1.1, accounted_vs_best_fixed=0.95, accounted_tokens_per_second=100.0)
    rows[1] |= {"accounted_tokens_per_second": 110.0}
    rows[-1] |= {"speed_vs_best_fixed": 0.7, "accounted_vs_plain": 0.8, "accounted_vs_best_fixed": 0.75}
    run = {"temperature": 1.0, "results": rows, "controller_share_of_round": {"auto": 0.0123}}
    whole = {"environment": MACHINE | RUNNER, "command": "controllers.py", "draft": "ngram", "max_tokens": 64, "runs": [run]}
    text = script.all_results({"controllers-ngram": whole})
    assert (
        "| `auto` | 120.0 | 1.50x | 0.70x chat | 1.10x | 0.80x chat | 0.95x | 0.75x chat | 1.2% |\n"
        "| `plain` | 80.0 | 1.00x | 0.90x chat | 1.10x |  | 0.95x | 0.95x chat |  |" in text
    )
    assert "temperature 1, at most 64 tokens, 4 prompts; drafts of `ngram`" in text


def test_of_many_controllers_the_first_and_the_references_are_shown_and_the_others_folded(script: ModuleType) -> None:
    names = [*(f"c{i}" for i in range(8)), "fixed_4", "fixed_2", "plain", "pacer"]
    rows = [
        {**answers()[0], "method": name, "tokens_per_second": 100.0 - i, "accounted_tokens_per_second": None}
        for i, name in enumerate(names)
    ]
    run = {"temperature": 0.0, "results": rows, "controller_share_of_round": {}}
    whole = {"environment": MACHINE | RUNNER, "command": "controllers.py", "draft": "ngram", "max_tokens": 64, "runs": [run]}
    shown, _, rest = script.all_results({"controllers-ngram": whole}).partition("<details>")
    assert [name for name in names if f"`{name}`" in shown] == ["c0", "c1", "c2", "c3", "c4", "fixed_4", "plain", "pacer"]
    assert rest.startswith("<summary>the other 4</summary>")
    assert [name for name in names if f"`{name}`" in rest] == ["c5", "c6", "c7", "fixed_2"]


def test_answers_that_differ_are_counted_with_their_margin(script: ModuleType) -> None:
    results = [
        {"precision": "int4", "draft": "auto", "controller": "pacer", "num_prompts": 9, "num_identical": 9},
        *({"precision": "int4", "draft": "a|b", "num_draft": k, "num_prompts": 4, "num_identical": 3} for k in (1, 8)),
        {"precision": "fp32", "draft": "self", "num_draft": 1, "num_prompts": 0, "num_identical": 0, "left_out": "no gain"},
    ]
    results.append(results[1] | {"num_draft": 2})  # another part of the matrix: the same line
    differences = [{"top2_margin": 0.25}, {"top2_margin": 0.001}]
    whole = {"environment": MACHINE, "command": "identity.py", "compared": 17, "identical": 15, "results": results}
    text = script.all_results({"identity-cpu": whole | {"differences": differences}})
    assert "15 of 17 greedy answers have the ids of plain decoding; " in text
    assert "at most 0.25 apart" in text
    assert "| int4 | `auto` | pacer | 9 | 9 |\n| int4 | `a\\|b` | 1, 2, 8 | 12 | 9 |" in text
    assert "Not measured: `self in fp32` (no gain)" in text
    assert "apart" not in script.all_results({"identity-cpu": whole | {"differences": []}})


def test_promises_of_cost_are_shown(script: ModuleType) -> None:
    start = {"load_seconds": 2.0, "first_token_seconds": 2.5, "peak_memory_gb": 0.5, "weight_mb": 96.0, "pacer_microseconds": 40.0}
    start |= {"pacer_share": 0.002, "precision": "int4", "backend": "native"}
    common = {"environment": MACHINE, "command": "a script"}
    footprint = common | {"cold": start | {"load_seconds": 15.0}, "runs": [start] * 3, "median": start}
    seconds = {"plain_seconds": 10.0, "hopeless_seconds": 10.08, "ratio": 1.008, "median_ratio": 1.01}
    hopeless = (
        common | seconds | {"precision": "int4", "num_prompts": 13, "tokens_each": 256, "drafted": 9, "results": [{"plain": [1]}]}
    )
    text = script.all_results({"footprint": footprint, "hopeless-draft": hopeless})
    assert "| first, empty cache | 15.00 | 2.50 | 0.50 | 96.0 | 40 | 0.20% |" in text
    assert "| later ones (median of 3) | 2.00 | 2.50 |" in text
    assert "| 13 | 256 | 10.00 | 10.08 | 1.008x | 1.010x | 9 |" in text


def test_replayed_controllers_are_summed_up_over_regimes(script: ModuleType) -> None:
    rows = [
        {
            "regime": regime,
            "controller": controller,
            "speedup_vs_plain": speed,
            "regret_vs_best_fixed": 0.1,
            "regret_vs_best_k_in_hindsight": 0.5,
            "controller_us_per_round": 3.0,
        }
        for controller, speeds in (("plain", (1.0, 1.0)), ("pacer", (1.0, 4.0)))
        for regime, speed in zip(("low", "high"), speeds, strict=True)
    ]
    text = script.all_results({"replay": {"command": "paceline replay", "results": rows}})
    assert "2 synthetic regimes" in text
    assert "| `pacer` | 2.00x | 1.00x | +10.0% | +50.0% | 3.0 |\n| `plain` | 1.00x |" in text


def test_any_other_list_of_plain_values_is_shown_as_it_is(script: ModuleType) -> None:
    rows = [{"precision": "int4", "rows": 8, "pass_ms": 6.97712}, {"precision": "bf16", "rows": 8, "pass_ms": None}]
    document = {"environment": MACHINE, "command": "glue.py", "results": rows}
    text = script.all_results({"glue-cpu": document, "nested": document | {"results": [{"seconds": [1, 2]}]}})
    assert "| precision | rows | pass ms |\n|---|---|---|\n| int4 | 8 | 6.977 |\n| bf16 | 8 |  |" in text
    assert "nested" not in text


def test_unfinished_results_are_left_out(script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(script, "RESULTS", tmp_path)
    (tmp_path / "whole.json").write_text(json.dumps(bench()))
    (tmp_path / "part.json").write_text(json.dumps(bench() | {"complete": False}))
    assert list(script.recorded()) == ["whole"]


def test_only_the_part_between_the_markers_changes(script: ModuleType) -> None:
    page = f"before\n{script.BEGIN}\nold\n{script.END}\nafter"
    assert script.filled(page, "new \\1") == f"before\n{script.BEGIN}\nnew \\1\n{script.END}\nafter"
    with pytest.raises(SystemExit, match="lacks the markers"):
        script.filled("no markers", "new")


def test_without_results_the_pages_say_so(script: ModuleType) -> None:
    assert script.headlines({}) == script.all_results({}) == script.all_drafters({}) == script.NOTHING
