"""`paceline trace`: one whole file, no text in it."""

from __future__ import annotations

import json
from pathlib import Path

from command_line import Run
from fake_engine import FakeEngine
from paceline.study.trace import Survey, Tracing, read_trace


def test_rounds_of_every_prompt_go_through_the_recording_controller(run: Run, engine: FakeEngine, tmp_path: Path) -> None:
    prompts, out = tmp_path / "set.jsonl", tmp_path / "trace.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt": text}) for text in ("secret one", "two")))
    outcome = run("trace", str(out), "--prompts", str(prompts), "--raw")
    assert outcome.code == 0
    assert [text for text, _, _ in engine.calls] == ["secret one", "two"]
    assert isinstance(engine.controller, Tracing)
    header, *_ = out.read_text().splitlines()
    assert json.loads(header)["controller"] == "pacer"
    assert "secret" not in out.read_text()


def test_an_interrupted_recording_says_where_its_rounds_are(run: Run, engine: FakeEngine, tmp_path: Path) -> None:
    prompts, out = tmp_path / "set.jsonl", tmp_path / "trace.jsonl"
    prompts.write_text(json.dumps({"prompt": "one long prompt"}))
    engine.interrupt_after = 1
    outcome = run("trace", str(out), "--prompts", str(prompts), "--raw")
    assert outcome.code == 130
    assert not out.exists()
    assert f"{out}.part" in outcome.stderr
    assert read_trace(f"{out}.part").controller == "pacer"


def test_survey_decides_in_the_controllers_place(run: Run, engine: FakeEngine, tmp_path: Path) -> None:
    prompts, out = tmp_path / "set.jsonl", tmp_path / "trace.jsonl"
    prompts.write_text(json.dumps({"prompt": "one"}))
    assert run("trace", str(out), "--prompts", str(prompts), "--survey").code == 0
    assert json.loads(out.read_text().splitlines()[0])["controller"] == "survey"
    assert isinstance(engine.controller, Tracing)
    assert isinstance(engine.controller.inner, Survey)


def test_file_of_another_kind_is_refused(run: Run, tmp_path: Path) -> None:
    outcome = run("trace", str(tmp_path / "trace.txt"))
    assert outcome.code == 2
    assert "name it .jsonl or .parquet" in outcome.stderr
