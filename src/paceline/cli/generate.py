"""`paceline generate`: one prompt, one answer (or several)."""

from __future__ import annotations

import json
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from paceline.cli import loading
from paceline.cli.loading import Request
from paceline.cli.options import Settings, takes_settings
from paceline.cli.output import StreamFold, echo_event, result_document, summary_line
from paceline.cli.side_by_side import print_side_by_side, run_side_by_side
from paceline.config import RunnerConfig, SamplingParams, SpeculationConfig
from paceline.errors import OptionError

if TYPE_CHECKING:
    from paceline.engine import Engine
    from paceline.records import GenerationResult

Prompt = Annotated[str | None, typer.Argument(help="The prompt; `-` or nothing reads stdin.", show_default=False)]
Chat = Annotated[bool | None, typer.Option("--chat/--raw", help="Apply the chat template (default: if the model has one).")]
System = Annotated[str, typer.Option("--system", help="System message.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")]


@takes_settings(SpeculationConfig, SamplingParams, RunnerConfig)
def generate(
    prompt: Prompt = None,
    chat: Chat = None,
    system: System = "",
    compare: Annotated[bool, typer.Option("--compare", help="Plain and speculative in one run: both speeds, same text?")] = False,
    as_json: AsJson = False,
    *,
    settings: Settings,
) -> None:
    """Answer a prompt. Drafted-and-accepted tokens are green; the last line (on stderr) sums up."""
    if compare and settings.sampling.n > 1:
        raise OptionError(f"-n = {settings.sampling.n} with --compare: compare one answer at a time; leave one of them out")
    if settings.sampling.logprobs is not None and not as_json:
        raise OptionError(f"--logprobs = {settings.sampling.logprobs} without --json: add --json, which prints them")
    text = loading.read_prompt(prompt)
    with loading.open_engine(settings) as engine:
        request = Request.make(engine, text, system, chat)
        if compare:
            outcome = run_side_by_side(engine, request, settings.sampling)
            print_side_by_side(engine, outcome, as_json)
        elif settings.sampling.n > 1:
            _print_samples(engine, _all_samples(engine, request, settings.sampling), as_json)
        else:
            _stream(engine, request, settings.sampling, as_json)


def _stream(engine: Engine, request: Request, params: SamplingParams, as_json: bool) -> None:
    """Print while tokens come. Ctrl-C keeps what there is, and exits with 130."""
    fold = StreamFold()
    interrupted = fold.follow(request.stream(engine, params), None if as_json else partial(echo_event, engine))
    result = fold.finish(engine)
    if as_json:
        typer.echo(json.dumps(result_document(engine, result), ensure_ascii=False))
    else:
        typer.echo()
        print_summary(engine, result)
    if interrupted:
        raise typer.Exit(130)


def print_summary(engine: Engine, result: GenerationResult) -> None:
    """The closing line, and what the engine wants to be known, on stderr."""
    for note in result.notes:
        typer.echo(f"note: {note}", err=True)
    typer.echo(typer.style(summary_line(engine, result), dim=True), err=True)


def _all_samples(engine: Engine, request: Request, params: SamplingParams) -> list[GenerationResult]:
    """They are decoded together, so that none is whole before the last rounds."""
    try:
        return request.run(engine, params)
    except KeyboardInterrupt:
        typer.echo(
            f"interrupted: the {params.n} answers of -n are shown once all have ended; with -n 1 text comes at once", err=True
        )
        raise


def _print_samples(engine: Engine, results: list[GenerationResult], as_json: bool) -> None:
    """Several answers: one after another, or the first one's object with all of them under `samples`."""
    documents = [result_document(engine, result) for result in results]
    if as_json:
        typer.echo(json.dumps(documents[0] | {"samples": documents}, ensure_ascii=False))
        return
    for number, result in enumerate(results, start=1):
        typer.echo(typer.style(f"[{number}]", dim=True))
        typer.echo(result.text)
    for result in results:
        print_summary(engine, result)
