"""Prompt sets: JSONL files in the shapes of Spec-Bench, HumanEval and GSM8K, our own, and a small built-in set."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from paceline.errors import OptionError, PromptError

BUILT_IN = "builtin"
"""Name of the prompt set that comes with the package."""


@dataclass(frozen=True, slots=True)
class BenchPrompt:
    """One prompt of a set."""

    name: str
    """`question_id`, `task_id`, or the line number."""
    category: str
    text: str


def load_prompts(source: str, *, limit: int | None = None) -> list[BenchPrompt]:
    """Prompts of a JSONL file, or of the built-in set when `source` is `builtin`.

    A line is an object with `turns` (Spec-Bench: the first turn counts), `question` (GSM8K) or `prompt` (HumanEval, ours), and
    perhaps `category`; a file without categories is one category, named after the file.
    limit: most prompts of each category, the first ones of the file; None takes all.
    Raises PromptError for a file or line that cannot be read, naming the line; OptionError for a limit under 1.
    """
    if limit is not None and limit < 1:
        raise OptionError(f"limit = {limit}: must be a whole number >= 1")
    if source == BUILT_IN:
        text, name = files("paceline.study").joinpath("prompts", "builtin.jsonl").read_text(encoding="utf-8"), BUILT_IN
    else:
        text, name = _read(Path(source)), Path(source).stem
    prompts = [_parse(line, number, source, name) for number, line in enumerate(text.splitlines(), start=1) if line.strip()]
    if not prompts:
        raise PromptError(f"prompts {source!r}: the file has no lines")
    return prompts if limit is None else _first_of_each(prompts, limit)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise PromptError(f"prompts {str(path)!r}: {error.strerror}; give a JSONL file, or `{BUILT_IN}`") from None
    except UnicodeDecodeError as error:
        raise PromptError(f"prompts {str(path)!r}: not UTF-8 at byte {error.start}; convert the file first") from None


def _parse(line: str, number: int, source: str, name: str) -> BenchPrompt:
    where = f"prompts {source!r}, line {number}"
    try:
        row = json.loads(line)
    except ValueError as error:
        raise PromptError(f"{where}: not JSON ({error}); write one object a line") from None
    if not isinstance(row, Mapping):
        raise PromptError(f"{where}: not an object; write one object a line")
    text = _text(row)
    if not isinstance(text, str) or not text.strip():
        raise PromptError(f"{where}: no text in `prompt`, `question` or `turns`")
    identity = next((row[key] for key in ("question_id", "task_id") if key in row), number)
    return BenchPrompt(str(identity), str(row.get("category") or name), text)


def _text(row: Mapping[str, Any]) -> object:
    turns = row.get("turns")
    if isinstance(turns, list) and turns:
        return turns[0]
    return row.get("prompt", row.get("question"))


def _first_of_each(prompts: Iterable[BenchPrompt], limit: int) -> list[BenchPrompt]:
    taken: dict[str, int] = {}
    kept = []
    for prompt in prompts:
        taken[prompt.category] = taken.get(prompt.category, 0) + 1
        if taken[prompt.category] <= limit:
            kept.append(prompt)
    return kept
