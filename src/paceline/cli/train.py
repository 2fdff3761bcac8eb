"""`paceline train`: what drafts, made from a model's own answers."""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn, TextIO

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from paceline.cli import loading
from paceline.cli.options import Settings, takes_settings
from paceline.config import RunnerConfig, SpeculationConfig
from paceline.errors import OptionError, PacelineError

if TYPE_CHECKING:
    from paceline.engine import Engine
    from paceline.models.base import Tokenizer
    from paceline.training.ngram_table import Answer, TableOptions
    from paceline.training.self_talk import TalkOptions

CONVERSATIONS = 2000

train = typer.Typer(no_args_is_help=True, help="Train what drafts.")


@train.callback()
def root() -> None:
    """Train what drafts."""


@train.command()
@takes_settings(RunnerConfig)
def ngrams(
    out: Annotated[Path, typer.Option("--out", help="File to write.", show_default=False)],
    conversations: Annotated[
        int | None,
        typer.Option("--conversations", min=0, help=f"Of the model with itself (default: {CONVERSATIONS}, with --answers 0)."),
    ] = None,
    answers: Annotated[
        list[Path] | None, typer.Option("--answers", help="JSONL file of answers to count (docs/training.md); repeatable.")
    ] = None,
    save_answers: Annotated[
        Path | None, typer.Option("--save-answers", help="Keep the conversations' answers in this JSONL file.")
    ] = None,
    orders: Annotated[int, typer.Option("--orders", help="Tokens of the longest context.")] = 4,
    min_count: Annotated[int, typer.Option("--min-count", help="How often a context must be counted.")] = 3,
    max_contexts: Annotated[int, typer.Option("--max-contexts", help="Most contexts to keep, the most frequent ones.")] = 500_000,
    seed: Annotated[int, typer.Option("--seed", help="Makes the conversations repeat.")] = 0,
    *,
    settings: Settings,
) -> None:
    """Count what a model tends to say into a table that `suffix+tree` drafts from. Ctrl-C counts the answers so far."""
    from paceline.training.ngram_table import TableOptions
    from paceline.training.self_talk import TalkOptions

    options = TableOptions(orders=orders, min_count=min_count, max_contexts=max_contexts)
    sources = answers or []
    count = (0 if sources else CONVERSATIONS) if conversations is None else conversations
    if not (sources or count):
        raise OptionError("--conversations 0: leaves nothing to count; ask for some, or give --answers")
    if save_answers is not None and not count:
        raise OptionError(f"--save-answers {str(save_answers)!r}: no conversations to keep; set --conversations, or leave it out")
    talk = TalkOptions(conversations=count, seed=seed) if count else None
    _check_writable(out, "--out")
    with _opened(save_answers, sources) as kept:
        tokenizer, gathered, broken = _gather(sources, talk, settings, kept)
    if broken is None:
        _count(gathered, options, tokenizer, out)
    else:
        _count_what_is_there(gathered, options, tokenizer, out, broken)


def _check_writable(path: Path, option: str) -> None:
    """Fail before a long run, not after it, by writing where the file will be. Raises OptionError."""
    if path.is_dir():
        raise OptionError(f"{option} {str(path)!r}: is a folder; name a file in it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise OptionError(f"{option} {str(path)!r}: cannot be written ({error.strerror}); choose another place") from None


@contextmanager
def _opened(path: Path | None, sources: list[Path]) -> Iterator[TextIO | None]:
    """The file that keeps the answers, if one is wanted: it must not be one of those that are read."""
    if path is None:
        yield None
        return
    if path.resolve() in [source.resolve() for source in sources]:
        raise OptionError(f"--save-answers {str(path)!r}: is read by --answers, too; name another file")
    _check_writable(path, "--save-answers")
    with path.open("w", encoding="utf-8") as file:
        yield file


def _gather(
    sources: list[Path], talk: TalkOptions | None, settings: Settings, kept: TextIO | None
) -> tuple[Tokenizer, list[Answer], BaseException | None]:
    """Answers from files and from conversations, the tokenizer of their ids, and what ended the conversations early, if it did."""
    from paceline.models.resolve import open_model
    from paceline.training.answers import read_answers

    if talk is None:
        tokenizer = open_model(settings.model).tokenizer
        return tokenizer, [answer for path in sources for answer in read_answers(path, tokenizer)], None
    plain = replace(settings, speculation=SpeculationConfig(draft="none"))  # full batches have no time left to draft in
    with loading.open_engine(plain) as engine:
        gathered = [answer for path in sources for answer in read_answers(path, engine.tokenizer)]
        broken = _talk(engine, talk, gathered, kept)
        return engine.tokenizer, gathered, broken


def _talk(engine: Engine, talk: TalkOptions, gathered: list[Answer], kept: TextIO | None) -> BaseException | None:
    """Add the answers of conversations. Returns what ended them early: Ctrl-C or an error keep what there is."""
    from paceline.training.answers import write_answer
    from paceline.training.self_talk import converse

    answers = converse(engine, talk)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("conversations", total=talk.conversations)
        try:
            for answer in answers:
                gathered.append(answer)
                if kept is not None:
                    write_answer(answer, kept)
                progress.advance(bar)
        except (KeyboardInterrupt, Exception) as stop:
            return stop
    return None


def _count_what_is_there(
    answers: list[Answer], options: TableOptions, tokenizer: Tokenizer, out: Path, broken: BaseException
) -> NoReturn:
    """After conversations that ended early; then ends with their error, or as interrupted."""
    interrupted = isinstance(broken, KeyboardInterrupt)
    if interrupted:
        so_far = f": counting the {len(answers)} answers so far" if answers else " before the first answer: nothing to count"
        typer.echo(f"interrupted{so_far}", err=True)
    if answers:
        try:
            _count(answers, options, tokenizer, out)
        except PacelineError as error:
            typer.echo(f"note: no table was written: {error}", err=True)
    raise typer.Exit(130) if interrupted else broken


def _count(answers: list[Answer], options: TableOptions, tokenizer: Tokenizer, out: Path) -> None:
    """Write the table, and say what is in it."""
    from paceline.drafting.ngram_table import vocabulary_digest
    from paceline.training.ngram_table import count_ngrams

    table = count_ngrams(answers, options, vocabulary_digest(tokenizer))
    contexts = len(table.checks)
    if not contexts:
        raise OptionError(
            f"--min-count {options.min_count}: no context was counted so often in {len(answers)} answers; lower it, or count more"
        )
    table.save(out)
    written = sum(answer.num_written for answer in answers)
    typer.echo(
        f"{contexts} contexts, {out.stat().st_size} bytes, of {written} tokens in {len(answers)} answers: {out}; "
        f"use it with --draft suffix+tree --drafter-option {shlex.quote(f'suffix.table={out}')}",
        err=True,
    )
