"""Prompt sets: JSONL files in the shapes of Spec-Bench, HumanEval and GSM8K, our own, and two that come with the package."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paceline.errors import OptionError, PacelineError, PromptError

if TYPE_CHECKING:
    from paceline.models.base import Tokenizer

BUILT_IN = "builtin"
"""24 prompts of six kinds."""
AGENT = "agent"
"""Repeated requests as agents make them: edits of one file, JSON of one shape, a message quoted again and again."""
SETS = (BUILT_IN, AGENT)
"""Names of the prompt sets that come with the package; any other name is a file."""
WARM_UP = "Write a short letter to a friend about a walk along the sea."
"""What methods answer before they are timed: in no set, for drafters that remember would draft from the answer."""


@dataclass(frozen=True, slots=True)
class BenchPrompt:
    """One prompt of a set."""

    name: str
    """`question_id`, `task_id`, or the line number."""
    category: str
    text: str


def load_prompts(source: str, *, limit: int | None = None) -> list[BenchPrompt]:
    """Prompts of a JSONL file, or of a set that comes with the package (`builtin`, `agent`).

    A line is an object with `turns` (Spec-Bench: the first turn counts), `question` (GSM8K) or `prompt` (HumanEval, ours), and
    perhaps `category`; a file without categories is one category, named after the file.
    limit: most prompts of each category, the first ones of the file; None takes all.
    Raises PromptError for a file or line that cannot be read, naming the line; OptionError for a limit under 1.
    """
    if limit is not None and limit < 1:
        raise OptionError(f"limit = {limit}: must be a whole number >= 1")
    if source in SETS:
        text, name = files("paceline.study").joinpath("prompts", f"{source}.jsonl").read_text(encoding="utf-8"), source
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
        raise PromptError(f"prompts {str(path)!r}: {error.strerror}; give a JSONL file, or one of {', '.join(SETS)}") from None
    except UnicodeDecodeError as error:
        raise PromptError(f"prompts {str(path)!r}: not UTF-8 at byte {error.start}; convert the file first") from None


def _parse(line: str, number: int, source: str, name: str) -> BenchPrompt:
    where = f"prompts {source!r}, line {number}"
    row = parse_object(line, where, PromptError)
    text = _text(row)
    if not isinstance(text, str) or not text.strip():
        raise PromptError(f"{where}: no text in `prompt`, `question` or `turns`")
    identity = next((row[key] for key in ("question_id", "task_id") if key in row), number)
    return BenchPrompt(str(identity), str(row.get("category") or name), text)


def parse_object(line: str, where: str, error: type[PacelineError]) -> Mapping[str, Any]:
    """The object in a line of JSONL. Raises `error`, which names the place, for anything else."""
    try:
        row = json.loads(line)
    except ValueError as cause:
        raise error(f"{where}: not JSON ({cause}); write one object a line") from None
    if not isinstance(row, Mapping):
        raise error(f"{where}: not an object; write one object a line")
    return row


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


def encode_prompt(tokenizer: Tokenizer, text: str, *, chat: bool = True) -> list[int]:
    """Token ids of a text, as the user's turn in the tokenizer's chat template or, without `chat`, as it is."""
    rendered = tokenizer.render_chat([{"role": "user", "content": text}]) if chat else text
    return tokenizer.encode(rendered, add_special=not chat)


def encode_prompts(
    tokenizer: Tokenizer, prompts: Sequence[BenchPrompt], *, longest: int | None = None, chat: bool = True
) -> list[tuple[BenchPrompt, list[int]]]:
    """Every prompt with its token ids (see `encode_prompt`). longest: prompts of more tokens are left out; None keeps all."""
    encoded = [(prompt, encode_prompt(tokenizer, prompt.text, chat=chat)) for prompt in prompts]
    return [(prompt, ids) for prompt, ids in encoded if longest is None or len(ids) <= longest]
