"""Answers of a model in JSONL files, one a line, as token ids or as texts.

`{"tokens": [...], "first": n}`: the ids from `first` on were written by the model, those before are what it had read. `likeliest`,
of the same length as what was written, says what it found most probable there, where the text was sampled.
`{"prompt": "...", "answer": "..."}`: texts; the answer is whole, up to where the model ended it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from paceline.drafting.ngram_table import MOST_ORDERS
from paceline.errors import OptionError
from paceline.models.base import Tokenizer
from paceline.study.prompts import encode_prompt, parse_object
from paceline.training.ngram_table import Answer

CONTEXT = MOST_ORDERS
"""Tokens of a prompt that are kept before its answer: no context is longer."""
MARK = "paceline's mark"
"""Stands for a message where a chat template is rendered to see what it puts around one."""


def make_answer(prompt: list[int], written: list[int], likeliest: list[int] | None = None) -> Answer:
    """What a model wrote after a prompt, with the end of the prompt as context."""
    context = prompt[-CONTEXT:]
    return Answer((*context, *written), len(context), likeliest)


def read_answers(path: Path, tokenizer: Tokenizer) -> Iterator[Answer]:
    """The answers of a JSONL file; texts become ids as the tokenizer and its chat template (if it has one) say.

    Raises OptionError for a file, line or field that cannot be used, naming it.
    """
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _parse(line, f"answers {str(path)!r}, line {number}", tokenizer)
    except OSError as error:
        raise OptionError(f"answers {str(path)!r}: {error.strerror}; give a JSONL file with an answer a line") from None
    except UnicodeDecodeError:
        raise OptionError(f"answers {str(path)!r}: not UTF-8; convert the file first") from None


def write_answer(answer: Answer, file: TextIO) -> None:
    """Add a line that `read_answers` understands, at once: what was written stays when the run is broken off."""
    row: dict[str, Any] = {"tokens": list(answer.tokens), "first": answer.first}
    if answer.likeliest is not None:
        row["likeliest"] = list(answer.likeliest)
    file.write(json.dumps(row) + "\n")
    file.flush()


def _parse(line: str, where: str, tokenizer: Tokenizer) -> Answer:
    row = parse_object(line, where, OptionError)
    return _of_tokens(row, where, tokenizer) if "tokens" in row else _of_texts(row, where, tokenizer)


def _of_tokens(row: Mapping[str, Any], where: str, tokenizer: Tokenizer) -> Answer:
    tokens = _ids(row["tokens"], f"{where}, field `tokens`", tokenizer)
    first = row.get("first")
    if not isinstance(first, int) or isinstance(first, bool) or not 0 <= first <= len(tokens):
        raise OptionError(f"{where}, field `first`: {first!r} must be a whole number from 0 to {len(tokens)}, the number of tokens")
    if row.get("likeliest") is None:
        return Answer(tokens, first)
    likeliest = _ids(row["likeliest"], f"{where}, field `likeliest`", tokenizer)
    if len(likeliest) != len(tokens) - first:
        raise OptionError(
            f"{where}, field `likeliest`: {len(likeliest)} ids for {len(tokens) - first} tokens from `first` on; give one for each"
        )
    return Answer(tokens, first, likeliest)


def _ids(value: object, where: str, tokenizer: Tokenizer) -> list[int]:
    if not isinstance(value, list):
        raise OptionError(f"{where}: must be a list of token ids")
    for token in value:
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < tokenizer.vocab_size:
            raise OptionError(f"{where}: {token!r} is no token id of this model; they go from 0 to {tokenizer.vocab_size - 1}")
    return value


def _of_texts(row: Mapping[str, Any], where: str, tokenizer: Tokenizer) -> Answer:
    for field in ("prompt", "answer"):
        if not isinstance(row.get(field), str) or not row[field]:
            raise OptionError(f"{where}, field `{field}`: no text in it; give `prompt` and `answer`, or `tokens` and `first`")
    chat = tokenizer.has_chat_template
    prompt = encode_prompt(tokenizer, row["prompt"], chat=chat)
    end = _end_of_answer(tokenizer) if chat else []
    return make_answer(prompt, tokenizer.encode(row["answer"], add_special=False) + end)


def _end_of_answer(tokenizer: Tokenizer) -> list[int]:
    """The token with which the model ends its turn: what the chat template puts behind an answer, if texts end with that."""
    turns = [{"role": role, "content": MARK} for role in ("user", "assistant", "user")]
    parts = tokenizer.render_chat(turns).split(MARK)
    behind = tokenizer.encode(parts[2], add_special=False)[:1] if len(parts) == 4 else []
    return [token for token in behind if token in tokenizer.end_ids]
