"""`paceline bench`: its result document, interruption, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from command_line import Run
from fake_engine import FakeEngine


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    path = tmp_path / "set.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"prompt {c}", "category": c}) for c in "ab"))
    return str(path)


def test_document_has_environment_command_and_a_row_for_each_method_and_category(run: Run, prompts: str, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    outcome = run("bench", "--prompts", prompts, "--methods", "plain,auto", "--json", str(out), "--raw", "--max-tokens", "8")
    assert outcome.code == 0
    document = json.loads(out.read_text())
    assert list(document)[:2] == ["environment", "command"]
    assert document["complete"] is True
    assert document["command"].startswith("paceline bench --prompts")
    assert {(row["method"], row["category"]) for row in document["results"]} == {
        (method, category) for method in ("plain", "auto") for category in ("all", "a", "b")
    }
    auto = next(row for row in document["results"] if (row["method"], row["category"]) == ("auto", "all"))
    assert auto["speedup_vs_plain"] == pytest.approx(2.0)
    assert auto["identical_to_plain"] is True
    assert auto["acceptance_rate"] == pytest.approx(1.0)
    assert document["environment"]["runner"]["backend"] == "fake"
    assert document["settings"]["sampling"]["max_tokens"] == 8
    assert len(document["prompts"]) == 4
    assert "2.00x" in outcome.stdout


def test_chat_template_is_applied_unless_raw(run: Run, prompts: str, engine: FakeEngine) -> None:
    run("bench", "--prompts", prompts, "--methods", "plain", "--limit", "1", "--warm-up", "0")
    assert engine.calls[0][0] == "<user>prompt a"


def test_interruption_keeps_the_answers_so_far(run: Run, prompts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = []
    generate = FakeEngine.generate

    def interrupted(self: FakeEngine, *arguments: object, **options: object) -> object:
        answers.append(1)
        if len(answers) == 6:
            raise KeyboardInterrupt
        return generate(self, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(FakeEngine, "generate", interrupted)
    out = tmp_path / "out.json"
    outcome = run("bench", "--prompts", prompts, "--json", str(out))
    assert outcome.code == 130
    document = json.loads(out.read_text())
    assert document["complete"] is False
    assert len(document["prompts"]) == 3
    assert "interrupted after 3 answers" in outcome.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "plain,plain"], "each once"),
        (["--methods", ""], "name at least one"),
        (["--methods", "ngram@"], "write DRAFT"),
        (["--prompts", "absent.jsonl"], "No such file"),
        (["-n", "2", "--temperature", "1"], "bench times single answers"),
        (["--json", "."], "is a folder"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(run: Run, arguments: list[str], message: str) -> None:
    outcome = run("bench", *arguments)
    assert outcome.code == 2
    assert outcome.stderr.startswith("error: ")
    assert message in outcome.stderr
