"""The other commands, and how errors end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from command_line import Run
from fake_engine import FakeEngine
from paceline._version import __version__
from paceline.cli import loading
from paceline.cli.main import app
from paceline.errors import ModelError


def test_every_command_has_help(run: Run) -> None:
    for command in app.registered_commands:
        assert command.callback is not None
        outcome = run(command.callback.__name__, "--help")
        assert outcome.code == 0
        assert "Usage" in outcome.stdout


def test_version(run: Run) -> None:
    assert run("--version").stdout.strip() == __version__


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("generate", "hi", "--tempurature", "1"), "--tempurature"),
        (("generate", "hi", "--seed", "x"), "--seed"),
        (("generate", "hi", "there"), "there"),
        (("explain", "hi", "--rounds", "0"), "--rounds"),
        (("genrate", "hi"), "genrate"),
        (("trace",), "out"),
    ],
)
def test_arguments_that_make_no_sense_are_one_line_that_names_them(run: Run, arguments: tuple[str, ...], named: str) -> None:
    outcome = run(*arguments)
    assert (outcome.code, outcome.stdout, outcome.stderr.count("\n")) == (2, "", 1)
    assert outcome.stderr.startswith("error: ")
    assert named in outcome.stderr.lower()
    assert "--help` lists" in outcome.stderr


@pytest.mark.parametrize("group", [(), ("corpus",)])
def test_no_arguments_show_the_help(run: Run, group: tuple[str, ...]) -> None:
    outcome = run(*group)
    assert "Usage: paceline" in outcome.stdout
    assert not outcome.stderr


def test_model_that_cannot_be_loaded_is_one_line_and_exit_code_1(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(settings: object, console: object) -> None:
        raise ModelError("model 'nowhere': no such folder;\n  give a folder")

    monkeypatch.setattr(loading, "load_engine", refuse)
    outcome = run("generate", "hi", "--model", "nowhere")
    assert (outcome.code, outcome.stderr) == (1, "error: model 'nowhere': no such folder; give a folder\n")


def test_fault_of_ours_is_one_line_unless_debug_is_asked(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(settings: object, console: object) -> None:
        raise KeyError("lost")

    monkeypatch.setattr(loading, "load_engine", fail)
    outcome = run("generate", "hi")
    assert outcome.code == 1
    assert outcome.stderr.startswith("error: KeyError: 'lost' (a fault of paceline")
    with pytest.raises(KeyError):
        run("--debug", "generate", "hi")


def test_chat_keeps_the_turns_and_its_commands_work(run: Run, engine: FakeEngine) -> None:
    outcome = run("chat", "--system", "s", stdin=b"one\n\n/stats\n/what\n/reset\ntwo\n/quit\nthree\n")
    assert outcome.code == 0
    assert [text for text, _, _ in engine.calls] == ["<system>s<user>one", "<system>s<user>two"]
    assert "1 answers, 18 tokens" in outcome.stderr
    assert "unknown command /what" in outcome.stderr


def test_chat_sends_the_answer_with_the_next_turn(run: Run, engine: FakeEngine) -> None:
    run("chat", stdin=b"one\ntwo\n")
    assert engine.calls[1][0] == "<user>one<assistant><USER>ONE<user>two"


def test_chat_turn_that_does_not_fit_is_dropped(run: Run, engine: FakeEngine) -> None:
    outcome = run("chat", stdin=b"one\n" + b"x" * 500 + b"\ntwo\n")
    assert "error: prompt is" in outcome.stderr
    assert engine.calls[2][0] == "<user>one<assistant><USER>ONE<user>two"


def test_chat_goes_on_after_an_interrupted_answer(run: Run, engine: FakeEngine) -> None:
    engine.interrupt_after = 1
    outcome = run("chat", stdin=b"one\n/stats\n")
    assert outcome.code == 0
    assert "1 answers, 4 tokens" in outcome.stderr


def test_explain_shows_rounds_with_reasons_and_costs(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    outcome = run("explain", "abcdefgh", "--raw", "--rounds", "1")
    assert outcome.stdout.count("pays [0.9]") == 1
    assert "1 more rounds" in outcome.stdout
    assert "cost of a forward" in outcome.stdout
    assert "ngram: 0.100 ms a round" in outcome.stdout


def test_an_interrupted_explanation_shows_the_rounds_so_far(run: Run, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    engine.interrupt_after = 1
    outcome = run("explain", "abcdefghijkl", "--raw")
    assert outcome.code == 130
    assert outcome.stdout.count("pays [0.9]") == 1
    assert "4 tokens" in outcome.stderr


def test_explain_shows_the_calibration_of_controllers_that_keep_one(run: Run, engine: FakeEngine) -> None:
    assert "calibration" not in run("explain", "abcd", "--raw").stdout
    engine.controller.calibration = lambda: [{"drafter": "model:x", "predicted": 0.75, "accepted": 0.7125, "labels": 40}]
    shown = run("explain", "abcd", "--raw").stdout
    assert "calibration" in shown
    assert "0.7125" in shown


def test_explain_draws_the_calibration_after_its_tables(run: Run, engine: FakeEngine, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    refused = run("explain", "abcd", "--raw", "--plot", str(tmp_path / "none.png"))
    assert refused.code == 2
    assert "cost of a forward" in refused.stdout
    assert "no draft stated its confidence" in refused.stderr
    engine.controller.calibration = lambda: [{"drafter": "model:x", "predicted": 0.75, "accepted": 0.7125, "labels": 40}]
    assert run("explain", "abcd", "--raw", "--plot", str(tmp_path / "reliability.png")).code == 0
    assert (tmp_path / "reliability.png").read_bytes().startswith(b"\x89PNG")


def test_explain_json_carries_steps_and_costs(run: Run) -> None:
    data = json.loads(run("explain", "abcdefgh", "--raw", "--json").stdout)
    assert [step["num_accepted"] for step in data["steps"]] == [3, 3]
    assert data["cost_curve"][0] == {"rows": 1, "seconds": pytest.approx(0.01), "against_plain": pytest.approx(1.0)}
    assert data["costs"]["rows"] == [1, 4]


def test_info_tells_fast_paths_and_lost_ones(run: Run) -> None:
    facts = json.loads(run("info", "--json").stdout)
    assert facts["model"]["fast_paths"] == ["one"]
    assert facts["model"]["lost_paths"] == ["two: not here"]
    assert facts["versions"]["paceline"] == __version__
    assert facts["machine"]["cores"] >= 1


def test_info_survives_a_model_that_cannot_be_loaded(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(settings: object, console: object) -> None:
        raise ModelError("model 'x': missing")

    monkeypatch.setattr(loading, "load_engine", refuse)
    outcome = run("info", "--json")
    assert outcome.code == 0
    assert json.loads(outcome.stdout)["model"]["error"] == "model 'x': missing"


@pytest.mark.parametrize(("command", "expected"), [("controllers", "pacer"), ("drafters", "ngram")])
def test_lists_come_from_the_registries(run: Run, command: str, expected: str) -> None:
    rows = json.loads(run(command, "--json").stdout)[command]
    assert expected in [row["name"] for row in rows]
    assert all(row["summary"] for row in rows)
    assert expected in run(command).stdout


def bench_file(tmp_path: Path, name: str, speed: float) -> str:
    path = tmp_path / name
    path.write_text(json.dumps({"results": [{"method": "auto", "category": "all", "tokens_per_second": speed}]}))
    return str(path)


def test_compare_prints_ratios_and_fails_under_a_limit(run: Run, tmp_path: Path) -> None:
    before, after = bench_file(tmp_path, "a.json", 100.0), bench_file(tmp_path, "b.json", 90.0)
    outcome = run("compare", before, after)
    assert outcome.code == 0
    assert "0.900" in outcome.stdout
    assert run("compare", before, after, "--fail-under", "0.95").code == 1
    assert run("compare", before, after, "--fail-under", "0.9").code == 0


def test_compare_refuses_what_is_no_result(run: Run, tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    other.write_text("[]")
    outcome = run("compare", str(other), str(other))
    assert outcome.code == 2
    assert "holds no `results`" in outcome.stderr


def test_closed_pipe_is_quiet() -> None:
    program = "import sys; sys.argv = ['paceline', 'controllers', '--json']; from paceline.cli.main import run; run()"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
