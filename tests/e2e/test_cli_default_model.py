"""The command line with the embedded default model."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from default_model import Launch, finish

PACELINE = ("-m", "paceline")
REPEAT = "Repeat three times: The quick brown fox jumps over the lazy dog."


def answer(launch: Launch, *arguments: str) -> dict[str, Any]:
    done = finish(launch(*PACELINE, "generate", *arguments, "--json"))
    assert done.code == 0, done.stderr
    data: dict[str, Any] = json.loads(done.stdout)
    return data


def test_default_model_answers_with_the_same_tokens_with_and_without_drafts(launch: Launch) -> None:
    arguments = (REPEAT, "--max-tokens", "40")
    plain = answer(launch, *arguments, "--draft", "none")
    default = answer(launch, *arguments)
    fixed = answer(launch, *arguments, "--draft", "ngram", "--controller", "fixed", "--option", "num_draft=8")
    assert "quick brown fox" in plain["text"]
    assert plain["drafted"] == 0
    assert fixed["accepted"] > 0
    assert fixed["rounds"] < fixed["num_tokens"]
    assert default["token_ids"] == plain["token_ids"] == fixed["token_ids"]


def test_seeded_sample_repeats_with_any_draft(launch: Launch) -> None:
    arguments = (REPEAT, "--max-tokens", "24", "--temperature", "0.8", "--seed", "3")
    assert answer(launch, *arguments)["token_ids"] == answer(launch, *arguments, "--draft", "none")["token_ids"]


def test_stdin_is_answered_and_the_closing_line_sums_up(launch: Launch) -> None:
    done = finish(launch(*PACELINE, "generate", "-", "--max-tokens", "8"), b"Name a colour.\n")
    assert done.code == 0
    assert done.stdout.strip()
    assert "tok/s" in done.stderr
    assert "pacer" in done.stderr


def test_interruption_keeps_text_and_statistics(launch: Launch) -> None:
    process = launch(*PACELINE, "generate", "Tell a long story.", "--max-tokens", "1500", "--ignore-eos")
    assert process.stdout is not None
    first = process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    done = finish(process)
    assert done.code == 130
    assert (first.decode() + done.stdout).strip()
    assert "tok/s" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("Hi", "--model", "no/such-model"), "no/such-model"),
        (("Hi", "--draft", "ngrams"), "ngrams"),
        (("Hi", "--controller", "nobody"), "nobody"),
        (("word " * 9000, "--raw"), "context"),
        (("Hi", "--max-tokens", "0"), "max_tokens"),
        (("Hi", "--top-p", "0.5"), "top_p"),
        (("Hi", "--option", "speed=11"), "speed"),
    ],
)
def test_bad_input_is_one_line_that_names_it(launch: Launch, arguments: tuple[str, ...], words: str) -> None:
    done = finish(launch(*PACELINE, "generate", *arguments))
    assert done.code in (1, 2)
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert words in done.stderr


def test_bench_finds_identical_answers_and_writes_its_environment(launch: Launch, tmp_path: Path) -> None:
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.json"
    prompts.write_text("\n".join(json.dumps({"prompt": text}) for text in (REPEAT, "Name a colour.")))
    options = ("--methods", "plain,auto,ngram@fixed", "--max-tokens", "16", "--json", str(out))
    done = finish(launch(*PACELINE, "bench", "--prompts", str(prompts), *options))
    assert done.code == 0, done.stderr
    document = json.loads(out.read_text())
    overall = [row for row in document["results"] if row["category"] == "all"]
    assert [row["method"] for row in overall] == ["plain", "auto", "ngram@fixed"]
    assert all(row["identical_to_plain"] for row in overall)
    assert document["environment"]["runner"]["precision"] in ("fp32", "bf16", "int8", "int4")


def test_explain_and_info_tell_how_the_model_is_run(launch: Launch) -> None:
    explained = finish(launch(*PACELINE, "explain", REPEAT, "--max-tokens", "12"))
    assert explained.code == 0, explained.stderr
    assert "cost of a forward" in explained.stdout
    informed = finish(launch(*PACELINE, "info", "--json"))
    assert json.loads(informed.stdout)["model"]["loaded"] is True


def test_recorded_rounds_can_be_replayed(launch: Launch, tmp_path: Path) -> None:
    prompts, trace, out = tmp_path / "prompts.jsonl", tmp_path / "trace.jsonl", tmp_path / "replay.json"
    prompts.write_text(json.dumps({"prompt": REPEAT}))
    options = ("--controller", "fixed", "--max-tokens", "32", "--prompts", str(prompts))
    assert finish(launch(*PACELINE, "trace", str(trace), *options)).code == 0
    replayed = finish(
        launch(*PACELINE, "replay", "--trace", str(trace), "--controllers", "plain,fixed_4,pacer", "--json", str(out))
    )
    assert replayed.code == 0, replayed.stderr
    assert {row["controller"] for row in json.loads(out.read_text())["results"]} == {"plain", "fixed_4", "pacer"}


def test_a_corpus_of_ones_own_is_built_and_drafted_from(launch: Launch, tmp_path: Path) -> None:
    text, folder = tmp_path / "text.txt", tmp_path / "corpus"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 3)
    built = finish(launch(*PACELINE, "corpus", "build", str(text), "--out", str(folder)))
    assert built.code == 0, built.stderr
    options = ("--draft", f"rest:{folder}", "--controller", "fixed", "--max-tokens", "24", "--json")
    answer = json.loads(finish(launch(*PACELINE, "generate", REPEAT, *options)).stdout)
    assert answer["drafter"] == f"rest:{folder}"
    assert answer["accepted"] > 0


def test_what_the_pacer_learnt_is_kept_only_when_asked(launch: Launch, environment: dict[str, str]) -> None:
    profiles = Path(environment["PACELINE_CACHE"]) / "profiles"
    assert finish(launch(*PACELINE, "generate", REPEAT, "--max-tokens", "16")).code == 0
    assert not profiles.exists()
    assert finish(launch(*PACELINE, "generate", REPEAT, "--max-tokens", "16", "--remember")).code == 0
    (profile,) = profiles.iterdir()
    learnt = json.loads(profile.read_text())
    learnt["chances"]["from an earlier run"] = learnt["chances"]["suffix+tree"]
    profile.write_text(json.dumps(learnt))
    assert finish(launch(*PACELINE, "generate", REPEAT, "--max-tokens", "16", "--remember")).code == 0
    assert "from an earlier run" in profile.read_text()
    profile.write_text("{}")
    assert finish(launch(*PACELINE, "generate", REPEAT, "--max-tokens", "16", "--remember")).code == 0
