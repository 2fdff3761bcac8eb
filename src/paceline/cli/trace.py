"""`paceline trace`: record rounds for `paceline replay`, and for training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from paceline.cli import loading
from paceline.cli.loading import Request
from paceline.cli.options import Settings, takes_settings
from paceline.config import RunnerConfig, SamplingParams, SpeculationConfig
from paceline.errors import OptionError


@takes_settings(SpeculationConfig, SamplingParams, RunnerConfig)
def trace(
    out: Annotated[Path, typer.Argument(help="File to write: .jsonl, or .parquet (with pyarrow).", show_default=False)],
    prompts: Annotated[str, typer.Option("--prompts", help="JSONL file (docs/benchmarks.md), `builtin` or `agent`.")] = "builtin",
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Most prompts of each category.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Do not apply the chat template.")] = False,
    survey: Annotated[bool, typer.Option("--survey", help="Long drafts by every drafter in turn: best to replay and fit.")] = False,
    *,
    settings: Settings,
) -> None:
    """Answer prompts and record every round: what was known, drafted and accepted, and what it cost. No text is recorded."""
    from paceline.study.prompts import load_prompts
    from paceline.study.report import check_writable
    from paceline.study.trace import Survey, TraceWriter, Tracing, read_trace, write_parquet

    check_writable(out)
    if out.suffix not in (".jsonl", ".parquet"):
        raise OptionError(f"trace file {str(out)!r}: name it .jsonl or .parquet")
    prompt_set = load_prompts(prompts, limit=limit)
    lines = out.with_suffix(".jsonl")
    with loading.open_engine(settings) as engine:
        deciding = Survey() if survey else engine.controller
        with TraceWriter(lines, deciding.name, engine.costs) as writer:
            engine.controller = Tracing(deciding, writer)
            try:
                for prompt in prompt_set:
                    request = Request.make(engine, prompt.text, "", False if raw else None)
                    request.run(engine, settings.sampling, task=prompt.category)
            except KeyboardInterrupt:
                typer.echo(f"interrupted; the rounds so far are in {writer.part}, which `paceline replay --trace` reads", err=True)
                raise
    recorded = read_trace(lines)
    if out.suffix == ".parquet":
        write_parquet(recorded, out)
        lines.unlink()
    typer.echo(f"{len(recorded.rounds)} rounds of {len(prompt_set)} prompts in {out}", err=True)
