"""`paceline train ngrams` over toy engines."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer

import paceline
from command_line import Run
from paceline.cli import loading
from paceline.cli.main import app
from paceline.cli.options import Settings
from paceline.cli.train import CONVERSATIONS
from paceline.drafting.ngram_table import load_table, vocabulary_digest
from paceline.errors import ResourceError
from paceline.models import resolve
from paceline.training.ngram_table import TableOptions
from paceline.training.self_talk import TURN_TOKENS, TalkOptions
from tiny_models import TEMPLATE, byte_level_tokenizer
from unit.training.talkers import Listening, make_talker

TOKENIZER = byte_level_tokenizer(TEMPLATE)


@pytest.fixture
def seen() -> list[Settings]:
    return []


@pytest.fixture
def talker(run: Run, seen: list[Settings], monkeypatch: pytest.MonkeyPatch) -> Listening:
    """The engine that the command loads instead of a model."""
    engine = make_talker()

    def load(settings: Settings, console: object) -> Listening:
        seen.append(settings)
        return engine

    monkeypatch.setattr(loading, "load_engine", load)
    monkeypatch.setattr(resolve, "open_model", lambda name: SimpleNamespace(tokenizer=TOKENIZER))
    return engine


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    """Three answers of two tokens each: 5 follows 4."""
    path = tmp_path / "answers.jsonl"
    path.write_text('{"tokens": [3, 4, 5], "first": 1}\n' * 3)
    return path


def test_conversations_become_a_table_that_a_target_of_this_vocabulary_can_use(run: Run, talker: Listening, tmp_path: Path) -> None:
    out = tmp_path / "new folder" / "table.npz"
    outcome = run("train", "ngrams", "--out", str(out), "--conversations", "30", "--precision", "int8")
    assert (outcome.code, outcome.stdout) == (0, "")
    table = load_table(out)
    assert table.vocabulary == vocabulary_digest(TOKENIZER)
    assert table.orders == 4
    last = outcome.stderr.strip().splitlines()[-1]
    assert last.startswith(f"{len(table.checks)} contexts, {out.stat().st_size} bytes, of ")
    assert last.endswith(f"tokens in 30 answers: {out}; use it with --draft suffix+tree --drafter-option 'suffix.table={out}'")


def test_the_model_talks_without_drafts_and_as_the_options_say(
    run: Run, talker: Listening, seen: list[Settings], tmp_path: Path
) -> None:
    out = str(tmp_path / "a.npz")
    assert run("train", "ngrams", "--out", out, "--conversations", "4", "--min-count", "1", "--precision", "int8").code == 0
    (settings,) = seen
    assert (settings.speculation.draft, settings.runner.precision) == ("none", "int8")
    assert sum(len(prompts) * said.n for prompts, said in talker.asked if said.max_tokens == TURN_TOKENS) == 4


def test_the_table_is_as_the_options_say(run: Run, talker: Listening, tmp_path: Path) -> None:
    out = tmp_path / "a.npz"
    options = ("--conversations", "30", "--orders", "2", "--min-count", "2", "--max-contexts", "5")
    assert run("train", "ngrams", "--out", str(out), *options).code == 0
    assert load_table(out).orders == 2
    assert len(load_table(out).checks) == 5


def test_saved_answers_count_again_to_the_same_table(run: Run, talker: Listening, tmp_path: Path) -> None:
    first, second, kept = tmp_path / "a.npz", tmp_path / "b.npz", tmp_path / "kept.jsonl"
    assert run("train", "ngrams", "--out", str(first), "--conversations", "30", "--save-answers", str(kept)).code == 0
    asked = len(talker.asked)
    assert run("train", "ngrams", "--out", str(second), "--answers", str(kept)).code == 0
    assert len(talker.asked) == asked  # no conversations beside answers that are given
    assert first.read_bytes() == second.read_bytes()


def test_answers_need_no_engine(run: Run, talker: Listening, seen: list[Settings], lines: Path, tmp_path: Path) -> None:
    outcome = run("train", "ngrams", "--out", str(tmp_path / "a.npz"), "--answers", str(lines), "--answers", str(lines))
    assert outcome.code == 0
    assert "of 12 tokens in 6 answers" in outcome.stderr
    assert seen == []
    assert [token for token, _ in load_table(tmp_path / "a.npz").after([4])] == [5]


def test_answers_and_conversations_are_counted_together(run: Run, talker: Listening, lines: Path, tmp_path: Path) -> None:
    outcome = run("train", "ngrams", "--out", str(tmp_path / "a.npz"), "--answers", str(lines), "--conversations", "10")
    assert outcome.code == 0
    assert "in 13 answers" in outcome.stderr


def test_an_interruption_counts_what_is_there(run: Run, talker: Listening, tmp_path: Path) -> None:
    out, kept = tmp_path / "a.npz", tmp_path / "kept.jsonl"
    talker.interrupt_at = 6  # while the second thirty are answered
    outcome = run("train", "ngrams", "--out", str(out), "--conversations", "90", "--save-answers", str(kept))
    assert outcome.code == 130
    assert "interrupted: counting the 30 answers so far" in outcome.stderr
    assert "tokens in 30 answers" in outcome.stderr
    assert load_table(out).vocabulary == vocabulary_digest(TOKENIZER)
    assert len(kept.read_text().splitlines()) == 30


def test_an_interruption_before_the_first_answer_writes_nothing(run: Run, talker: Listening, tmp_path: Path) -> None:
    talker.interrupt_at = 0
    outcome = run("train", "ngrams", "--out", str(tmp_path / "a.npz"))
    assert (outcome.code, outcome.stderr) == (130, "interrupted before the first answer: nothing to count\n")
    assert not (tmp_path / "a.npz").exists()


def test_an_interruption_with_too_little_to_count_still_ends_as_interrupted(run: Run, talker: Listening, tmp_path: Path) -> None:
    talker.interrupt_at = 4
    outcome = run("train", "ngrams", "--out", str(tmp_path / "a.npz"), "--conversations", "90", "--min-count", "999")
    assert outcome.code == 130
    assert "note: no table was written: --min-count 999: no context was counted so often in 30 answers" in outcome.stderr
    assert not (tmp_path / "a.npz").exists()


def test_an_error_in_the_middle_counts_what_is_there_and_is_told(
    run: Run, talker: Listening, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = talker.generate

    def fail_later(*arguments: object, **settings: object) -> object:
        if len(talker.asked) == 4:
            raise ResourceError("memory: ran out")
        return ask(*arguments, **settings)

    monkeypatch.setattr(talker, "generate", fail_later)
    outcome = run("train", "ngrams", "--out", str(tmp_path / "a.npz"), "--conversations", "90")
    assert outcome.code == 1
    assert "tokens in 30 answers" in outcome.stderr
    assert outcome.stderr.endswith("error: memory: ran out\n")
    assert (tmp_path / "a.npz").exists()


@pytest.mark.parametrize("option", ["--out", "--save-answers"])
def test_a_file_that_cannot_be_written_is_refused_before_the_work(run: Run, talker: Listening, option: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for target in (tmp_path, tmp_path / "file" / "table.npz"):
        places = {"--out": tmp_path / "good.npz", option: target}
        outcome = run("train", "ngrams", *(word for pair in places.items() for word in map(str, pair)))
        assert outcome.code == 2
        assert outcome.stderr.startswith(f"error: {option} {str(target)!r}: ")
        assert outcome.stderr.count("\n") == 1
    assert talker.asked == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--conversations", "0"), "--conversations 0: leaves nothing"),
        (("--orders", "9"), "orders = 9"),
        (("--min-count", "0"), "min_count = 0"),
        (("--max-contexts", "0"), "max_contexts = 0"),
        (("--seed", "-1"), "seed = -1"),
        (("--answers", "nowhere.jsonl"), "nowhere.jsonl"),
        (("--answers", "ANSWERS", "--save-answers", "new.jsonl"), "no conversations to keep"),
        (("--answers", "ANSWERS", "--save-answers", "ANSWERS", "--conversations", "9"), "is read by --answers, too"),
        (("--answers", "ANSWERS", "--min-count", "4"), "--min-count 4: no context was counted so often in 3 answers"),
    ],
)
def test_input_that_makes_no_sense_is_one_line_and_loads_nothing(
    run: Run, talker: Listening, seen: list[Settings], lines: Path, arguments: tuple[str, ...], words: str, tmp_path: Path
) -> None:
    given = [str(lines) if argument == "ANSWERS" else argument for argument in arguments]
    outcome = run("train", "ngrams", "--out", str(tmp_path / "a.npz"), *given)
    assert outcome.code == 2
    assert outcome.stderr.startswith("error: ")
    assert outcome.stderr.count("\n") == 1
    assert words in outcome.stderr
    assert seen == []
    assert not (tmp_path / "a.npz").exists()
    assert len(lines.read_text().splitlines()) == 3


def test_a_model_without_chat_template_is_told_of_answers(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(loading, "load_engine", lambda settings, console: make_talker(template=None))
    outcome = run("train", "ngrams", "--out", str(tmp_path / "a.npz"))
    assert outcome.code == 2
    assert "no chat template" in outcome.stderr
    assert "--answers" in outcome.stderr


def test_defaults_are_those_of_the_library() -> None:
    group = typer.main.get_command(app).commands["train"]  # type: ignore[attr-defined]
    defaults = {parameter.name: parameter.default for parameter in group.commands["ngrams"].params}
    table, talk = TableOptions(), TalkOptions()
    for name in ("orders", "min_count", "max_contexts"):
        assert defaults[name] == getattr(table, name)
    assert (CONVERSATIONS, defaults["seed"]) == (talk.conversations, talk.seed)


def test_groups_show_their_help(run: Run) -> None:
    assert "ngrams" in run("train").stdout
    assert "--max-contexts" in run("train", "ngrams", "--help").stdout


def test_the_page_names_every_option_of_the_command_and_no_other() -> None:
    group = typer.main.get_command(app).commands["train"]  # type: ignore[attr-defined]
    options = {name for parameter in group.commands["ngrams"].params for name in parameter.opts if name.startswith("--")}
    page = (Path(paceline.__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    shared = {"--device", "--backend", "--threads", "--max-context", "--memory-gb", "--precision", "--help"}
    foreign = {"--draft", "--drafter-option"}
    named = set(re.findall(r"(?<!\S)`?(--[a-z-]+)", page))
    assert named - foreign <= options
    assert options - shared <= named


def test_saved_answers_are_lines_of_tokens(run: Run, talker: Listening, tmp_path: Path) -> None:
    kept = tmp_path / "kept.jsonl"
    run("train", "ngrams", "--out", str(tmp_path / "a.npz"), "--conversations", "30", "--save-answers", str(kept))
    rows = [json.loads(line) for line in kept.read_text().splitlines()]
    assert all(set(row) <= {"tokens", "first", "likeliest"} for row in rows)
    assert {"likeliest" in row for row in rows} == {True, False}
