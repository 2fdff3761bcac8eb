"""Answers in JSONL files."""

from __future__ import annotations

import json
from dataclasses import astuple
from pathlib import Path

import pytest

from paceline.errors import OptionError
from paceline.training.answers import CONTEXT, make_answer, read_answers, write_answer
from paceline.training.ngram_table import Answer
from tiny_models import END, TEMPLATE, byte_level_tokenizer

TOKENIZER = byte_level_tokenizer(TEMPLATE)


def read(tmp_path: Path, *lines: object) -> list[Answer]:
    path = tmp_path / "answers.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return list(read_answers(path, TOKENIZER))


def test_the_end_of_a_prompt_is_kept_as_context() -> None:
    assert astuple(make_answer(list(range(20)), [30, 31])) == ((*range(20 - CONTEXT, 20), 30, 31), CONTEXT, None)
    assert astuple(make_answer([1], [2], [3])) == ((1, 2), 1, [3])


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    answers = [Answer([1, 2, 3], 1), Answer([4, 5], 0, likeliest=[6, 5])]
    with path.open("w", encoding="utf-8") as file:
        for number, answer in enumerate(answers, start=1):
            write_answer(answer, file)
            assert len(path.read_text(encoding="utf-8").splitlines()) == number  # at once
    assert list(map(astuple, read_answers(path, TOKENIZER))) == list(map(astuple, answers))


def test_texts_are_rendered_with_the_chat_template_and_end_where_the_turn_ends(tmp_path: Path) -> None:
    (answer,) = read(tmp_path, {"prompt": "hello", "answer": "the all"})
    assert list(answer.tokens[: answer.first]) == TOKENIZER.encode("<|im_start|>assistant\n", add_special=False)[-CONTEXT:]
    assert list(answer.tokens[answer.first :]) == [*TOKENIZER.encode("the all"), END]


def test_without_a_chat_template_texts_stand_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text('{"prompt": "hello", "answer": " the"}\n\n')
    tokenizer = byte_level_tokenizer()
    (answer,) = read_answers(path, tokenizer)
    assert list(answer.tokens) == tokenizer.encode("hello") + tokenizer.encode(" the")
    assert answer.first == len(tokenizer.encode("hello"))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "not JSON"),
        ("[1]", "not an object"),
        ({}, "field `prompt`: no text"),
        ({"prompt": "a"}, "field `answer`: no text"),
        ({"prompt": 3, "answer": "b"}, "field `prompt`: no text"),
        ({"prompt": "a", "answer": ""}, "field `answer`: no text"),
        ({"tokens": "12", "first": 0}, "field `tokens`: must be a list"),
        ({"tokens": [1, 99_999], "first": 0}, "field `tokens`: 99999 is no token id"),
        ({"tokens": [1, True], "first": 0}, "field `tokens`: True is no token id"),
        ({"tokens": [1, -1], "first": 0}, "field `tokens`: -1 is no token id"),
        ({"tokens": [1, 2]}, "field `first`: None"),
        ({"tokens": [1, 2], "first": 3}, "field `first`: 3 must be a whole number from 0 to 2"),
        ({"tokens": [1, 2], "first": 1, "likeliest": [1, 2]}, "field `likeliest`: 2 ids for 1 tokens"),
        ({"tokens": [1, 2], "first": 1, "likeliest": [-2]}, "field `likeliest`: -2 is no token id"),
    ],
)
def test_a_line_that_cannot_be_used_is_named_with_its_field(line: object, words: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=rf"answers\.jsonl', line 2.*{words}") as caught:
        read(tmp_path, {"tokens": [1, 2], "first": 1}, line)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"none\.jsonl.*No such file"):
        list(read_answers(tmp_path / "none.jsonl", TOKENIZER))
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "caf\xe9"}\n')
    with pytest.raises(OptionError, match=r"latin\.jsonl.*not UTF-8"):
        list(read_answers(tmp_path / "latin.jsonl", TOKENIZER))
