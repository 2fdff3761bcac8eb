"""`paceline corpus`: corpora that the `rest` drafter looks things up in."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from paceline.cli.options import MODEL

corpus = typer.Typer(no_args_is_help=True, help="Corpora for the drafter `rest`.")


@corpus.callback()
def root() -> None:
    """Corpora for the drafter `rest`."""


@corpus.command()
def build(
    files: Annotated[list[Path], typer.Argument(help="UTF-8 text files, or .jsonl with a field `text`.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", help="Folder to write.", show_default=False)],
    model: Annotated[str, typer.Option("--model", help=MODEL.help)] = "default",
) -> None:
    """Tokenise files for a model and write a corpus: draft from it with `--draft rest:FOLDER`."""
    from paceline.drafting.corpus import build_corpus
    from paceline.models.resolve import open_model

    count = build_corpus(files, open_model(model).tokenizer, out)
    typer.echo(f"{count} tokens of {len(files)} files in {out}; use it with --draft rest:{out}", err=True)
