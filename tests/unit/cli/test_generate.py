"""`paceline generate`: what it prints, what reaches the engine, what it refuses."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from command_line import Run
from fake_engine import FakeEngine
from paceline.config import RunnerConfig, SamplingParams, SpeculationConfig
from paceline.errors import CacheError
from paceline.models.cachedir import cache_error

JSON_FIELDS = [
    *("text", "token_ids", "num_tokens", "tokens_per_second", "plain_tokens_per_second", "rounds", "drafted", "accepted"),
    *("drafter", "controller", "finish_reason"),
]


def test_streams_the_answer_to_stdout_and_the_summary_to_stderr(run: Run) -> None:
    outcome = run("generate", "abcdefgh", "--raw")
    assert outcome.code == 0
    assert outcome.stdout == "ABCDEFGH\n"
    assert (
        outcome.stderr.strip() == "8 tokens, 200.0 tok/s, 2.00x plain, 100% of 6 drafted tokens accepted (ngram, pacer); fp32 fake"
    )


def test_json_is_one_object_with_the_documented_fields_first(run: Run) -> None:
    outcome = run("generate", "abcdefgh", "--raw", "--json")
    data = json.loads(outcome.stdout)
    assert list(data)[: len(JSON_FIELDS)] == JSON_FIELDS
    assert data["text"] == "ABCDEFGH"
    assert data["token_ids"] == [ord(c) for c in "ABCDEFGH"]
    assert (data["num_tokens"], data["rounds"], data["drafted"], data["accepted"]) == (8, 2, 6, 6)
    assert (data["drafter"], data["controller"], data["finish_reason"]) == ("ngram", "pacer", "stop")
    assert data["tokens_per_second"] == pytest.approx(200.0)
    assert data["plain_tokens_per_second"] == pytest.approx(100.0)


def test_chat_template_is_applied_when_the_model_has_one(run: Run) -> None:
    assert run("generate", "hi", "--system", "be kind").stdout == "<SYSTEM>BE KIND<USER>HI\n"


def test_raw_prompt_with_a_system_message_is_refused(run: Run) -> None:
    outcome = run("generate", "hi", "--raw", "--system", "be kind")
    assert outcome.code == 2
    assert outcome.stderr.startswith("error: --system with --raw")


def test_defaults_are_those_of_the_dataclasses(run: Run) -> None:
    (settings,) = run("generate", "hi").settings
    assert (settings.sampling, settings.speculation, settings.runner) == (SamplingParams(), SpeculationConfig(), RunnerConfig())
    assert settings.model == "default"


def test_every_option_reaches_its_setting(run: Run) -> None:
    arguments = (
        "--model m --draft ngram --controller fixed --rule match --max-draft 5 --option num_draft=4 --option mode=fast "
        "--drafter-option max_size=3 --max-tokens 9 --min-tokens 1 --temperature 0.7 --top-k 5 --top-p 0.9 --min-p 0.1 "
        "--repetition-penalty 1.1 --presence-penalty 0.2 --frequency-penalty 0.3 --logit-bias 7=-2.5 --stop x --stop yy "
        "--stop-token-id 3 --ignore-eos --seed 11 --logprobs 2 --precision int8 --device cpu --backend lean --threads 2 "
        "--max-context 99 --json"
    )
    (settings,) = run("generate", "hi", *arguments.split()).settings
    assert settings.model == "m"
    assert settings.speculation == SpeculationConfig(
        draft="ngram",
        controller="fixed",
        rule="match",
        max_draft_tokens=5,
        controller_options={"num_draft": 4, "mode": "fast"},
        drafter_options={"max_size": 3},
    )
    assert settings.runner == RunnerConfig(precision="int8", device="cpu", backend="lean", threads=2, max_context=99)
    assert settings.sampling == SamplingParams(
        max_tokens=9,
        min_tokens=1,
        temperature=0.7,
        top_k=5,
        top_p=0.9,
        min_p=0.1,
        repetition_penalty=1.1,
        presence_penalty=0.2,
        frequency_penalty=0.3,
        logit_bias={7: -2.5},
        stop=("x", "yy"),
        stop_token_ids=(3,),
        ignore_eos=True,
        seed=11,
        logprobs=2,
    )


def test_several_samples_are_all_in_one_object(run: Run) -> None:
    data = json.loads(run("generate", "hi", "--raw", "-n", "3", "--temperature", "1", "--json").stdout)
    assert [sample["text"] for sample in data["samples"]] == ["HI"] * 3


def test_prompt_comes_from_stdin(run: Run) -> None:
    assert run("generate", "-", "--raw", stdin=b"abc\n").stdout == "ABC\n"
    assert run("generate", "--raw", stdin="né\n".encode()).stdout.strip().startswith("N")


@pytest.mark.parametrize(
    ("arguments", "stdin", "message"),
    [
        (["-"], b"ab\xff", "error: prompt on stdin: byte 0xff at offset 2 is not UTF-8; convert the input first"),
        (["-"], b"", "error: prompt: empty; give it as an argument, or pipe it in"),
        (["  "], b"", "error: prompt: empty; give it as an argument, or pipe it in"),
        (["hi", "--logprobs", "2"], b"", "error: --logprobs = 2 without --json: add --json, which prints them"),
        (["hi", "--logit-bias", "x=1"], b"", "error: --logit-bias 'x=1': write ID=VALUE, a token id and a number"),
        (["hi", "--option", "abc"], b"", "error: --option 'abc': write NAME=VALUE"),
        (["hi", "--top-k", "-1"], b"", "error: top_k = -1: must be a whole number >= 0"),
        (["hi", "--temperature", "nan"], b"", "error: temperature = nan: must be a number in [0, 100]"),
        (["hi", "--precision", "fp8"], b"", "error: precision = 'fp8': choose one of auto, fp32, bf16, int8, int4"),
        (["x" * 500, "--raw"], b"", "error: prompt is 500 tokens long, 400 fit"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(run: Run, arguments: list[str], stdin: bytes, message: str) -> None:
    outcome = run("generate", *arguments, stdin=stdin)
    assert outcome.code == 2
    assert outcome.stderr.strip() == message
    assert outcome.stdout == ""


def test_interruption_keeps_text_and_statistics(run: Run, engine: FakeEngine) -> None:
    engine.interrupt_after = 2
    outcome = run("generate", "abcdefghijkl", "--raw")
    assert outcome.code == 130
    assert outcome.stdout == "ABCDEFGH\n"
    assert "8 tokens" in outcome.stderr
    assert "100% of 6 drafted tokens accepted" in outcome.stderr
    assert engine.closed


def test_interruption_with_json_still_prints_one_object(run: Run, engine: FakeEngine) -> None:
    engine.interrupt_after = 1
    outcome = run("generate", "abcdefghijkl", "--raw", "--json")
    data = json.loads(outcome.stdout)
    assert outcome.code == 130
    assert (data["text"], data["finish_reason"], data["num_tokens"]) == ("ABCD", "interrupted", 4)


def test_interruption_reports_the_seed_that_was_drawn(run: Run, engine: FakeEngine) -> None:
    engine.interrupt_after = 1
    for arguments, seed in (((), 7), (("--seed", "11"), 11)):
        outcome = run("generate", "abcdefghijkl", "--raw", "--temperature", "1", "--json", *arguments)
        assert (outcome.code, json.loads(outcome.stdout)["seed"]) == (130, seed)


def test_interrupted_samples_say_why_nothing_is_shown(run: Run, engine: FakeEngine) -> None:
    engine.interrupt_after = 1
    outcome = run("generate", "abcdefghijkl", "--raw", "-n", "2", "--temperature", "1")
    assert (outcome.code, outcome.stdout) == (130, "")
    assert "the 2 answers of -n are shown once all have ended" in outcome.stderr


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_profile_that_cannot_be_kept_is_a_note_after_the_answer(
    run: Run, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, interrupted: bool
) -> None:
    def close() -> None:
        raise cache_error(Path("/full/profile.json"), OSError(errno.EROFS, "Read-only file system"))

    monkeypatch.setattr(engine, "close", close)
    engine.interrupt_after = 1 if interrupted else None
    outcome = run("generate", "abcdefgh", "--raw", "--remember")
    assert outcome.code == (130 if interrupted else 0)
    assert outcome.stdout == ("ABCD\n" if interrupted else "ABCDEFGH\n")
    summary, note = outcome.stderr.splitlines()
    assert "tok/s" in summary
    assert note == (
        "note: what the controller learnt is not kept: cache: cannot write /full/profile.json: Read-only file system; "
        "free some space, or set PACELINE_CACHE to a folder that can be written"
    )


def test_an_error_is_not_hidden_by_a_profile_that_cannot_be_kept(
    run: Run, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def close() -> None:
        raise CacheError("cache: cannot write")

    monkeypatch.setattr(engine, "close", close)
    outcome = run("generate", "x" * 500, "--raw", "--remember")
    assert outcome.code == 2
    assert outcome.stderr.splitlines()[-1].startswith("error: prompt is 500 tokens long")


def test_compare_runs_plain_around_speculative_after_a_warm_up_and_finds_the_same_text(run: Run, engine: FakeEngine) -> None:
    outcome = run("generate", "abcdefghijkl", "--raw", "--compare", "--json")
    data = json.loads(outcome.stdout)
    assert data["same_text"] is True
    assert data["speedup_vs_plain"] == pytest.approx(2.0)
    assert data["plain_tokens_per_second"] == pytest.approx(100.0)
    assert [plain for _, _, plain in engine.calls] == [True, False, True, False, True]
    assert [params.max_tokens for _, params, _ in engine.calls[:2]] == [8, 8]
    assert list(data)[: len(JSON_FIELDS)] == JSON_FIELDS


def test_compare_never_drafts_from_an_answer_to_the_same_prompt(run: Run, engine: FakeEngine) -> None:
    run("generate", "abcdefghijkl", "--raw", "--compare")
    speculative = [text for text, _, plain in engine.calls if not plain]
    assert len(speculative) == len(set(speculative)) == 2


def test_compare_gives_sampled_runs_one_seed(run: Run, engine: FakeEngine) -> None:
    run("generate", "abc", "--raw", "--compare", "--temperature", "1")
    assert {params.seed for _, params, _ in engine.calls[2:]} == {7}


def test_compare_says_so_when_texts_differ(run: Run, engine: FakeEngine) -> None:
    engine.differ = True
    assert "same text: NO" in run("generate", "abcdef", "--raw", "--compare").stdout
